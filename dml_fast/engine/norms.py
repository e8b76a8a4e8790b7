"""Layers of batch normalisation: their running statistics, kept, shared and left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
