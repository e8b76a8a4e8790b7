"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019), on the batch's device."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_fast.data.plan import Mix


def mix_inputs(inputs: Tensor, mix: Mix) -> Tensor:
    """Mix the images of a batch: the first with the last, and so on.

    Args:
        inputs: (B, C, H, W) float32; CutMix writes into it.
        mix: the weight, and the part that CutMix pastes.

    Returns:
        (B, C, H, W) float32.
    """
    if mix.box is None:
        return inputs.lerp(inputs.flip(0), 1 - mix.weight)
    top, left, bottom, right = mix.box
    part = inputs[:, :, top:bottom, left:right]
    part.copy_(part.flip(0))
    return inputs


def mix_targets(target: Tensor, num_classes: int, mix: Mix) -> Tensor:
    """Return (B, num_classes) float32 probabilities for the targets of mixed images.

    These are (B,) int64 labels, or (B, num_classes) float32 where an image may have several.
    """
    if target.is_floating_point():
        return target.lerp(target.flip(0), 1 - mix.weight)
    own = torch.zeros(len(target), num_classes, device=target.device)
    own.scatter_(1, target[:, None], 1.0)
    return own.lerp(own.flip(0), 1 - mix.weight)
