"""The students' passes as one compiled function: the numbers of passes that are not compiled."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from engine_cases import assert_same
from torch import Tensor
from training_cases import cohort_of, train

from dml_fast.engine import Engine, Sequential
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.engine.threads import Threads, intra_op_threads
from dml_fast.engine.together import Together
from dml_fast.errors import UserError
from dml_fast.loss.triplet import TripletLoss


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the traced functions, which run as they are: inductor would take a minute."""
    found: list[Any] = []

    def backend(module: Any, inputs: list[Tensor]) -> Any:
        found.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    return found


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("features", "parts", "averages")),
    ],
)
def test_compiled_together_they_compute_the_same(case: str, graphs: list[Any]) -> None:
    options: dict[str, Any] = {
        "features": {"feature_loss": TripletLoss(), "feature_weight": 0.5},
        "parts": {"parts": 2},
        "averages": {"teach_with": "ema"},
    }.get(case, {})

    def cohort() -> Cohort:
        return cohort_of(["resnet8"] * 3, embed=case == "features", ema=0.9 * (case == "averages"))

    plain, made = cohort(), cohort()
    made.compile()
    with intra_op_threads(1):
        expected = train(Engine(plain, **options), 2)
        executor = Threads(3, workers=3, threads_each=1) if case == "plain" else Sequential()
        found = train(Engine(made, executor=executor, **options), 2)
    assert len(graphs) == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for mine, theirs in zip(made, plain, strict=True):
        assert_same(mine.model, theirs.model)


def test_a_step_that_is_skipped_leaves_no_trace(graphs: list[Any]) -> None:
    made = cohort_of(["resnet8"] * 2)
    made.compile()
    engine = Engine(made)
    images, target = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    engine.step(images, target)
    before = [{name: t.clone() for name, t in one.model.state_dict().items()} for one in made]
    images[0, 0, 0, 0] = float("nan")
    assert engine.step(images, target).skipped.all()
    for one, saved in zip(made, before, strict=True):
        for name, tensor in one.model.state_dict().items():
            assert torch.equal(tensor, saved[name]), name


def test_those_that_teach_without_learning_are_left_out(graphs: list[Any]) -> None:
    plain, made = cohort_of(["resnet8"] * 3), cohort_of(["resnet8"] * 3)
    made.compile()
    results = [
        train(Engine(one, method="distill"), 1, learners=(1, 2), teacher=0) for one in (plain, made)
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_cannot_be_compiled_together_is_refused() -> None:
    made = cohort_of(["resnet8"] * 2)
    made.compile()
    with pytest.raises(UserError, match="alternating and the students are compiled together"):
        Engine(made, update="alternating")
    there = cohort_of(["resnet8"])
    there.students[0].parameters = [torch.empty(1, device="meta")]
    with pytest.raises(UserError, match="on cpu, meta, and one function"):
        Together([made.students[0], there.students[0]])
    made.students[0].__class__ = type("ReplicatedStudent", (type(made.students[0]),), {})
    with pytest.raises(UserError, match="trained by several processes"):
        made.compile()


@pytest.mark.parametrize("wanted", [True, False])
def test_only_a_gpus_kernels_are_combined_and_only_if_wanted(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cohort_of(["resnet8"] * 2)
    asked: list[dict[str, Any]] = []

    def compile_(passes: Any, **options: Any) -> Any:
        asked.append(options)
        return passes

    monkeypatch.setattr(torch, "compile", compile_)
    images = [torch.randn(8, 3, 16, 16)] * 2
    made.compile(combo_kernels=wanted)
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(type(made.students[0]), "run", lambda student, inputs, features: inputs)
        for student in made:
            student.precision = Precision(torch.device(kind))
        assert made.together is not None
        made.together(made.students, images, features=kind == "cuda")  # another function
    combined = {"options": {"combo_kernels": True}} if wanted else {}
    assert asked == [{"dynamic": False}, {"dynamic": False, **combined}]
