"""Mixed precision: which type, on which device, with or without a loss scaler."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dml_fast import _native
from dml_fast.errors import UserError, brief, check_choice

logger = logging.getLogger("dml_fast")


def pick_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}: give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}: dml_fast trains on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r} and torch sees {torch.cuda.device_count()} CUDA devices: "
            "give cpu, or install a CUDA build of torch"
        )
    return device


@dataclass(frozen=True)
class Precision:
    """How the students' forward passes are computed.

    Attributes:
        device: where.
        dtype: the type of autocast, bfloat16 or float16; None for full precision.

    Raises:
        UserError: one of these is something else.
    """

    device: torch.device
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the attributes."""
        if not isinstance(self.device, torch.device):
            raise UserError(
                f"the device of a Precision is {brief(self.device)}: give torch.device(...)"
            )
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise UserError(
                f"the dtype of a Precision is {self.dtype}: give torch.bfloat16, torch.float16, "
                "or None for full precision"
            )

    @classmethod
    def choose(cls, amp: bool, dtype: str, device: torch.device) -> Precision:
        """Choose the type of the forward passes.

        Args:
            amp: whether to use mixed precision.
            dtype: its type: ``bf16``, ``fp16``, or ``auto`` for bf16 where the device has it. A CPU
                without bf16 instructions gets full precision then, which is several times faster
                there (docs/log.md, 2026-11-29), and one line in the log.
            device: where the students are.

        Raises:
            UserError: an unknown type, or fp16 on a CPU.
        """
        check_choice("amp_dtype", dtype, ("auto", "bf16", "fp16"))
        if not amp:
            return cls(device)
        if dtype == "fp16" and device.type == "cpu":
            raise UserError("amp_dtype is fp16 and the device is a CPU: give bf16, or a GPU")
        if dtype == "auto" and device.type == "cpu" and not _native.has_fast_bf16():
            logger.info(
                "--amp: in fp32, since this CPU has no bf16 instructions (or --amp-dtype bf16)"
            )
            return cls(device)
        bf16 = dtype == "bf16" or (
            dtype == "auto"
            and (device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False))
        )
        return cls(device, torch.bfloat16 if bf16 else torch.float16)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass."""
        # without the cache: inside a user's own autocast it would outlive an update of the weights
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False
        )

    def scaler(self) -> torch.amp.GradScaler:
        """Return a new loss scaler for one student; it does nothing unless the type is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def __str__(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
            self.dtype or torch.float32, "fp32"
        )


class FullPrecisionConv2d(nn.Conv2d):
    """A convolution that autocast leaves in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution in fp32 of (N, C, H, W) of any floating type."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def keep_in_full_precision(model: nn.Module, precision: Precision) -> int:
    """Keep depthwise convolutions out of a CPU's bf16, in place; weights stay as they are.

    oneDNN's bf16 kernels for them are slower: MobileNet v1, batch 128, 32 x 32, forward and
    backward took 430 ms in bf16 with them in fp32, 554 ms with all in bf16, 578 ms with all in
    fp32 (docs/log.md, 2026-11-24).

    Returns:
        How many there are; 0 for any other precision.
    """
    if precision.device.type != "cpu" or precision.dtype is not torch.bfloat16:
        return 0
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and type(module) in (nn.Conv2d, FullPrecisionConv2d)
        and module.groups == module.in_channels > 1
    ]
    for module in found:
        module.__class__ = FullPrecisionConv2d
    return len(found)
