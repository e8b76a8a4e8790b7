"""Depthwise convolutions in full precision within a bf16 forward pass on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dml_fast.engine.precision import Precision


class FullPrecisionConv2d(nn.Conv2d):
    """A convolution that autocast leaves in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) of any floating type to fp32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def keep_in_full_precision(model: nn.Module, precision: Precision) -> int:
    """Keep depthwise convolutions out of a CPU's bf16, in place; weights stay as they are.

    oneDNN's are slower there: MobileNet v1, batch 128, 32 x 32, forward and back took 430 ms in
    bf16 with them in fp32, 554 all in bf16, 578 all in fp32 (docs/log.md, 2026-11-24).

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
