"""Wide ResNet (Zagoruyko and Komodakis, BMVC 2016): a ResNet for small images, WIDTH times as wide.

The order within a block is batch normalisation, ReLU, convolution. As `resnet`, it takes any image
size, with the strides of the paper: 1, 2, 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast.models.base import FeatureNet, check_size, global_mean, initialise


class WideBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut: (N, inputs, H, W) to (N, outputs, H', W').

    Where the shape changes, the shortcut is a 1 x 1 convolution of the normalised input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            if stride > 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.dropout(F.relu(self.bn2(self.conv1(y))))
        out: Tensor = x + self.conv2(y)
        return out


class WideResNet(FeatureNet):
    """Wide ResNet of depth 6n + 4; D = 64 width.

    Args:
        depth: number of weighted layers along the main path, counting shortcuts: 28 in the paper.
        width: factor on the 16, 32 and 64 filters of the three stages: 10 in the paper.
        num_classes: C.
        in_channels: channels of the images.
        dropout: probability of zeroing an activation between a block's convolutions.
    """

    def __init__(
        self, depth: int, width: int, num_classes: int, in_channels: int, dropout: float
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        inputs = 16
        for filters in (16, 32, 64):
            for index in range(blocks):
                stride = 2 if filters != 16 and index == 0 else 1
                layers.append(WideBlock(inputs, filters * width, stride, dropout))
                inputs = filters * width
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(inputs)
        self.num_features = inputs
        self.classifier = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features of images: (N, in_channels, H, W) to (N, 64 width)."""
        return global_mean(F.relu(self.bn(self.blocks(self.conv(x)))))


def wide_resnet(
    *,
    depth: int,
    width: int,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    dropout: float = 0.0,
) -> WideResNet:
    """Build a wide ResNet; see `dml_fast.models.create_model`.

    The mutual learning paper mentions no dropout for WRN-28-10, so the default is none; Zagoruyko
    and Komodakis use 0.3 on CIFAR (``wrn_28_10_drop0.3``).

    Raises:
        UserError: the images are too small.
    """
    check_size(f"wrn_{depth}_{width}", image_size)
    return WideResNet(depth, width, num_classes, in_channels, dropout)
