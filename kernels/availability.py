"""Whether Triton can run, asked before a kernel module is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

# torch.compile draws the same line: Triton generates no code for older NVIDIA GPUs.
_OLDEST_CAPABILITY = (7, 0)


def unavailable_reason(device: torch.device) -> str | None:
    """Say why Triton cannot run on tensors of ``device``.

    Args:
        device: where the tensors are.

    Returns:
        None when Triton can run there, otherwise the reason and the remedy in one sentence.
    """
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    if device.type == "cpu":
        # Only "1" means yes in every Triton from 3.2 on.
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton runs on the CPU only in its interpreter: set TRITON_INTERPRET=1"
    if device.type == "xpu":
        return None if torch.xpu.is_available() else "no XPU device is available to this torch"
    if device.type != "cuda":  # which is also what ROCm calls itself
        return f"Triton does not run on {device.type} tensors: use a CUDA device"
    if not torch.cuda.is_available():
        return "no CUDA device is available to this torch: run nvidia-smi to see why"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, Triton needs 7.0"
    return None
