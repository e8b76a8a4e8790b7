"""Streams and the graph without a GPU: the order of forks and joins, and equal numbers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import CPU, assert_same, batch, engine_of, networks, student
from fake_streams import FakeStreams
from state_cases import assert_equal, cohort, state_of
from torch import Tensor, nn

from dml_fast.engine import Engine
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.executor import Executor, Sequential
from dml_fast.engine.graph import WARM_UP, Graph
from dml_fast.engine.snapshot import Snapshot
from dml_fast.engine.streams import Streams
from dml_fast.engine.student import Student


@pytest.fixture(autouse=True)
def audible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)


def graph_engine(made: Cohort, **options: Any) -> tuple[Engine, FakeStreams]:
    layer = FakeStreams(made)
    return Engine(made, executor=Graph(CPU, layer), **options), layer


def forks(events: list[tuple[Any, ...]]) -> list[list[int]]:
    """Check that each fork opens and closes as it must; return the streams of each."""
    found: list[list[int]] = []
    position = 0
    while position < len(events):
        opened: list[int] = []
        while position < len(events) and events[position][0] == "wait":
            _, side, main = events[position]
            if events[position + 1] != ("on", side):
                break
            assert main == 0 or main not in opened, "a fork from a side stream"
            assert events[position + 2] == ("off", side)
            opened.append(side)
            position += 3
        joined = events[position : position + len(opened)]
        assert joined == [("wait", 0, side) for side in opened], "each fork is joined, in full"
        position += len(opened)
        found.append(opened)
        assert opened
    return found


def test_a_step_forks_twice_and_joins_twice_on_one_stream_a_student() -> None:
    layer = FakeStreams()
    engine = Engine(cohort(), executor=Streams(CPU, layer))
    x, y = batch(0, torch.float32)
    engine.step(x, y)
    engine.step(x, y)
    new = [event for event in layer.events if event[0] == "new"]
    assert new == [("new", 1), ("new", 2), ("new", 3)]
    rest = [event for event in layer.events if event[0] != "new"]
    assert forks(rest) == [[1, 2, 3]] * 4


def test_students_keep_their_streams_when_others_learn() -> None:
    layer = FakeStreams()
    engine = Engine(cohort(), method="distill", executor=Streams(CPU, layer))
    x, y = batch(0, torch.float32)
    engine.step(x, y, learners=(0,))
    engine.step(x, y, learners=(1, 2), teacher=0)
    rest = [event for event in layer.events if event[0] != "new"]
    assert forks(rest) == [[1], [1], [2, 3], [2, 3]]


def test_a_failing_student_leaves_no_fork_open() -> None:
    layer = FakeStreams()
    students = [student(m) for m in networks(3)]

    def work(k: int) -> None:
        if k == 1:
            raise ValueError("student 1")

    with pytest.raises(ValueError, match="student 1"):
        Streams(CPU, layer).fork(students, work)
    assert layer.events[-2:] == [("wait", 0, 1), ("wait", 0, 2)]
    assert layer.current() == 0


def test_what_a_side_stream_reads_lives_until_the_join(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    layer = FakeStreams()
    engine = Engine(cohort(), executor=Streams(CPU, layer))
    given: list[weakref.ref[Tensor]] = []
    backward = Student.backward

    def watched(self: Student, logits: Tensor, grad: Tensor, *rest: Any) -> None:
        given.extend((weakref.ref(logits), weakref.ref(grad)))
        backward(self, logits, grad, *rest)

    wait = layer.wait
    joins = 0

    def waiting(waiter: int, other: int) -> None:
        nonlocal joins
        if waiter == 0 and given:  # the join of the second fork
            joins += 1
            assert all(ref() is not None for ref in given)
        wait(waiter, other)

    monkeypatch.setattr(Student, "backward", watched)
    monkeypatch.setattr(layer, "wait", waiting)
    engine.step(*batch(0, torch.float32))
    assert joins == 3 and len(given) == 6


def test_the_graph_is_warmed_up_on_the_streams_that_it_is_captured_on() -> None:
    engine, layer = graph_engine(cohort())
    x, y = batch(0, torch.float32)
    engine.step(x, y)
    kinds = [event[0] for event in layer.events]
    start = layer.events.index(("capture", 1))
    before = [e for e in layer.events[:start] if e[0] == "on"]
    inside = [e for e in layer.events[start : kinds.index("captured")] if e[0] == "on"]
    one_step = [("on", k) for k in (2, 3, 4, 2, 3, 4)]
    assert before == [("on", 1), *one_step * WARM_UP]
    assert inside == [("on", 1), *one_step]
    waits = [e[1:] for e in layer.events[start : kinds.index("captured")] if e[0] == "wait"]
    assert waits == 2 * [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4)]
    assert layer.events[-1] == ("replay", 1)
    here = [e for e in layer.events[:start] if e[0] == "wait"]
    assert here[0] == ("wait", 1, 0) and here[-1] == ("wait", 0, 1)
    engine.step(x, y)
    assert kinds.count("capture") == 1
    assert layer.events[-2:] == [("replay", 1)] * 2


@pytest.mark.parametrize(
    ("arch", "dtype", "ema", "optimizer"),
    [
        ("resnet8", None, 0.0, "sgd"),
        ("resnet8", None, 0.0, "adamw"),
        ("wrn_10_1_drop0.3", torch.bfloat16, 0.9, "sgd"),
    ],
)
@pytest.mark.parametrize("kind", [Streams, Graph])
def test_the_numbers_are_those_of_sequential_from_step_0(
    kind: Any, arch: str, dtype: Any, ema: float, optimizer: str
) -> None:
    results = []
    for executor in (Sequential, kind):
        made = cohort(arch=arch, optimizer=optimizer, dtype=dtype, ema=ema)
        chosen: Executor = executor() if executor is Sequential else kind(CPU, FakeStreams(made))
        engine = Engine(made, executor=chosen, teach_with="ema" if ema else "student")
        torch.manual_seed(11)
        losses = []
        for step in range(5):
            x, y = batch(step, torch.float32)
            if step == 3:  # a short batch
                x, y = x[:4], y[:4]
            for one in made:
                one.set_lr(0.02 * (step + 1))
            result = engine.step(x, y, kl_scale=0.2 * step)
            losses.append(torch.stack([result.losses, result.kl, result.correct.float()]))
        results.append((losses, made, torch.rand(2)))
    (expected, reference, draw), (found, made, other_draw) = results
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)  # the weight is a tensor in a graph
    assert torch.equal(draw, other_draw)
    for mine, theirs in zip(made, reference, strict=True):
        assert_same(mine.model, theirs.model, 1e-6)
        if ema:
            assert_same(mine.network("ema"), theirs.network("ema"), 1e-6)


@pytest.mark.parametrize("kind", [Streams, Graph])
def test_steps_on_several_labels_are_those_of_sequential(kind: Any) -> None:
    results = []
    for executor in (Sequential, kind):
        made = cohort()
        chosen: Executor = executor() if executor is Sequential else kind(CPU, FakeStreams(made))
        engine = Engine(made, executor=chosen, distribution="bernoulli", temperature=2.0)
        found = []
        for seed in range(4):
            x, y = batch(seed, torch.float32)
            labels = torch.nn.functional.one_hot((y + seed) % 5, 5)
            labels[:, 0] = 1
            found.append(engine.step(x, labels.float() if seed % 2 else labels))
        results.append(torch.stack([step.losses for step in found]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [Streams, Graph])
def test_the_rows_that_are_left_out_follow_the_ramp_in_a_graph(kind: Any) -> None:
    results, kept = [], []
    for executor in (Sequential, kind):
        made = cohort()
        chosen: Executor = executor() if executor is Sequential else kind(CPU, FakeStreams(made))
        engine = Engine(made, executor=chosen, small_loss=0.5, prior=torch.arange(5.0).neg())
        steps = [
            engine.step(*batch(step, torch.float32), small_loss_scale=step / 3) for step in range(4)
        ]
        results.append(torch.stack([step.losses for step in steps]))
        kept.append([step.kept[0].item() for step in steps])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert kept == [[6, 5, 4, 3]] * 2


def test_views_of_their_own_and_results_that_stay() -> None:
    made, reference = cohort(2), cohort(2)
    engine, _ = graph_engine(made)
    plain = Engine(reference)
    kept = []
    for step in range(3):
        views = [batch(2 * step + k, torch.float32)[0] for k in range(2)]
        y = batch(step)[1]
        mine, theirs = engine.step(views, y, views=True), plain.step(views, y, views=True)
        kept.append((mine.losses, theirs.losses.clone()))
    for mine, theirs in kept:
        torch.testing.assert_close(mine, theirs)


def test_one_view_and_then_two_is_another_shape(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine, _ = graph_engine(cohort(2))
    x, y = batch(0, torch.float32)
    engine.step(x, y)
    engine.step([x, x.clone()], y, views=True)
    engine.step([x, x.clone()], y, views=True)
    assert caplog.text.count("differs in shape from the first: such steps run eagerly") == 1


class Pair(nn.Module):
    """A network of images and what to add to their logits, in one object."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        out: Tensor = self.body(inputs["pair"][0]) + inputs["pair"][1] * inputs["factor"]
        return out


