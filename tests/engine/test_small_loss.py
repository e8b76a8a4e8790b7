"""Small-loss selection against a loop in plain torch, and which rows it leaves out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, Trap, assert_same, engine_of, networks, student
from torch import Tensor, nn

from dml_fast.config import TrainConfig
from dml_fast.distributed.launch import Launch
from dml_fast.distributed.mesh import Mesh
from dml_fast.distributed.world import World
from dml_fast.engine import Engine, Threads
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.engine.small_loss import joint_loss, row_weights
from dml_fast.errors import UserError

ROWS = 12


def rows_of(seed: int, dtype: torch.dtype = torch.float64, unlabelled: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(5, (ROWS,), generator=g)
    y[torch.randperm(ROWS, generator=g)[:unlabelled]] = -100
    return torch.randn(ROWS, 1, 8, 8, generator=g, dtype=dtype), y


def kl_rows(peer: Tensor, own: Tensor) -> Tensor:
    return F.kl_div(own.log_softmax(1), peer.detach().softmax(1), reduction="none").sum(1)


def naive_step(
    models: list[nn.Module], optimizers: list[Any], x: Tensor, y: Tensor, weight: float, rate: float
) -> tuple[list[Tensor], list[int]]:
    """JoCoR's choice, row by row, and the paper's loss of the rows that are left."""
    logits = [model(x) for model in models]
    peers = len(models) - 1
    ce = [F.cross_entropy(z, y, reduction="none") for z in logits]
    kl = [torch.stack([kl_rows(p, z) for p in logits if p is not z]).sum(0) / peers for z in logits]
    rows = torch.stack(ce).detach().sum(0) + weight * torch.stack(kl).detach().sum(0)
    joint = rows.tolist()
    named = [i for i in range(ROWS) if y[i] >= 0]
    keep = sorted(named, key=lambda i: joint[i])[: math.ceil((1 - rate) * len(named) - 1e-9)]
    free = [i for i in range(ROWS) if y[i] < 0]
    for k, optimizer in enumerate(optimizers):
        loss = ce[k][keep].mean()
        # the kept rows stand for all rows with a label
        loss = loss + weight * (kl[k][keep].mean() * len(named) + kl[k][free].sum()) / ROWS
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
    return [c[keep].mean().detach() for c in ce], keep


@pytest.mark.slow
@pytest.mark.parametrize(("count", "weight", "unlabelled"), [(2, 8.0, 0), (3, 0.0, 0), (2, 1.5, 4)])
def test_twenty_steps_are_those_of_a_plain_loop(count: int, weight: float, unlabelled: int) -> None:
    mine = networks(count)
    theirs = copy.deepcopy(mine)
    engine = engine_of(mine, kl_weight=weight, small_loss=0.3)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
        for m in theirs
    ]
    for step in range(20):
        x, y = rows_of(step, unlabelled=unlabelled)
        ramp = min(1.0, step / 10)
        ce, keep = naive_step(theirs, optimizers, x, y, weight, 0.3 * ramp)
        result = engine.step(x, y, small_loss_scale=ramp)
        assert result.kept.tolist() == [len(keep)] * count
        torch.testing.assert_close(result.ce, torch.stack(ce), rtol=1e-7, atol=1e-7)
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b, 1e-7)


def test_the_ramp_begins_with_all_rows() -> None:
    plain = networks(2)
    others = copy.deepcopy(plain)
    engine, chooser = engine_of(plain), engine_of(others, small_loss=0.5)
    x, y = rows_of(0)
    a, b = engine.step(x, y), chooser.step(x, y, small_loss_scale=0.0)
    assert a.kept.tolist() == b.kept.tolist() == [ROWS, ROWS]
    for one, other in zip(plain, others, strict=True):
        assert_same(one, other, 1e-12)


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"), [(200, 782, 10.0), (200, 100, 40.0), (40, 6, 40.0)]
)
def test_a_runs_ramp_is_ten_epochs_or_4000_steps(epochs: int, steps: int, expected: float) -> None:
    assert TrainConfig(epochs=epochs).small_loss_warmup(steps) == expected


def test_the_largest_joint_losses_get_the_weight_0_and_equal_ones_go_from_the_end() -> None:
    nan = math.nan
    joint = torch.tensor([3.0, 1.0, nan, 5.0, 1.0, math.inf, 1.0, 0.5])
    assert row_weights(joint, 0.3).tolist() == pytest.approx(
        [7 / 5, 7 / 5, 1, 0, 7 / 5, 0, 7 / 5, 7 / 5]
    )
    ties = torch.ones(4)
    assert row_weights(ties, 0.5).tolist() == [2, 2, 0, 0]
    assert row_weights(ties, 0.999).tolist() == [4, 0, 0, 0]
    assert row_weights(ties, 1 - 1e-9).tolist() == [4, 0, 0, 0]  # one always stays
    assert row_weights(torch.full((3,), nan), 0.5).tolist() == [1, 1, 1]
    for rate, left in ((0.29, 29), (0.57, 57), (0.07, 7), (0.299, 29)):  # as decimals have it
        assert int((row_weights(torch.arange(100.0), rate) == 0).sum()) == left


def test_a_student_without_numbers_has_no_say() -> None:
    losses = torch.tensor([[1.0, math.nan, math.nan], [3.0, 2.0, math.nan]])
    labelled = torch.tensor([True, True, True])
    assert joint_loss(losses, labelled).tolist() == [4.0, 4.0, math.inf]
    torch.manual_seed(0)
    bad, *good = [Trap().double(), *networks(2)]
    alone = copy.deepcopy(good)
    engine = engine_of([bad, *good], small_loss=0.25)
    x, y = rows_of(3)
    x[0, 0, 0, 0] = 99.0
    result = engine.step(x, y)
    expected = engine_of(alone, small_loss=0.25).step(x, y)
    assert result.skipped.tolist() == [True, False, False]
    torch.testing.assert_close(result.losses[1:], expected.losses)
    for a, b in zip(good, alone, strict=True):
        assert_same(a, b, 1e-9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_threads_leave_out_the_same_rows(dtype: torch.dtype | None) -> None:
    def trained(executor: Any) -> tuple[list[nn.Module], Tensor]:
        models = networks(3, torch.float32)
        students = [student(m, Precision(CPU, dtype)) for m in models]
        engine = Engine(Cohort(students), small_loss=0.4, executor=executor)
        results = [engine.step(*rows_of(seed, torch.float32, 3)) for seed in range(3)]
        assert not torch.stack([r.skipped for r in results]).any()
        return models, torch.stack([r.losses for r in results])

    (mine, losses), (theirs, expected) = trained(Threads(3, 3, 1)), trained(None)
    assert torch.equal(losses, expected)
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b)


def test_a_teacher_alone_judges_with_its_students() -> None:
    models = networks(3)
    x, y = rows_of(1)
    with torch.no_grad():
        own = [copy.deepcopy(m)(x) for m in models[1:]]
        lesson = copy.deepcopy(models[0]).eval()(x)
    ce = [F.cross_entropy(z, y, reduction="none") for z in own]
    joint = sum(c + 0.5 * kl_rows(lesson, z) for c, z in zip(ce, own, strict=True))
    assert isinstance(joint, Tensor)
    keep = joint.argsort()[:9]
    engine = engine_of(models, method="distill", kl_weight=0.5, small_loss=0.25)
    result = engine.step(x, y, learners=(1, 2), teacher=0)
    torch.testing.assert_close(result.ce, torch.stack([c[keep].mean() for c in ce]))


class TwoColumns(World):
    """One of two columns of a mesh, which gets the other's joint losses from the test."""

    def __init__(self, column: int, other: float) -> None:
        super().__init__(Launch(), Mesh(1, 2), ((0, 1),))
        self.column = column
        self.other = torch.full((ROWS,), other, dtype=torch.float64)

    def gather_rows(self, mine: Tensor) -> Tensor:
        return torch.cat([self.other, mine] if self.column else [mine, self.other])


