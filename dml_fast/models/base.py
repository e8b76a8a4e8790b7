"""What the built-in networks share: features before a linear classifier, and initialisation."""

from __future__ import annotations

from abc import abstractmethod
from math import sqrt

from torch import Tensor, nn

from dml_fast.errors import UserError

MIN_SIZE = 8
"""The smallest image height and width, in pixels, that the built-in networks take."""

LARGE_SIZE = 64
"""Images with both sides at least this long get the ImageNet stem and strides."""


class FeatureNet(nn.Module):
    """A network whose logits are a linear function of its features.

    Attributes:
        num_features: D, the length of a feature vector.
        classifier: the last layer, (N, D) to (N, C).
    """

    num_features: int
    classifier: nn.Linear

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Return features of images: (N, in_channels, H, W) to (N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of images: (N, in_channels, H, W) to (N, C)."""
        logits: Tensor = self.classifier(self.forward_features(x))
        return logits


def global_mean(x: Tensor) -> Tensor:
    """Return the mean over H and W: (N, D, H, W) to (N, D).

    A plain mean, because AdaptiveAvgPool2d has no deterministic backward on CUDA.
    """
    return x.mean(dim=(2, 3))


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return a convolution padded to keep the size at stride 1, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def check_size(name: str, image_size: tuple[int, int]) -> None:
    """Refuse images smaller than `MIN_SIZE` on a side.

    Raises:
        UserError: the images are too small for the network ``name``.
    """
    height, width = image_size
    if min(height, width) < MIN_SIZE:
        raise UserError(
            f"{name} needs images of at least {MIN_SIZE} x {MIN_SIZE} pixels, "
            f"but these are {height} x {width}: enlarge them or choose another network"
        )


def is_large(image_size: tuple[int, int]) -> bool:
    """Return whether images (H, W) get the ImageNet stem: both sides >= `LARGE_SIZE`."""
    return min(image_size) >= LARGE_SIZE


def initialise(net: nn.Module) -> None:
    """Initialise a network as He et al. do, in place, from torch's global random generator.

    Convolutions: normal with variance 2 / fan-out (He et al., ICCV 2015, equation 14), where the
    fan-out counts one group only: torch's own function counts all groups, which would shrink a
    depthwise filter of C channels by sqrt(C). Linear layers: uniform within 1 / sqrt(D). Biases:
    zero. Batch normalisation keeps torch's initial scale 1 and shift 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            fan_out = height * width * module.out_channels / module.groups
            nn.init.normal_(module.weight, std=sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            bound = 1 / sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
