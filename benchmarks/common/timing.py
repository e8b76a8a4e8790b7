"""Times of contestants that take turns, on a CPU or a CUDA device, and what a copy takes there.

Other work on the machine affects all contestants alike, so ratios of their medians mean something
where absolute times do not. Each round has a new random order, because caches and the heap depend
on what ran before. Results are freed after the clock has stopped.

On CUDA the device must never wait for the host inside a measured interval, or the host is what is
measured. So the device first sleeps until the host has queued the whole call; a reading says
whether that succeeded.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.common.device import Call, Captured, Cuda, Device

COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # far beyond the caches
ROUNDS = {"cuda": (15, 400), "cpu": (5, 400)}  # fewest and most
GRAPH_CALLS = 20, 200
WARM_UP = 3
ATTEMPTS = 3
SHORTEST_SLEEP_MS, LONGEST_SLEEP_MS = 0.2, 400.0

Key = TypeVar("Key", bound=Hashable)


class Reading(NamedTuple):
    """The time of one call.

    Attributes:
        ms: what the stopwatch measures.
        host_ms: on CUDA, what the host took to queue the call.
        hidden: whether the device was still asleep when the host had queued all of it. Otherwise
            ``ms`` may contain waiting for the host.
    """

    ms: float
    host_ms: float | None = None
    hidden: bool | None = None


Stopwatch = Callable[[Call], Reading]


@dataclass(frozen=True)
class Turn:
    """One contestant of `interleaved`."""

    call: Call
    after: Call | None = None
    """Runs after each call, untimed: puts back what the call destroyed."""
    stopwatch: Stopwatch | None = None
    """Its own, in place of the others' one."""


def thread_time(call: Call) -> Reading:
    """Measure CPU time of this thread, without the time that others had the core.

    Only for work on one thread. Autograd runs a CPU's backward in the thread that calls it.
    """
    start = time.thread_time_ns()
    kept = call()
    taken = time.thread_time_ns() - start
    del kept
    return Reading(taken / 1e6)


def wall_time(call: Call) -> Reading:
    """Measure wall-clock time."""
    start = time.perf_counter_ns()
    kept = call()
    taken = time.perf_counter_ns() - start
    del kept
    return Reading(taken / 1e6)


@dataclass
class DeviceTime:
    """A stopwatch of CUDA events: the device's time for a call, without any of the host's.

    Before each call the device sleeps for twice as long as the host took for that call the last
    time, so all of the call is queued before the device begins with it. If the host is slower than
    that, the reading is repeated with a longer sleep. Two kinds of calls cannot be hidden: those
    that read values of the device on the host, and those of more launches than the device's queue
    holds (about a thousand). Their readings say ``hidden=False``.

    Attributes:
        cold: empty the L2 cache first.
        device: tests put another one here.
    """

    cold: bool
    device: Device = field(default_factory=lambda: Cuda())
    _host_ms: dict[Call, float] = field(default_factory=dict, init=False)
    _exposed: set[Call] = field(default_factory=set, init=False)  # those that cannot be hidden

    def __call__(self, call: Call) -> Reading:
        host_ms = self._host_ms.get(call)
        if host_ms is None:
            host_ms = self._host_ms[call] = self._learn(call)
        sleep_ms = max(SHORTEST_SLEEP_MS, 2 * host_ms)
        for _ in range(1 if call in self._exposed else ATTEMPTS):
            reading = self._read(call, min(sleep_ms, LONGEST_SLEEP_MS))
            if reading.hidden:
                assert reading.host_ms is not None
                self._host_ms[call] = reading.host_ms
                self._exposed.discard(call)
                return reading
            sleep_ms *= 2
        self._exposed.add(call)
        return reading

    def _learn(self, call: Call) -> float:
        call()  # may compile, or set up a library
        self.device.wait()
        begun = self.device.clock_ms()
        kept = call()
        taken = self.device.clock_ms() - begun
        self.device.wait()
        del kept
        return taken

    def _read(self, call: Call, sleep_ms: float) -> Reading:
        device = self.device
        start, end = device.event(), device.event()
        device.wait()
        device.sleep(sleep_ms)
        if self.cold:
            device.flush()
        start.record()
        begun = device.clock_ms()
        kept = call()
        host_ms = device.clock_ms() - begun
        end.record()
        hidden = not start.query()
        end.synchronize()
        del kept
        return Reading(float(start.elapsed_time(end)), host_ms, hidden)


