"""Inception v1 (GoogLeNet; Szegedy et al., CVPR 2015, table 1) with batch normalisation.

The mutual learning paper says that the network has 7.8M parameters on CIFAR-100, but not how it is
built, and no CIFAR code was published. GoogLeNet with global pooling has 5.7M (3 x 3 in place of
the 5 x 5 filters, as in the library that the authors used), 6.1M (5 x 5) or 6.4M (two 3 x 3). An
auxiliary classifier of the published size adds 2.3M. No sum of these is 7.8M.

The network built here has 7.8M, and is the simplest such network that we found. It has no layer
for training alone. For small images the stem is one 3 x 3 convolution to 192 channels, each 5 x 5
filter is two of 3 x 3 (Szegedy et al., CVPR 2016), and the classifier reads the last map
(1024 x 4 x 4 for images of 32 x 32) unpooled.

With both image sides at least `LARGE_SIZE` (64), the stem is GoogLeNet's own, and the last map is
averaged (D = 1024, 6.4M parameters with 100 classes).
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from dml_fast.models.base import (
    FeatureNet,
    check_size,
    conv_bn_relu,
    global_mean,
    initialise,
    is_large,
)

# Filters of a block: 1x1 | 1x1 before 3x3, 3x3 | 1x1 before 5x5, 5x5 | 1x1 after pooling.
_Filters = tuple[int, int, int, int, int, int]

# The three stages, with a halving of the map between them.
_STAGES: tuple[tuple[_Filters, ...], ...] = (
    (
        (64, 96, 128, 16, 32, 32),
        (128, 128, 192, 32, 96, 64),
    ),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    (
        (256, 160, 320, 32, 128, 128),
        (384, 192, 384, 48, 128, 128),
    ),
)


def _halve() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, padding=1)  # ceil(H / 2)


class InceptionBlock(nn.Module):
    """Four parallel branches, concatenated: (N, inputs, H, W) to (N, outputs, H, W).

    Attributes:
        outputs: number of output channels.
    """

    def __init__(self, inputs: int, filters: _Filters) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = filters
        self.outputs = one + three + five + pooled
        self.branch1 = conv_bn_relu(inputs, one, 1)
        self.branch3 = nn.Sequential(
            conv_bn_relu(inputs, reduce3, 1), conv_bn_relu(reduce3, three, 3)
        )
        self.branch5 = nn.Sequential(
            conv_bn_relu(inputs, reduce5, 1),
            conv_bn_relu(reduce5, five, 3),
            conv_bn_relu(five, five, 3),
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), conv_bn_relu(inputs, pooled, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        branches = (self.branch1, self.branch3, self.branch5, self.branch_pool)
        return torch.cat([branch(x) for branch in branches], dim=1)


class InceptionV1(FeatureNet):
    """Inception v1 for images of one size.

    D is 1024 for large images and 1024 ceil(H / 8) ceil(W / 8) for small ones.

    Args:
        num_classes: C.
        in_channels: channels of the images.
        image_size: height and width in pixels.
        dropout: probability of zeroing a feature before the classifier, in training.
    """

    def __init__(
        self, num_classes: int, in_channels: int, image_size: tuple[int, int], dropout: float
    ) -> None:
        super().__init__()
        self.large = is_large(image_size)
        layers: list[nn.Module] = []
        if self.large:
            layers += [
                conv_bn_relu(in_channels, 64, 7, 2),
                _halve(),
                conv_bn_relu(64, 64, 1),
                conv_bn_relu(64, 192, 3),
            ]
        else:
            layers.append(conv_bn_relu(in_channels, 192, 3))
        channels = 192
        for stage in _STAGES:
            layers.append(_halve())
            for filters in stage:
                block = InceptionBlock(channels, filters)
                layers.append(block)
                channels = block.outputs
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        positions = 1 if self.large else ceil(image_size[0] / 8) * ceil(image_size[1] / 8)
        self.num_features = channels * positions
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features of images: (N, in_channels, H, W) to (N, D)."""
        x = self.layers(x)
        x = self.dropout(global_mean(x) if self.large else x.flatten(1))
        return x


def inception_v1(
    *, num_classes: int, in_channels: int, image_size: tuple[int, int], dropout: float = 0.0
) -> InceptionV1:
    """Build Inception v1; see `dml_fast.models.create_model`.

    The mutual learning paper mentions no dropout, so the default is none; GoogLeNet has 0.4
    (``inception_v1_drop0.4``).

    Raises:
        UserError: the images are too small.
    """
    check_size("inception_v1", image_size)
    return InceptionV1(num_classes, in_channels, image_size, dropout)
