"""A network that writes down which images it is trained on: one line an image, a file a rank."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from group_norm_net import GroupNormNet
from torch import Tensor


class RecordingNet(GroupNormNet):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            rows = x.detach().contiguous().numpy()
            names = [hashlib.sha1(row.tobytes()).hexdigest() for row in rows]
            path = Path(os.environ["DML_FAST_RECORD"]) / f"rank_{os.environ['RANK']}"
            with path.open("a") as file:
                file.writelines(f"{name}\n" for name in names)
        return super().forward(x)


def build(*, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> RecordingNet:
    return RecordingNet(num_classes, in_channels, image_size[0])
