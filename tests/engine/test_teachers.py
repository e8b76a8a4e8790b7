"""Fixed teachers: heard beside the peers, in every executor, and never changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, assert_same, batch, engine_of, networks, sgd, student
from fake_streams import FakeStreams
from torch import Tensor, nn

from dml_fast.engine import Cohort, Engine, Executor, Graph, Precision, Streams, Teacher, Threads
from dml_fast.engine.threads import intra_op_threads
from dml_fast.errors import UserError

STEPS = 4


def halved(x: Tensor) -> Tensor:
    """Stands for another normalisation."""
    return 0.5 * x


def teachers(count: int, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    torch.manual_seed(2)
    models = networks(count + 2, dtype)[2:]  # others than the students
    for model in models:  # running statistics that differ from a batch's
        model.train()(torch.randn(8, 1, 8, 8, dtype=dtype))
    return models


def of(models: list[nn.Module]) -> list[Teacher]:
    return [Teacher(m, Precision(CPU), prepare=halved if k else None) for k, m in enumerate(models)]


def plain(models: list[nn.Module], fixed: list[nn.Module], method: str) -> list[Tensor]:
    """Train as the definition says, at T = 2; return the last step's mutual terms."""
    optimizers = [sgd(m) for m in models]
    for step in range(STEPS):
        x, y = batch(step)
        logits, terms = [m(x) for m in models], []
        with torch.no_grad():
            said = [m.eval()(halved(x) if k else x) for k, m in enumerate(fixed)]
        for k, z in enumerate(logits):
            others = [z.detach() for j, z in enumerate(logits) if j != k] + said
            p = torch.stack([(t / 2).softmax(-1) for t in others])
            if method == "dml_e":
                p = p.mean(0, keepdim=True)
            own = (z / 2).log_softmax(-1)
            kl = 4 * sum(F.kl_div(own, q, reduction="batchmean") for q in p) / len(p)
            terms.append(kl.detach())
            (F.cross_entropy(z, y) + kl).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return terms


@pytest.mark.parametrize("method", ["dml", "dml_e"])
@pytest.mark.parametrize(("students", "count"), [(1, 1), (2, 2)])
def test_the_other_students_and_all_teachers_count_the_same(
    students: int, count: int, method: str
) -> None:
    models, fixed = networks(students), teachers(count)
    expected, before = copy.deepcopy(models), copy.deepcopy(fixed)
    terms = plain(expected, fixed, method)
    engine = engine_of(models, teachers=of(fixed), temperature=2.0, method=method)
    for step in range(STEPS):
        result = engine.step(*batch(step))
    for a, b in zip(models, expected, strict=True):
        assert_same(a, b, 1e-9)
    for a, b in zip(fixed, before, strict=True):
        assert_same(a, b)
    torch.testing.assert_close(result.kl, torch.stack(terms))


EXECUTORS: dict[str, Any] = {
    "threads": lambda made: Threads(2, workers=2, threads_each=1),
    "streams": lambda made: Streams(CPU, FakeStreams(made)),
    "graph": lambda made: Graph(CPU, FakeStreams(made)),
}


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("count", [3])
def test_every_executor_gives_the_numbers_of_sequential(name: str, count: int) -> None:
    def trained(make: Any) -> tuple[list[nn.Module], Tensor]:
        models = networks(2, torch.float32)
        made = Cohort([student(m) for m in models])
        chosen: Executor | None = make(made) if make else None
        engine = Engine(made, teachers=of(teachers(count, torch.float32)), executor=chosen)
        with intra_op_threads(2 if name == "threads" and make else 1):
            losses = [engine.step(*batch(s, torch.float32)).losses for s in range(STEPS)]
        return models, torch.stack(losses)

    expected, losses = trained(None)
    found, same = trained(EXECUTORS[name])
    tolerance = 1e-6 if name == "graph" else 0.0  # the weight is a tensor in a graph
    torch.testing.assert_close(same, losses, rtol=tolerance, atol=tolerance)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, tolerance)


def test_a_teacher_has_a_stream_of_its_own() -> None:
    layer = FakeStreams()
    made = Cohort([student(m) for m in networks(2, torch.float32)])
    engine = Engine(made, teachers=of(teachers(1, torch.float32)), executor=Streams(CPU, layer))
    engine.step(*batch(0, torch.float32))
    assert [e[1] for e in layer.events if e[0] == "on"] == [1, 2, 3, 1, 2]


def test_a_teacher_reads_its_view_and_teaches_alternating_students_too() -> None:
    models, (fixed,) = networks(2), teachers(1)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    teacher = Teacher(fixed, Precision(CPU), view=1, prepare=look)
    engine = engine_of(models, teachers=[teacher], update="alternating")
    (x, y), (other, _) = batch(0), batch(1)
    assert (engine.step([x, other], y, views=True).kl > 0).all()
    assert len(seen) == 1 and seen[0] is other


def test_what_cannot_be_a_teacher_is_refused() -> None:
    models, (fixed,) = networks(2), teachers(1)
    teacher = Teacher(fixed, Precision(CPU))
    for options, words in (
        ({"teachers": [fixed]}, r"teacher 0 of an engine is a ResNet.*: give Teacher\("),
        ({"teachers": [teacher], "method": "distill"}, "method is distill, in which fixed"),
        ({"teachers": [Teacher(fixed, Precision(CPU), view=2)]}, "inputs of student 2, and"),
        ({"teachers": [Teacher(models[0], Precision(CPU))]}, "teacher 0 is a student too"),
    ):
        with pytest.raises(UserError, match=words):
            engine_of(models, **options)
    with pytest.raises(UserError, match="the model of a teacher is 3: give a Module"):
        Teacher(3, Precision(CPU))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has a teacher and the engine fixed ones"):
        engine_of(models, teachers=[teacher]).step(*batch(0), learners=[1], teacher=0)