def test_structured_inputs_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    models = [Pair(model) for model in networks(2, torch.float32)]
    plain = engine_of(copy.deepcopy(models))
    engine, layer = graph_engine(Cohort([student(model) for model in models]))

    def step(seed: int, factor: Any) -> None:
        x, y = batch(seed, torch.float32)
        shift = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        inputs = {"pair": (x, shift), "factor": factor}
        mine, theirs = engine.step(inputs, y), plain.step(inputs, y)
        torch.testing.assert_close(mine.losses, theirs.losses)

    for seed in range(3):
        step(seed, 2.0)
    assert [e[0] for e in layer.events].count("replay") == 3
    assert "eagerly" not in caplog.text
    step(3, 3.0)  # a constant of the graph
    assert caplog.text.count("differs in shape from the first: such steps run eagerly") == 1
    step(4, np.float32(3.0))
    assert "the inputs hold 3.0, which a graph cannot copy" in caplog.text
    assert [e[0] for e in layer.events].count("replay") == 3


def test_new_roles_and_loaded_states_are_captured_anew() -> None:
    made = cohort()
    engine, layer = graph_engine(made, method="distill")
    x, y = batch(0, torch.float32)
    engine.step(x, y, learners=(0,))
    engine.step(x, y, learners=(0,))
    assert [e[0] for e in layer.events].count("capture") == 1
    engine.step(x, y, learners=(1, 2), teacher=0)
    assert [e[0] for e in layer.events].count("capture") == 2
    made.load_state_dict(state_of(made))
    engine.step(x, y, learners=(1, 2), teacher=0)
    assert [e[0] for e in layer.events].count("capture") == 3


