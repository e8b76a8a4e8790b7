"""Networks whose numbers do not depend on which images share a batch, in fp32 and in float64.

They are smooth: a ReLU would turn a rounding at zero into another gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupNormNet(nn.Module):
    def __init__(self, classes: int, channels: int, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GroupNorm(4, 16),
            nn.GELU(),
        )
        self.head = nn.Linear(16 * (side // 2) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.flatten(self.body(x), 1))
        return out


def build(*, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> GroupNormNet:
    return GroupNormNet(num_classes, in_channels, image_size[0])


class Double(GroupNormNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def build_double(*, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> Double:
    return Double(num_classes, in_channels, image_size[0]).double()
