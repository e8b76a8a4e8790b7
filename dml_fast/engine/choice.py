"""Which executor a run uses: the one asked for, or the fastest in a short trial of real steps."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dml_fast.engine.executor import Executor, Sequential
from dml_fast.engine.graph import Graph
from dml_fast.engine.snapshot import Snapshot
from dml_fast.engine.step import Engine
from dml_fast.engine.streams import Streams
from dml_fast.engine.threads import Threads
from dml_fast.errors import UserError, check_choice

logger = logging.getLogger(__name__)

TRIAL_S = 1.5
"""Seconds that a trial may take, if two steps of each executor do not take longer."""
GAIN = 1.05
"""The first candidate is kept unless another is this many times as fast: noise must not choose."""


def check_executor(name: str, device: torch.device) -> None:
    """Refuse an executor that does not exist, or that the device cannot run.

    Raises:
        UserError: it names the executor, and those that can be used.
    """
    check_choice("executor", name, ("auto", "sequential", "threads", "streams", "graph"))
    needs = {"threads": "cpu", "streams": "cuda", "graph": "cuda"}.get(name, device.type)
    if needs != device.type:
        mine = "sequential or threads" if device.type == "cpu" else "sequential, streams or graph"
        raise UserError(f"executor is {name} and the device is {device}: give auto, {mine}")


def make_executor(name: str, cohort: int, device: torch.device) -> Executor:
    """Return the executor of a name; for ``auto`` a sequential one, until `pick` has tried.

    Args:
        name: auto, sequential, threads, streams or graph.
        cohort: how many students this process has.
        device: where they are.

    Raises:
        UserError: the device cannot run it.
    """
    check_executor(name, device)
    if name == "threads":
        return Threads(cohort)
    if name == "streams":
        return Streams(device)
    if name == "graph":
        return Graph(device)
    return Sequential()


def candidates(engine: Engine, learners: int, device: torch.device) -> list[Executor]:
    """Return the executors that may be the fastest, the safest first.

    Args:
        engine: whose steps they would run.
        learners: how many students of this process learn in a step.
        device: where they are.
    """
    found: list[Executor] = [Sequential()]
    world = engine.cohort.world
    if engine.update == "alternating" or engine.cohort.shared_out:
        return found
    if device.type == "cuda":
        found.append(Streams(device))
        return found if world.mesh.data > 1 else [*found, Graph(device)]
    if any(world.all_gather(learners > 1 and torch.get_num_threads() > 1)):
        found.append(Threads(len(engine.cohort)))
    return found


def pick(
    engine: Engine,
    inputs: Any,
    target: Tensor,
    *,
    learners: Sequence[int],
    views: bool = False,
    teacher: int | None = None,
    options: Sequence[Executor] | None = None,
) -> Executor:
    """Try the executors on one batch, keep the fastest in the engine, and say so in the log.

    The steps' effects on weights, statistics, optimizers, scalers and generators are undone.

    Args:
        engine: whose ``executor`` is set.
        inputs: as in `Engine.step`.
        target: as in `Engine.step`.
        learners: as in `Engine.step`.
        views: as in `Engine.step`.
        teacher: as in `Engine.step`.
        options: what to choose from, the preferred one first; by default `candidates`.
    """
    here = [k for k in learners if k in engine.cohort.numbers]
    options = options or candidates(engine, len(here), target.device)
    best = options[0]
    if len(options) > 1:
        snapshot = Snapshot(engine.cohort)

        def step() -> None:
            engine.step(inputs, target, views=views, learners=learners, teacher=teacher)

        times = _try(engine, step, target.device, options)
        snapshot.restore()
        fastest = min(options, key=lambda option: times[option])
        if times[best] > GAIN * times[fastest]:
            best = fastest
        logger.info(
            "executor: %s, picked among %s",
            best,
            ", ".join(f"{option} {1e3 * times[option]:.0f} ms" for option in options)
            + f" per step ({times[options[0]] / times[best]:.2f} times {options[0].name})",
        )
    else:
        logger.info("executor: %s, the only one that can gain anything here", best)
    engine.executor = best
    return best


def _try(
    engine: Engine, step: Callable[[], None], device: torch.device, options: Sequence[Executor]
) -> dict[Executor, float]:
    """Return each one's median seconds per step, without its first, which imports and compiles.

    The executors take turns. Of several processes the slowest counts, so that all choose alike.
    """
    samples: dict[Executor, list[float]] = {option: [] for option in options}
    start = time.perf_counter()
    while True:
        for option in options:
            engine.executor = option
            begun = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[option].append(time.perf_counter() - begun)
        rounds = len(samples[options[0]])
        (spent,) = engine.cohort.world.slowest([time.perf_counter() - start])
        if rounds > 1 and (spent * (rounds + 1) / rounds > TRIAL_S or rounds == 20):
            medians = [statistics.median(samples[option][1:]) for option in options]
            return dict(zip(options, engine.cohort.world.slowest(medians), strict=True))
