"""Layers of batch normalisation: their running statistics, kept, shared and left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_OF_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return a network's layers of batch normalisation that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def frozen(norms: Sequence[_BatchNorm], training: bool) -> Iterator[None]:
    """Let passes use the batch's statistics if ``training``, and never change the running ones."""
    for norm in norms:
        norm.track_running_stats = not training
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def share_storage(norms: Sequence[_BatchNorm]) -> list[Tensor]:
    """Move statistics into one tensor and counters into another: one copy keeps or restores all."""
    shared = []
    for names in (("running_mean", "running_var"), ("num_batches_tracked",)):
        owners = [(norm, name) for norm in norms for name in names]
        flat = torch.cat([getattr(norm, name).flatten() for norm, name in owners])
        start = 0
        for norm, name in owners:
            old = getattr(norm, name)
            setattr(norm, name, flat[start : start + old.numel()].view_as(old))
            start += old.numel()
        shared.append(flat)
    return shared


class _Tally(Tensor):
    """A counter that counts on the host for a pass: a tensor in all but what torch's layers do."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    batches = 0

    def add_(self, other: Any, *, alpha: Any = 1) -> Tensor:
        """Count, and leave the tensor's memory as it is."""
        self.batches += other * alpha
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a plain tensor, for a pass that copies layers."""
        return self.detach().as_subclass(Tensor).clone() + self.batches


@contextmanager
def counted(norms: Sequence[_BatchNorm], counters: Tensor) -> Iterator[None]:
    """Inside, which holds one pass, layers count their batches on the host.

    At the end all counters grow, by one launch, by as many batches as each layer has seen. Layers
    of other types than torch's, and those with ``momentum=None``, which read their counter, are
    left alone.

    Args:
        norms: whose counters these are.
        counters: all of them, as of `share_storage`.
    """
    found = [
        (norm, counter, counter.as_subclass(_Tally))
        for norm in norms
        if type(norm) in _OF_TORCH
        and norm.momentum is not None
        and type(counter := norm.num_batches_tracked) is Tensor
    ]
    for norm, _, tally in found:
        norm._buffers["num_batches_tracked"] = tally
    try:
        yield
    finally:
        found = [one for one in found if one[0]._buffers["num_batches_tracked"] is one[2]]
        for norm, counter, _ in found:
            norm._buffers["num_batches_tracked"] = counter
        _add(counters, [(counter, tally.batches) for _, counter, tally in found if tally.batches])


def _add(counters: Tensor, seen: list[tuple[Tensor, int]]) -> None:
    """Add a number of batches to each of some counters."""
    numbers = {number for _, number in seen}
    if len(seen) == len(counters) and len(numbers) == 1:
        counters.add_(numbers.pop())
    elif seen:
        torch._foreach_add_([counter for counter, _ in seen], [number for _, number in seen])
