"""Times of contestants that take turns, on a CPU or a CUDA device, and what a copy takes there.

Other work on the machine affects all contestants alike, so ratios of their medians mean something
where absolute times do not. Each round has a new random order, because caches and the heap depend
on what ran before. Results are freed after the clock has stopped.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]  # the milliseconds of one call

FLUSH_BYTES = 2**28  # several times the last-level cache of any GPU so far (H200: 60 MB)
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # likewise far beyond the caches


@dataclass(frozen=True)
class Turn:
    """One contestant of `interleaved`."""

    call: Call
    after: Call | None = None
    """Runs after each call, untimed: puts back what the call destroyed."""


def thread_time(call: Call) -> float:
    """Measure CPU time of this thread, without the time that others had the core.

    Only for work on one thread. Autograd runs a CPU's backward in the thread that calls it.
    """
    start = time.thread_time_ns()
    kept = call()
    taken = time.thread_time_ns() - start
    del kept
    return taken / 1e6


def wall_time(call: Call) -> float:
    """Measure wall-clock time."""
    start = time.perf_counter_ns()
    kept = call()
    taken = time.perf_counter_ns() - start
    del kept
    return taken / 1e6


def device_time(cold: bool) -> Stopwatch:
    """A stopwatch of CUDA events: from the device's start on a call to its end.

    Args:
        cold: empty the L2 cache first. By reading: lines written would have to be written back
            during the call. The flush also hides the first 60 microseconds or so in which the
            host prepares the call, so the device's own time is measured; `back_to_back` is for
            the host's.
    """
    flush = torch.ones(FLUSH_BYTES // 4, device="cuda") if cold else None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def stopwatch(call: Call) -> float:
        torch.cuda.synchronize()
        if flush is not None:
            flush.sum()
        start.record()
        kept = call()
        end.record()
        end.synchronize()
        del kept
        return float(start.elapsed_time(end))

    return stopwatch


def back_to_back(repeats: int) -> Stopwatch:
    """A stopwatch of the wall: calls queue up, one wait at the end, per call.

    What an eager program pays: the device's time or the host's, whichever is longer.
    """

    def stopwatch(call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - start) / 1e6 / repeats

    return stopwatch


def capture(call: Call, repeats: int) -> Call:
    """A CUDA graph of ``repeats`` calls in a row, as one call that replays it.

    Several, as in a training step's graph, where the launch of the graph itself is shared by
    much more work than one loss.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialisation must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            call()

    def replay() -> object:
        graph.replay()
        return graph  # which owns the memory of the results

    return replay


def interleaved(
    turns: Mapping[str, Turn],
    stopwatch: Stopwatch,
    budget_s: float,
    rounds: tuple[int, int] = (5, 400),
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """The milliseconds of every call, as many rounds as fit into the budget.

    Args:
        turns: the contestants.
        stopwatch: times one call.
        budget_s: about how long it may take, the warm-up included.
        rounds: the fewest and the most, whatever the budget.
        warm_up: rounds before, which do not count.
    """
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in turns}

    def one_round() -> None:
        for name in order.sample(list(turns), len(turns)):
            turn = turns[name]
            samples[name].append(stopwatch(turn.call))
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
    taken_ms = statistics.median(stopwatch(copy) for _ in range(repeats))
    return 2 * source.nbytes / taken_ms / 1e6
