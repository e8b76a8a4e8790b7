"""The choice of an executor: by name, or by a trial that leaves no trace; runs remember it."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import CPU, assert_same, batch, engine_of, networks
from resume_cases import SHORT, digest, train
from state_cases import assert_equal, cohort, state_of
from torch import Tensor

from dml_fast.config import TrainConfig
from dml_fast.engine import Engine
from dml_fast.engine import choice as executor_choice
from dml_fast.engine.choice import candidates, check_executor, make_executor, pick
from dml_fast.engine.executor import Sequential
from dml_fast.engine.threads import Threads, intra_op_threads
from dml_fast.errors import UserError
from dml_fast.loss.triplet import TripletLoss
from dml_fast.rng import cpu_position
from dml_fast.runs.folder import Run


class Clock:
    """Moves on while a `Slow` runs, and a little per look: the machine's load decides nothing."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


class Slow(Sequential):
    """Takes that many seconds of a clock per step."""

    def __init__(self, name: str, seconds: float, clock: Clock) -> None:
        self.name, self.seconds, self.clock = name, seconds, clock

    def run(self, *args: Any) -> Any:
        self.clock.now += self.seconds
        return super().run(*args)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(executor_choice, "time", made)
    return made


@pytest.fixture(autouse=True)
def audible(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("name", ["streams", "graph"])
def test_an_executor_for_a_gpu_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(UserError, match=f"^executor is {name} and the device is cpu: give auto"):
        make_executor(name, 2, CPU)
    with pytest.raises(UserError, match="threads and the device is cuda:0"):
        check_executor("threads", torch.device("cuda:0"))


def test_names_give_executors() -> None:
    assert [type(make_executor(n, 2, CPU)) for n in ("auto", "sequential", "threads")] == [
        Sequential,
        Sequential,
        Threads,
    ]


def test_only_what_can_gain_is_tried() -> None:
    engine = engine_of(networks(3, torch.float32))
    with intra_op_threads(1):
        assert [c.name for c in candidates(engine, 3, CPU)] == ["sequential"]
    with intra_op_threads(2):
        assert [c.name for c in candidates(engine, 3, CPU)] == ["sequential", "threads"]
        assert [c.name for c in candidates(engine, 1, CPU)] == ["sequential"]
        engine.update = "alternating"
        assert [c.name for c in candidates(engine, 3, CPU)] == ["sequential"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((0.03, 0.01), "second"), ((0.01, 0.03), "first"), ((0.0149, 0.01), "first")],
)
def test_the_fastest_is_picked_and_noise_does_not_choose(
    seconds: tuple[float, float],
    expected: str,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(executor_choice, "TRIAL_S", 0.3)
    monkeypatch.setattr(executor_choice, "GAIN", 1.5)
    engine = engine_of(networks(2, torch.float32))
    options = [Slow(name, s, clock) for name, s in zip(("first", "second"), seconds, strict=True)]
    x, y = batch(0, torch.float32)
    chosen = pick(engine, x, y, learners=(0, 1), options=options)
    assert chosen.name == expected
    assert engine.executor is chosen
    assert caplog.text.count(f"executor: {expected}, picked among first") == 1


@pytest.mark.parametrize("arch", ["resnet8", "wrn_10_1_drop0.3"])
def test_a_trial_leaves_no_trace(arch: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_choice, "TRIAL_S", 0.1)
    results = []
    for trial in (False, True):
        made = cohort(arch=arch, optimizer="sgd")
        engine = Engine(made, executor=Threads(3, workers=3, threads_each=1))
        torch.manual_seed(2)
        if trial:
            before, generators = state_of(made), cpu_position()
            options = [engine.executor, Slow("other", 0.04, clock)]
            pick(engine, *batch(0, torch.float32), learners=(0, 1, 2), options=options)
            engine.executor = options[0]
            assert_equal(state_of(made), before)
            assert cpu_position() == generators
        losses = [engine.step(*batch(seed, torch.float32)).losses for seed in range(3)]
        results.append([torch.stack(losses), state_of(made)])
    assert_equal(results[0], results[1])


@pytest.mark.slow
def test_a_run_remembers_what_was_picked_and_may_go_on_with_another(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def slow_sequential(engine: Engine, learners: int, device: torch.device) -> list[Any]:
        return [Slow("sequential", 0.2, clock), Threads(2, workers=2, threads_each=1)]

    monkeypatch.setattr(executor_choice, "candidates", slow_sequential)
    config = TrainConfig(**SHORT, cohort=2)
    folder = tmp_path / "run"
    assert not train(folder, config, steps=3)
    assert json.loads((folder / "config.json").read_text())["config"]["executor"] == "threads"
    monkeypatch.setattr(executor_choice, "candidates", None)  # no second trial
    resumed = Run(folder).config
    assert resumed.executor == "threads"
    assert not train(folder, resumed, steps=6, resume=True)
    another = replace(resumed, executor="sequential")
    assert train(folder, another, resume=True)
    assert capsys.readouterr().err.count("executor: threads") == 1

    plain = TrainConfig(**SHORT, cohort=2, executor="sequential")
    assert train(tmp_path / "plain", plain)
    assert digest(folder) == digest(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("embed", [False, True])
def test_compiled_students_share_their_code_and_compute_the_same(
    embed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = 0

    def backend(module: Any, inputs: list[Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    from training_cases import cohort_of
    from training_cases import train as run

    extra = {"feature_loss": TripletLoss(), "feature_weight": 0.5}
    options: dict[str, Any] = extra if embed else {}
    plain = cohort_of(["resnet8"] * 3, embed=embed)
    made = cohort_of(["resnet8"] * 3, embed=embed)
    for one in made:
        one.compile()
    with intra_op_threads(1):
        expected = run(Engine(plain, **options), 3)
        executor = Threads(3, workers=3, threads_each=1)
        found = run(Engine(made, executor=executor, **options), 3)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for mine, theirs in zip(made, plain, strict=True):
        assert_same(mine.model, theirs.model)
    assert compiled == 1
