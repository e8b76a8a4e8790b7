"""MobileNet v1 (Howard et al., arXiv 1704.04861, table 1): depthwise separable convolutions.

The strides depend on the image size. With both sides at least `LARGE_SIZE` (64) they are those of
the paper, 32 in all. For smaller images the first two of the five strides are 1, so that they are
8 in all: a 32 x 32 image keeps a 4 x 4 map until the mean. The mutual learning paper (73.65% for
one network on CIFAR-100) does not give its strides, and the number of parameters does not depend on
them. Readers have reported 67%, also without strides (issue 16 of the authors' repository). The
total stride of 8 is our choice.
"""

from __future__ import annotations

from torch import Tensor, nn

from dml_fast.models.base import (
    FeatureNet,
    check_size,
    conv_bn_relu,
    global_mean,
    initialise,
    is_large,
)

# Output channels of the 13 separable convolutions. Every rise but the first halves the map.
_WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class MobileNetV1(FeatureNet):
    """MobileNet v1 at full width; D = 1024.

    Args:
        num_classes: C.
        in_channels: channels of the images.
        large: whether to use the strides for ImageNet (32 in all), not those for CIFAR (8).
    """

    def __init__(self, num_classes: int, in_channels: int, large: bool) -> None:
        super().__init__()
        early = 2 if large else 1
        layers: list[nn.Module] = [conv_bn_relu(in_channels, 32, 3, early)]
        inputs = 32
        for outputs in _WIDTHS:
            stride = 1 if outputs in (64, inputs) else early if outputs == 128 else 2
            layers += [
                conv_bn_relu(inputs, inputs, 3, stride, groups=inputs),
                conv_bn_relu(inputs, outputs, 1),
            ]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.num_features = inputs
        self.classifier = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return features of images: (N, in_channels, H, W) to (N, 1024)."""
        return global_mean(self.layers(x))


def mobilenet_v1(*, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> MobileNetV1:
    """Build MobileNet v1; see `dml_fast.models.create_model`.

    Raises:
        UserError: the images are too small.
    """
    check_size("mobilenet_v1", image_size)
    return MobileNetV1(num_classes, in_channels, large=is_large(image_size))
