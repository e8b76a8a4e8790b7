"""Students side by side on a GPU: each forward pass, backward pass and update on its own stream.

These rules prevent silently wrong results:

- A side stream waits for the stream it is forked from, even where it reads nothing from it: the
  allocator may hand out memory that pending work on that stream still uses.
- A tensor that is made on one stream and read on another stays referenced until the join, so that
  its memory is not reused while it is read. Here ``fork`` returns after the join, and its caller
  holds what the work reads.
- A student always uses the same stream: its backward pass runs on the stream of the forward pass,
  and its gradients accumulate on the stream where each parameter was first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dml_fast.engine.executor import Executor, Network
from dml_fast.errors import UserError, brief

T = TypeVar("T")


class StreamLayer(Protocol):
    """What executors need from a device's streams; a test's own layer records the calls."""

    def current(self) -> Any:
        """Return the stream that work goes to now."""

    def new(self) -> Any:
        """Return a new stream."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context inside which work goes to that stream."""

    def wait(self, waiter: Any, other: Any) -> None:
        """Let all later work of ``waiter`` start after all earlier work of ``other``."""

    def capture(self, stream: Any, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture ``work`` on a stream, without running it.

        Returns:
            Runs the work again at each call, always into the same tensor.
        """


class CudaStreams:
    """The streams of a CUDA device.

    Args:
        device: the GPU.

    Raises:
        UserError: it is none.
    """

    def __init__(self, device: torch.device) -> None:
        if not isinstance(device, torch.device) or device.type != "cuda":
            raise UserError(
                f"streams and graphs need a GPU and the device is {brief(device)}: give "
                "torch.device('cuda'), or take Threads on a CPU"
            )
        self.device = device

    def current(self) -> torch.cuda.Stream:
        """Return the stream that work goes to now."""
        return torch.cuda.current_stream(self.device)

    def new(self) -> torch.cuda.Stream:
        """Return a new stream."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """Return a context inside which work goes to that stream."""
        return torch.cuda.stream(stream)

    def wait(self, waiter: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        """Make one stream wait for another by an event, without blocking the host."""
        waiter.wait_stream(other)

    def capture(self, stream: Any, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture a CUDA graph; a loader's thread may use the device meanwhile."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        with (
            self._repaired_after_errors(pool),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    @contextmanager
    def _repaired_after_errors(self, pool: Any) -> Iterator[None]:
        """Take torch's generator and allocator out of capture mode if a capture fails."""
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        generator = torch.cuda.default_generators[index]
        state = generator.get_state()
        try:
            yield
        except Exception:
            fresh = torch.Generator(torch.device("cuda", index))
            fresh.set_state(state)
            generator.graphsafe_set_state(fresh)
            with suppress(RuntimeError):  # the allocator is not in that mode
                torch._C._cuda_endAllocateToPool(index, pool)
            raise


class Streams(Executor):
    """One side stream for each student; forks and joins by events.

    Args:
        device: the GPU.
        layer: its streams; tests replace them.
    """

    name = "streams"

    def __init__(self, device: torch.device, layer: StreamLayer | None = None) -> None:
        self.layer: StreamLayer = layer or CudaStreams(device)
        self._streams: dict[Network, Any] = {}

    def fork(self, students: Sequence[Network], work: Callable[[int], T]) -> list[T]:
        """Queue one student after the other; the device overlaps them."""
        here = self.layer.current()
        results, used = [], []
        try:
            for k, student in enumerate(students):
                stream = self._streams.get(student)
                if stream is None:
                    stream = self._streams[student] = self.layer.new()
                self.layer.wait(stream, here)
                used.append(stream)
                with self.layer.on(stream):
                    results.append(work(k))
        finally:  # after an error too: a capture must not end with a fork open
            for stream in used:
                self.layer.wait(here, stream)
        return results
