"""Students whose inputs differ in shape: every executor, the trial and the compiler take them."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from engine_cases import CPU, assert_same, optimizer_of, student
from fake_streams import FakeStreams
from torch import Tensor

from dml_fast.engine import Cohort, Engine, Precision, Student
from dml_fast.engine.choice import pick
from dml_fast.engine.executor import Sequential
from dml_fast.engine.graph import Graph
from dml_fast.engine.streams import Streams
from dml_fast.engine.threads import Threads, intra_op_threads
from dml_fast.models import InputSpec, create_model

SIZES = (5, 3, 7)


def cohort(dropout: str = "") -> Cohort:
    students = []
    for k, size in enumerate(SIZES):
        torch.manual_seed(k)
        model = create_model(f"mlp_8{dropout}", num_classes=4, inputs=InputSpec("vector", (size,)))
        students.append(Student(model, optimizer_of(model, "sgd"), Precision(CPU), f"view {k}"))
    return Cohort(students)


def batch(seed: int, rows: int = 6) -> tuple[tuple[Tensor, ...], Tensor]:
    g = torch.Generator().manual_seed(seed)
    views = tuple(torch.randn(rows, size, generator=g) for size in SIZES)
    return views, torch.randint(4, (rows,), generator=g)


def losses(engine: Engine, steps: int = 4) -> Tensor:
    torch.manual_seed(9)
    found = []
    for step in range(steps):
        views, target = batch(step)
        found.append(engine.step(views, target, views=True).losses.clone())
    return torch.stack(found)


@pytest.mark.parametrize("dropout", ["", "_drop0"])
@pytest.mark.parametrize("name", ["threads", "streams", "graph"])
def test_executors_give_what_sequential_gives(
    name: str, dropout: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    caplog.set_level(logging.INFO)
    with intra_op_threads(1):
        made, reference = cohort(dropout), cohort(dropout)
        layer = FakeStreams(made)
        executor: Any = {
            "threads": lambda: Threads(3, workers=3, threads_each=1),
            "streams": lambda: Streams(CPU, layer),
            "graph": lambda: Graph(CPU, layer),
        }[name]()
        found = losses(Engine(made, executor=executor))
        torch.testing.assert_close(found, losses(Engine(reference)), rtol=1e-6, atol=1e-7)
        if name == "threads":
            for mine, theirs in zip(made, reference, strict=True):
                assert_same(mine.model, theirs.model)
        if name == "graph":
            assert [event[0] for event in layer.events].count("replay") == 4
            assert "eagerly" not in caplog.text


def test_a_trial_takes_them() -> None:
    engine = Engine(cohort())
    options = [Sequential(), Threads(3, workers=3, threads_each=1)]
    views, target = batch(0)
    before = [s.weights() for s in engine.cohort]
    pick(engine, views, target, learners=(0, 1, 2), views=True, options=options)
    for now, then in zip(engine.cohort, before, strict=True):
        assert all(torch.equal(then[name], t) for name, t in now.weights().items())


def test_the_compiler_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is compiled once; three students of three sizes need three."""
    compiled: list[Any] = []

    def backend(module: Any, inputs: list[Tensor]) -> Any:
        compiled.append(inputs)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    made = cohort("_drop0")
    for one in made:
        one.compile()
    torch.testing.assert_close(losses(Engine(made)), losses(Engine(cohort("_drop0"))))
    assert len(compiled) == 3


def test_a_frozen_teacher_reads_its_own_view() -> None:
    engine = Engine(cohort(), method="distill")
    views, target = batch(0)
    result = engine.step(views, target, views=True, learners=(1, 2), teacher=0)
    assert result.kl.shape == (2,) and (result.kl > 0).all()


def test_an_image_and_a_vector_teach_each_other() -> None:
    torch.manual_seed(0)
    image = create_model("resnet8", num_classes=4, in_channels=1, image_size=8)
    vector = create_model("mlp_8", num_classes=4, inputs=InputSpec("vector", (5,)))
    engine = Engine(Cohort([student(image), student(vector)]))
    dtype = next(image.parameters()).dtype
    inputs = [torch.randn(6, 1, 8, 8, dtype=dtype), torch.randn(6, 5, dtype=dtype)]
    result = engine.step(inputs, torch.arange(6) % 4, views=True)
    assert (result.kl > 0).all() and not result.skipped.any()
