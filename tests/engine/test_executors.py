"""Students side by side on a CPU's threads give what students in turn give, bit for bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import Trap, assert_same, batch, engine_of, networks, student
from state_cases import assert_equal
from torch import Tensor, nn
from training_cases import IMAGES, cohort_of, train

from dml_fast.engine import Engine
from dml_fast.engine.executor import Sequential
from dml_fast.engine.threads import Threads, intra_op_threads
from dml_fast.errors import UserError
from dml_fast.loss.mihash import MIHashLoss
from dml_fast.loss.triplet import TripletLoss
from dml_fast.models import create_model


@pytest.fixture(autouse=True)
def room_for_threads() -> Iterator[None]:
    """The process may use more threads than a worker gets, as in a real run."""
    with intra_op_threads(4):
        yield


def side_by_side(cohort: int) -> Threads:
    """As many workers as students, one thread each, so that any race shows."""
    return Threads(cohort, workers=cohort, threads_each=1)


HARDEST = {"feature_loss": TripletLoss(), "feature_weight": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "four students": {"archs": ["resnet8"] * 4},
    "bf16": {"archs": ["resnet8"] * 3, "dtype": torch.bfloat16},
    "architectures": {"archs": ["resnet8", "mobilenet_v1", "resnet14"], "optimizer": "adamw"},
    "one with dropout": {"archs": ["resnet8", "wrn_10_1_drop0.3", "resnet8"]},
    "all with dropout": {"archs": ["wrn_10_1_drop0.3"] * 3, "dtype": torch.bfloat16},
    "triplet": {"archs": ["resnet8"] * 3, "embed": True, "engine": HARDEST},
    "mutual information": {
        "archs": ["resnet8"] * 3,
        "embed": True,
        "dtype": torch.bfloat16,
        "engine": {"feature_loss": MIHashLoss(), "feature_weight": 0.5},
    },
    "distill": {
        "archs": ["resnet8"] * 3,
        "engine": {"method": "distill", "temperature": 2.0},
        "step": {"learners": (1, 2), "teacher": 0},
    },
    "one learner": {
        "archs": ["resnet8"] * 3,
        "engine": {"method": "distill"},
        "step": {"learners": (0,)},
    },
    "dml_e": {"archs": ["resnet8"] * 3, "engine": {"method": "dml_e"}},
    "labels": {"archs": ["resnet8"] * 3, "engine": {"distribution": "bernoulli"}},
    "alternating": {"archs": ["resnet8"] * 3, "engine": {"update": "alternating"}},
    "averages teach": {
        "archs": ["resnet8", "wrn_10_1_drop0.3", "resnet8"],
        "ema": 0.9,
        "engine": {"teach_with": "ema"},
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_threads_give_the_bits_of_sequential(case: dict[str, Any]) -> None:
    make = {
        key: case[key] for key in ("archs", "optimizer", "dtype", "embed", "ema") if key in case
    }
    count = len(case["archs"])
    # a learner that is alone or takes turns has all of its caller's threads on any executor
    alone = "learners" in case.get("step", {}) and len(case["step"]["learners"]) == 1
    alone = alone or "update" in case.get("engine", {})
    with intra_op_threads(1):
        reference = Engine(cohort_of(**make), executor=Sequential(), **case.get("engine", {}))
        expected = train(reference, 3, **case.get("step", {}))
    with intra_op_threads(1 if alone else 4):
        engine = Engine(cohort_of(**make), executor=side_by_side(count), **case.get("engine", {}))
        found = train(engine, 3, **case.get("step", {}))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert_equal(engine.cohort.state_dict(), reference.cohort.state_dict())


def test_views_differ_and_each_student_gets_its_own() -> None:
    models = networks(2)
    alone = copy.deepcopy(models)
    x0, y = batch(0)
    x1, _ = batch(1)
    engine_of(models, method="independent").step([x0, x1], y, views=True)
    for model, x in zip(alone, (x0, x1), strict=True):
        engine_of([model], method="independent").step(x, y)
    for a, b in zip(models, alone, strict=True):
        assert_same(a, b)
    with pytest.raises(UserError, match=r"3 views .* 2 students"):
        engine_of(models).step([x0, x1, x1], y, views=True)
    with pytest.raises(UserError, match=r"does not take a list of length 2 .*: give views=True if"):
        engine_of(models).step([x0, x1], y)
    with pytest.raises(UserError, match=r"views=True got a Tensor of shape \(6, 1, 8, 8\)"):
        engine_of(models).step(x0, y, views=True)


class Bag(nn.Module):
    """Words of each text, and where the texts begin: a model of two inputs in one object."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(20, 5)

    def forward(self, inputs: tuple[Tensor, Tensor] | dict[str, Tensor]) -> Tensor:
        ids, starts = inputs.values() if isinstance(inputs, dict) else inputs
        out: Tensor = self.words(ids, starts)
        return out


