"""Whether Triton can run: asked before any module that needs it is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

# Triton generates no code for older NVIDIA GPUs; torch.compile has the same limit.
_OLDEST_CAPABILITY = (7, 0)


def unavailable_reason(device: torch.device) -> str | None:
    """Return why Triton cannot run on tensors of this device, and the remedy; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    if device.type == "cpu":
        # From Triton 3.2 on, "1" is the only value that all versions take for yes.
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton runs on the CPU only in its interpreter: set TRITON_INTERPRET=1"
    if device.type == "xpu":
        return None if torch.xpu.is_available() else "no XPU device is available to this torch"
    if device.type != "cuda":  # the name of ROCm's devices too
        return f"Triton does not run on {device.type} tensors: use a CUDA device"
    if not torch.cuda.is_available():
        return "no CUDA device is available to this torch: run nvidia-smi to see why"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, Triton needs 7.0"
    return None