def test_what_cannot_be_captured_runs_eagerly_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    made, reference = cohort(2), cohort(2)
    engine, layer = graph_engine(made)
    layer.refuse = True
    plain = Engine(reference)
    for seed in range(3):
        x, y = batch(seed, torch.float32)
        assert torch.equal(engine.step(x, y).losses, plain.step(x, y).losses)
    assert caplog.text.count("cannot be captured (operation not permitted") == 1
    for mine, theirs in zip(made, reference, strict=True):
        assert_same(mine.model, theirs.model)


def test_a_norm_that_asks_the_device_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, momentum=None))]
    engine = engine_of(models, method="independent")
    layer = FakeStreams(engine.cohort)
    engine.executor = Graph(CPU, layer)
    engine.step(*batch(0, torch.float32))
    assert ("replay", 1) not in layer.events
    assert "student 0 has a BatchNorm with momentum=None" in caplog.text


@pytest.mark.parametrize(("optimizer", "dtype"), [("sgd", None), ("adamw", torch.float16)])
def test_a_snapshot_puts_back_every_bit_in_place(optimizer: str, dtype: Any) -> None:
    made = cohort(arch="wrn_10_1_drop0.3", optimizer=optimizer, dtype=dtype, ema=0.9)
    engine = Engine(made)
    for step in range(2):  # before anything has run, and in the middle
        before, rng = state_of(made), torch.get_rng_state()
        snapshot = Snapshot(made)
        if step:
            places = [p.data_ptr() for s in made for p in (*s.parameters, *s.model.buffers())]
        for seed in range(3):
            engine.step(*batch(seed, torch.float32))
        snapshot.restore()
        assert torch.equal(torch.get_rng_state(), rng)
        after = state_of(made)
        if step:
            assert_equal(after, before)
            assert places == [
                p.data_ptr() for s in made for p in (*s.parameters, *s.model.buffers())
            ]
        engine.step(*batch(9, torch.float32))


def test_a_run_after_an_undone_trial_is_the_run_without_one() -> None:
    results = []
    for trial in (False, True):
        made = cohort(optimizer="adamw", arch="wrn_10_1_drop0.3")
        engine = Engine(made)
        torch.manual_seed(5)
        if trial:
            snapshot = Snapshot(made)
            engine.step(*batch(0, torch.float32))
            snapshot.restore()
        losses = [engine.step(*batch(seed, torch.float32)).losses for seed in range(3)]
        results.append((torch.stack(losses), state_of(made)))
    assert_equal(list(results[0]), list(results[1]))