@pytest.mark.parametrize("kind", [tuple, list, lambda x: {"ids": x[0], "starts": x[1]}])
@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_structured_inputs_are_passed_whole(kind: Any, update: str) -> None:
    """Two tensors and two students: the tensors are not two views."""
    torch.manual_seed(0)
    models = [Bag(), Bag()]
    theirs = copy.deepcopy(models)
    ids, starts = torch.arange(12) % 20, torch.tensor([0, 2, 5, 9])
    y = torch.tensor([0, 1, 4, 2])
    expected = torch.stack([F.cross_entropy(m.words(ids, starts), y) for m in theirs])
    result = engine_of(models, update=update).step(kind((ids, starts)), y)
    torch.testing.assert_close(result.ce, expected.detach())
    engine = engine_of(theirs, update=update)
    result = engine.step([kind((ids, starts)), kind((ids, starts))], y, views=True)
    for a, b in zip(models, theirs, strict=True):
        assert_same(a, b)


def test_students_do_run_side_by_side() -> None:
    meeting = threading.Barrier(3, timeout=30)
    students = [student(m) for m in networks(3)]
    executor = side_by_side(3)
    executor.fork(students, lambda k: None)  # new students run in one worker
    names = executor.fork(students, lambda k: (meeting.wait(), threading.current_thread().name)[1])
    assert len(set(names)) == 3


def test_a_worker_keeps_its_share_of_threads_through_a_backward() -> None:
    """Autograd sets it to what the process set last; steps took 8 times as long."""
    model = create_model("resnet8", **IMAGES)

    def work(k: int) -> int:
        model(torch.randn(4, 3, 16, 16)).sum().backward()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    shares = side_by_side(2).fork([student(m) for m in networks(2)], work)
    assert shares == [1, 1]
    assert torch.get_num_threads() == before == 4


def test_the_shares_of_threads() -> None:
    made = {total: None for total in (1, 2, 4, 11)}
    for total in made:
        with intra_op_threads(total):
            threads = Threads(4)
        made[total] = (threads.workers, threads.threads_each)
    assert made == {1: (1, 1), 2: (2, 1), 4: (4, 1), 11: (4, 2)}


def test_an_error_is_raised_after_all_have_ended() -> None:
    ended = []
    failed = threading.Event()

    def work(k: int) -> None:
        if k == 0:
            failed.set()
            raise ValueError("student 0")
        assert failed.wait(30)
        ended.append(k)

    executor = side_by_side(3)
    students = [student(m) for m in networks(3)]
    executor.fork(students, lambda k: None)
    for _ in range(2):  # the workers survive an error
        ended.clear()
        failed.clear()
        with pytest.raises(ValueError, match="student 0"):
            executor.fork(students, work)
        assert sorted(ended) == [1, 2]


def test_a_bad_student_does_not_stop_its_peers() -> None:
    torch.manual_seed(0)
    models = [Trap(), *networks(2, torch.float32)]
    others = copy.deepcopy(models)
    engine = engine_of(models, executor=side_by_side(3))
    x, y = batch(1, torch.float32)
    x[0, 0, 0, 0] = 99.0
    assert engine.step(x, y).skipped.tolist() == [True, False, False]
    with intra_op_threads(1):
        engine_of(others).step(x, y)
    for a, b in zip(models, others, strict=True):
        assert_same(a, b)


class Moody(nn.Module):
    """Draws random numbers from its second forward pass on, but not in its first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 5)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        out: Tensor = self.linear(x.flatten(1))
        return out + torch.rand(()) if self.passes > 1 else out


def test_a_student_that_begins_to_draw_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    engine = engine_of([Moody(), Moody()], executor=side_by_side(2))
    x, y = batch(0, torch.float32)
    engine.step(x, y)
    assert "not repeatable" not in caplog.text
    engine.step(x, y)
    assert caplog.text.count("not repeatable") == 1
    engine.step(x, y)
    assert caplog.text.count("not repeatable") == 1
