"""The counters of finish.py: zero before a launch, and zero again after it."""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE = 4096  # int32: enough for 262,080 programs
_kept: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, size: int, keep: bool) -> Tensor:
    """Return (size,) int32 zeros that a launch on the current stream may count with.

    Each stream has its own, since two launches at the same time must not share counters. A CUDA
    graph gets new ones, zeroed by a node of the graph, since it may be replayed on any stream.
    Without `keep` they are new too: torch.compile's graphs do not allow that memory allocated in
    them outlives the call.
    """
    if not keep or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _kept.get(key)
    if held is None or held.numel() < size:
        held = _kept[key] = torch.zeros(max(size, _SLICE), dtype=torch.int32, device=device)
    return held