def back_to_back(repeats: int) -> Stopwatch:
    """A stopwatch of the wall: calls queue up, one wait at the end, per call.

    What an eager program pays: the device's time or the host's, whichever is longer.
    """

    def stopwatch(call: Call) -> Reading:
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return Reading((time.perf_counter_ns() - start) / 1e6 / repeats)

    return stopwatch


def repeated(call: Call, times: int) -> Call:
    """Return a call that makes that many in a row; the result is the last one's."""

    def calls() -> object:
        for _ in range(times):
            kept = call()
        return kept

    return calls


class InGraphs(NamedTuple):
    """One contestant in CUDA graphs.

    Attributes:
        ms: per call, from each round: the slope between graphs of 20 and of 200 calls, which
            leaves out the launch of the graph.
        nodes: per call: kernels, copies and fills of memory.
    """

    ms: list[float]
    nodes: float | None


def in_graphs(
    calls: Mapping[str, Call], budget_s: float, device: Device | None = None
) -> tuple[dict[str, InGraphs], dict[str, str]]:
    """Time calls in CUDA graphs, taking turns; and say which cannot be captured, and why.

    The inputs come from the cache, as in training, where the network's last layer has just written
    them.
    """
    device = device or Cuda()
    few, many = GRAPH_CALLS
    graphs: dict[tuple[str, int], Captured] = {}
    refusals = {}
    for name, call in calls.items():
        try:
            device.warm_up(call, WARM_UP)
            found = {(name, n): device.capture(call, n) for n in GRAPH_CALLS}
        except RuntimeError as error:
            refusals[name] = str(error).splitlines()[0]
        else:
            graphs |= found
    turns = {key: Turn(graph.replay) for key, graph in graphs.items()}
    stopwatch = DeviceTime(cold=False, device=device)
    samples = interleaved(turns, stopwatch, budget_s, ROUNDS["cuda"])
    timed = {}
    for name in (name for name in calls if name not in refusals):
        pairs = zip(samples[name, few], samples[name, many], strict=True)
        slopes = [(b.ms - a.ms) / (many - few) for a, b in pairs]
        counts = [graphs[name, n].nodes for n in GRAPH_CALLS]
        nodes = None if None in counts else (counts[1] - counts[0]) / (many - few)  # type: ignore[operator]
        timed[name] = InGraphs(slopes, nodes)
    return timed, refusals


def interleaved(
    turns: Mapping[Key, Turn],
    stopwatch: Stopwatch,
    budget_s: float,
    rounds: tuple[int, int] = ROUNDS["cpu"],
    warm_up: int = WARM_UP,
) -> dict[Key, list[Reading]]:
    """The readings of every call, as many rounds as fit into the budget.

    Args:
        turns: the contestants.
        stopwatch: times one call of those that have none of their own.
        budget_s: about how long it may take, the warm-up included.
        rounds: the fewest and the most, whatever the budget.
        warm_up: rounds before, which do not count.
    """
    if not turns:
        return {}
    order = random.Random(0)
    samples: dict[Key, list[Reading]] = {name: [] for name in turns}

    def one_round() -> None:
        for name in order.sample(list(turns), len(turns)):
            turn = turns[name]
            samples[name].append((turn.stopwatch or stopwatch)(turn.call))
            if turn.after is not None:
                turn.after()

    start = time.perf_counter()
    for _ in range(warm_up):
        one_round()
    round_s = (time.perf_counter() - start) / warm_up
    for taken in samples.values():
        taken.clear()
    fewest, most = rounds
    for _ in range(max(fewest, min(most, int(budget_s / round_s) - warm_up))):
        one_round()
    return samples


def figures(readings: Sequence[Reading], calls: int = 1) -> dict[str, Any]:
    """Return what a report says of a contestant's readings.

    Args:
        readings: of all rounds.
        calls: how many calls each of them timed.
    """
    times = [reading.ms / calls for reading in readings]
    found: dict[str, Any] = {"median_ms": statistics.median(times), "min_ms": min(times)}
    hosts = [reading.host_ms / calls for reading in readings if reading.host_ms is not None]
    if hosts:
        found["host_ms"] = statistics.median(hosts)
        found["hidden"] = sum(bool(reading.hidden) for reading in readings) / len(readings)
    return found


def copy_gb_per_s(device: torch.device, stopwatch: Stopwatch, repeats: int = 10) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written, from the median time.

    Args:
        device: a CPU or a CUDA device.
        stopwatch: the one that the contestants are timed with.
        repeats: copies.
    """
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    copy()  # page faults and the like
    taken_ms = statistics.median(stopwatch(copy).ms for _ in range(repeats))
    return 2 * source.nbytes / taken_ms / 1e6
