"""What the stopwatches ask of a CUDA device; tests put a device without a GPU in its place."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], object]

FLUSH_BYTES = 2**28  # several times the last-level cache of any GPU so far (H200: 60 MB)
TRIAL_CYCLES = 10**7  # some milliseconds
KERNEL_NODE, COPY_NODE, FILL_NODE = (
    0,
    1,
    2,
)  # CUgraphNodeType; the others cost nothing by themselves


class Captured(NamedTuple):
    """A CUDA graph of some calls."""

    replay: Call
    nodes: int | None
    """Kernels, copies and fills of memory; None where they cannot be counted."""


class Event(Protocol):
    """A point in the device's work, with the device's time of it."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class Device(Protocol):
    """A queue of work, and the host's clock."""

    def clock_ms(self) -> float:
        """Return the host's time."""

    def wait(self) -> None:
        """Let the host wait until all work is done."""

    def sleep(self, ms: float) -> None:
        """Queue a kernel that does nothing for about that long."""

    def flush(self) -> None:
        """Queue work that empties the L2 cache."""

    def event(self) -> Event:
        """Return a new event."""

    def warm_up(self, call: Call, times: int) -> None:
        """Run a call on the stream of captures: what happens once must not be captured."""

    def capture(self, call: Call, repeats: int) -> Captured:
        """Capture that many calls in a row as one graph."""


class Cuda:
    """The current CUDA device."""

    def clock_ms(self) -> float:
        return time.perf_counter_ns() / 1e6

    def wait(self) -> None:
        torch.cuda.synchronize()

    def sleep(self, ms: float) -> None:
        torch.cuda._sleep(int(ms * self._cycles_per_ms))  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        # By reading: lines written would have to be written back during the call.
        self._flushed.sum()

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,no-any-return]

    def warm_up(self, call: Call, times: int) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                call()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, call: Call, repeats: int) -> Captured:
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:  # torch before 2.8 throws the nodes away
            graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for _ in range(repeats):
                call()

        def replay() -> object:
            graph.replay()
            return graph  # which owns the memory of the results

        return Captured(replay, _nodes(graph))

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @functools.cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.ones(FLUSH_BYTES // 4, device="cuda")

    @functools.cached_property
    def _cycles_per_ms(self) -> float:
        """At the highest clock: by that of an idle device sleeps would be too short."""
        start, end = self.event(), self.event()
        for _ in range(3):  # the first one loads the kernel
            start.record()
            torch.cuda._sleep(TRIAL_CYCLES)  # type: ignore[no-untyped-call]
            end.record()
            end.synchronize()
        measured = TRIAL_CYCLES / start.elapsed_time(end)
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return max(measured, float(getattr(properties, "clock_rate", 0)))  # in kHz


def _nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    try:
        kinds = node_kinds(graph.raw_cuda_graph(), ctypes.CDLL("libcuda.so.1"))
    except (AttributeError, OSError, RuntimeError):  # an old torch, or not Linux
        return None
    return sum(kind in (KERNEL_NODE, COPY_NODE, FILL_NODE) for kind in kinds)


def node_kinds(graph: int, driver: Any) -> list[int]:
    """Return the CUgraphNodeType of each node of a graph.

    Args:
        graph: its handle; those of the runtime and of the driver are the same.
        driver: CUDA's driver library.

    Raises:
        RuntimeError: the driver refuses.
    """

    def ask(function: Any, *arguments: Any) -> None:
        if status := function(*arguments):
            raise RuntimeError(f"CUDA's driver says {status}")

    count, handle = ctypes.c_size_t(), ctypes.c_void_p(graph)
    ask(driver.cuGraphGetNodes, handle, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    ask(driver.cuGraphGetNodes, handle, nodes, ctypes.byref(count))
    kinds = []
    for node in nodes:
        kind = ctypes.c_int()
        ask(driver.cuGraphNodeGetType, ctypes.c_void_p(node), ctypes.byref(kind))
        kinds.append(kind.value)
    return kinds
