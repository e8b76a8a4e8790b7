"""What one call does: kernels launched or operators run, and the memory that it needs at most."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], object]

MOVES = "Memcpy", "Memset"  # the profiler's names begin so


@dataclass(frozen=True)
class Launched:
    """What a call gives the device to do: in a CUDA graph, each is a node.

    Attributes:
        kernels: CUDA kernels.
        moves: copies and fills of memory.
    """

    kernels: int
    moves: int


def kernels(call: Call) -> int | None:
    """CUDA kernels, copies and fills of memory aside; None where the profiler sees none at all."""
    found = launched(call)
    return found and found.kernels


def launched(call: Call) -> Launched | None:
    """Kernels, copies and fills of a call on CUDA; None where the profiler sees none at all.

    The second call is counted: the first may compile, or set up a library.
    """
    if not _profiler_works():
        return None
    call()
    return _profiled(call)


@functools.cache
def _profiler_works() -> bool:
    one = torch.ones(1, device="cuda")
    torch.add(one, one)
    return _profiled(lambda: torch.add(one, one)).kernels == 1


def _profiled(call: Call) -> Launched:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        kept = call()
        torch.cuda.synchronize()
    del kept
    work = [event for event in profile.events() if is_device_work(event)]
    moves = sum(event.name.startswith(MOVES) for event in work)
    return Launched(len(work) - moves, moves)


def is_device_work(event: Any) -> bool:
    """Whether the profiler's event is a kernel, a copy or a fill."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)


def device_bytes(call: Call) -> int:
    """The most that a call had allocated on the CUDA device, beyond what was there before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def operators_and_bytes(call: Call) -> tuple[int, int]:
    """Tensor operators that a call runs on the CPU, and the most bytes of its tensors at once.

    Views are not counted. Seen from PyTorch's dispatcher: an operator's own scratch is not, nor
    is anything inside compiled code, to which this does not apply.
    """
    call()
    found = work(call)
    return found.operators, found.peak


@dataclass(frozen=True)
class Work:
    """What a call does on the CPU.

    Attributes:
        operators: tensor operators that it runs.
        peak: the most bytes of its tensors at once.
        moved: bytes of the operators' arguments and results, each read or written once.
    """

    operators: int
    peak: int
    moved: int


def work(call: Call) -> Work:
    """Of one call; as `operators_and_bytes`, and in this thread only."""
    with _Ledger() as ledger:
        kept = call()
    del kept
    return Work(ledger.operators, ledger.peak, ledger.moved)


class _Ledger(TorchDispatchMode):
    """Counts operators, and the bytes of the storages that they made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.peak = 0
        self.moved = 0
        self._live = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._note(leaf, made_here=False)
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.operators += 1
            tensors = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.moved += sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
        for leaf in tree_leaves(result):
            self._note(leaf, made_here=True)
        self.peak = max(self.peak, self._live)
        return result

    def _note(self, leaf: object, made_here: bool) -> None:
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if made_here else 0
        if key in self._known:
            return

        def gone(_: object) -> None:
            self._live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self._live += size
