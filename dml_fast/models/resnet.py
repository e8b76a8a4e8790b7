"""ResNet for small images (He et al., CVPR 2016, section 4.2): three stages of 16, 32, 64 filters.

Shortcuts have no parameters (the paper's option A). The network averages over its last map, so it
takes any image size. It never has the ImageNet stem, so its cost grows with the number of pixels:
for large images take `mobilenet_v1`, `inception_v1` or ``torchvision:resnet18``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast.models.base import FeatureNet, check_size, global_mean, initialise


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut: (N, inputs, H, W) to (N, outputs, H', W')."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.added = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Operations are in place where the backward pass does not need their input: a step on a CPU
        takes 8 % less time, with the same bits.
        """
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.added:  # option A: every second pixel, and zeros for the new channels
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(y.add_(x), inplace=True)


class ResNet(FeatureNet):
    """CIFAR ResNet of depth 6n + 2; D = 64.

    Each block starts as its shortcut alone, since its last scale is 0 (Goyal et al., arXiv
    1706.02677, section 5.1). He et al. do not do so; it lets short runs use a learning rate of 0.1.

    Args:
        depth: number of weighted layers: 20, 32, 44, 56 or 110 in the paper.
        num_classes: C.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        layers: list[BasicBlock] = []
        inputs = 16
        for outputs in (16, 32, 64):
            for index in range(blocks):
                stride = 2 if outputs != 16 and index == 0 else 1
                layers.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.num_features = inputs
        self.classifier = nn.Linear(inputs, num_classes)
        initialise(self)
        for block in layers:
            nn.init.zeros_(block.bn2.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features of images: (N, in_channels, H, W) to (N, 64)."""
        return global_mean(self.blocks(F.relu(self.bn(self.conv(x)), inplace=True)))


def resnet(
    *, depth: int, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> ResNet:
    """Build the CIFAR ResNet of one depth; see `dml_fast.models.create_model`.

    Raises:
        UserError: the images are too small.
    """
    check_size(f"resnet{depth}", image_size)
    return ResNet(depth, num_classes, in_channels)
