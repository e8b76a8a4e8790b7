"""The counters of finish.py: zero before a launch, and zero again after it."""

from __future__ import annotations

import torch
from torch import Tensor

_SLICE = 4096  # int32: enough for 262,080 programs
_SLAB = 2**16  # int32 for calls that are captured, 16 bytes each where programs are few
_kept: dict[tuple[torch.device, int], Tensor] = {}
_slabs: dict[torch.device, Tensor] = {}  # what is left of each


def counters(device: torch.device, size: int, keep: bool) -> Tensor:
    """Return (size,) int32 zeros that a launch on the current stream may count with.

    Each stream has its own, since two launches at the same time must not share counters. A call
    that a CUDA graph captures gets a part of a slab, which no other call ever gets: a graph does
    not run beside itself. So the graph has no node that sets zeros, unless the slab is used up or
    no call came before the capture, which makes the slab. Without `keep` they are new:
    torch.compile's graphs do not allow that memory allocated in them outlives the call.
    """
    if not keep or device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _of_slab(device, size)
    if device not in _slabs:
        _slabs[device] = torch.zeros(_SLAB, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _kept.get(key)
    if held is None or held.numel() < size:
        held = _kept[key] = torch.zeros(max(size, _SLICE), dtype=torch.int32, device=device)
    return held


def _of_slab(device: torch.device, size: int) -> Tensor:
    left = _slabs.get(device)
    if left is None or left.numel() < size:
        return torch.zeros(size, dtype=torch.int32, device=device)
    aligned = (
        -(-size // 4) * 4
    )  # Triton would compile again for pointers that are aligned otherwise
    _slabs[device] = left[aligned:]
    return left[:size]