@pytest.mark.parametrize("column", [0, 1])
def test_the_choice_is_that_of_the_batch_of_all_ranks(column: int) -> None:
    models = networks(2)
    x, y = rows_of(2)
    kept = {}
    for name, value in (("easy", 0.0), ("hard", 1e9)):
        world = TwoColumns(column, value)
        copies = copy.deepcopy(models)
        engine = Engine(Cohort([student(m) for m in copies], world), small_loss=0.5)
        kept[name] = engine.step(x, y).kept.tolist()
    assert kept == {"easy": [0, 0], "hard": [12, 12]}


REFUSED = [
    ({"small_loss": 1.0}, r"small_loss is 1\.0"),
    ({"small_loss": -0.1}, r"small_loss is -0\.1"),
    ({"small_loss": math.nan}, r"small_loss is nan"),
    ({"small_loss": 0.2, "method": "independent"}, r"independent: give dml with a kl_weight of 0"),
    ({"small_loss": 0.2, "method": "dml_e"}, r"dml_e: give dml"),
    ({"small_loss": 0.2, "update": "alternating"}, r"alternating: give simultaneous"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_means_nothing_beside_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(networks(2), **options)


def test_blended_labels_are_refused() -> None:
    engine = engine_of(networks(2), small_loss=0.2)
    x, y = rows_of(0)
    with pytest.raises(UserError, match="small_loss is for rows of one class"):
        engine.step(x, F.one_hot(y, 5).double())
