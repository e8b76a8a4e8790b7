"""TrivialAugment's operations on whole batches (Müller & Hutter, ICCV 2021, arXiv 2103.10158).

The plan draws one of 14 operations for each image, and one of 31 strengths: the paper's wide space,
as torchvision's TrivialAugmentWide has it. The pixels are those of Pillow, which the authors used.
They are made on the device of the images, of whole numbers and of single roundings: the same, bit
for bit, on a CPU and on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml_fast.data.plan import LEVELS, OPERATIONS

_MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_ONE = 1 << 16  # Pillow's coordinates are multiples of 1 / 65536


class Policy:
    """Changes images of one size as the plan says.

    Args:
        size: height and width of the images, in pixels.
        device: where the images are.
    """

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        levels = range(-LEVELS, LEVELS + 1)
        maps = [[_map(name, level / LEVELS, *size) for level in levels] for name in _MOVES]
        self._maps = torch.tensor(maps).to(device)  # (moves, levels, 6)
        strengths = 0.99 * torch.tensor(levels, dtype=torch.float64) / LEVELS
        self._factors = (1 + strengths.float().double()).float().to(device)  # as torchvision
        self._device = device

    def __call__(
        self, images: Tensor, rows: npt.NDArray[np.int64], drawn: npt.NDArray[np.int64]
    ) -> Tensor:
        """Return some of the images, changed: (B, H, W, C) uint8.

        Args:
            images: (N, H, W, C) uint8, C is 1 or 3.
            rows: (B,) the indices of the images.
            drawn: (2, B) one view of `dml_fast.data.plan.BatchPlan.policy`.
        """
        order = np.argsort(drawn[0], kind="stable")
        ends = np.cumsum(np.bincount(drawn[0], minlength=len(OPERATIONS)))
        sent = torch.from_numpy(np.stack([rows, order, drawn[1, order]]))
        if self._device.type == "cuda":
            sent = sent.pin_memory()
        chosen, places, levels = sent.to(self._device, non_blocking=True)
        out = images.index_select(0, chosen)
        for name, first, last in zip(OPERATIONS, (0, *ends), ends, strict=False):
            if name == "identity" or first == last:
                continue
            place, level = places[first:last], levels[first:last]
            out.index_copy_(0, place, self._changed(name, out.index_select(0, place), level))
        return out

    def _changed(self, name: str, pixels: Tensor, level: Tensor) -> Tensor:
        """Apply one operation to (n, H, W, C) uint8, with strengths (n,)."""
        if name in _MOVES:
            return _moved(pixels, self._maps[_MOVES.index(name)].index_select(0, level + LEVELS))
        if name in _LESS:
            return _blended(_LESS[name](pixels), pixels, self._factors[level + LEVELS])
        level = level.abs().view(-1, 1, 1, 1)
        if name == "posterize":  # 8 to 2 bits are kept
            return pixels & (255 << (2 * level + 5) // 10).to(torch.uint8)
        if name == "solarize":
            return torch.where(2 * pixels.int() < 510 - 17 * level, pixels, 255 - pixels)
        return _looked_up(pixels, _TABLES[name](pixels))


def _map(name: str, share: float, height: int, width: int) -> list[int]:
    """Return where pixels come from, as Pillow computes it: six numbers in units of 1 / 65536.

    The pixel in row y and column x is that of column ``x a + y b + c``, row ``x d + y e + f``.
    """
    matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    if name == "shear_x":
        matrix[1] = 0.99 * share
    elif name == "shear_y":
        matrix[3] = 0.99 * share
    elif name == "translate_x":
        matrix[2] = int(32 * share)
    elif name == "translate_y":
        matrix[5] = int(32 * share)
    else:
        angle = math.radians(-135 * share)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        matrix = [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
    a, b, c, d, e, f = matrix
    parts = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)  # the centres of pixels
    return [math.floor(part * _ONE + 0.5) for part in parts]


def _moved(pixels: Tensor, maps: Tensor) -> Tensor:
    """Return images whose pixels come from elsewhere, black where that is outside.

    Args:
        pixels: (n, H, W, C) uint8.
        maps: (n, 6) int64 of `_map`.
    """
    count, height, width, channels = pixels.shape
    y = torch.arange(height, device=pixels.device)[:, None]
    x = torch.arange(width, device=pixels.device)
    a, b, c, d, e, f = maps.view(count, 6, 1, 1).unbind(1)
    column, row = (c + b * y + a * x) >> 16, (f + e * y + d * x) >> 16  # (n, H, W)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    start = torch.arange(count, device=pixels.device).view(-1, 1, 1) * height
    place = (start + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
    found = pixels.view(-1, channels).index_select(0, place.view(-1)).view(pixels.shape)
    return found * inside[..., None]


def _blended(less: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """Return what is as far from ``less`` as the factor says, rounded down: uint8.

    Args:
        less: (n, H or 1, W or 1, C or 1) whole numbers, the image at a factor of 0.
        pixels: (n, H, W, C) uint8, the image at a factor of 1.
        factor: (n,) float32.
    """
    less = less.float()
    # two operations, as one may round once or twice
    changed = (pixels.float() - less).mul_(factor.view(-1, 1, 1, 1))
    return changed.add_(less).clamp_(0, 255).to(torch.uint8)


def _gray(pixels: Tensor) -> Tensor:
    """Return the luma of RGB by ITU-R BT.601, (n, H, W, 1) whole numbers."""
    if pixels.shape[-1] == 1:
        return pixels
    red, green, blue = pixels.int().unbind(-1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).unsqueeze(-1)


def _mean(pixels: Tensor) -> Tensor:
    """Return the mean of the luma, (n, 1, 1, 1)."""
    count = pixels.shape[1] * pixels.shape[2]
    return (2 * _gray(pixels).sum((1, 2), keepdim=True) + count) // (2 * count)


def _smooth(pixels: Tensor) -> Tensor:
    """Return the images smoothed by 3 x 3 pixels, of which the middle counts five times."""
    wide = pixels.int()
    _, height, width, _ = pixels.shape
    if min(height, width) < 3:
        return wide
    columns = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * wide[:, 1:-1, 1:-1]
    smooth = wide.clone()  # the border stays
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


def _stretched(pixels: Tensor) -> Tensor:
    """Return tables, (n, C, 256), that stretch each channel to 0..255."""
    low, high = (bound((1, 2)).double()[..., None] for bound in (pixels.amin, pixels.amax))
    steps = torch.arange(256, dtype=torch.float64, device=pixels.device)
    scale = torch.full_like(high, 255).div_(high - low)  # 255 / x would round twice
    found = (steps * scale).add_(-low * scale).clamp_(0, 255)
    return torch.where(high > low, found, steps).to(torch.uint8)


def _equalized(pixels: Tensor) -> Tensor:
    """Return tables, (n, C, 256), that make the values of each channel equally frequent."""
    count, height, width, channels = pixels.shape
    which = torch.arange(count * channels, device=pixels.device).view(count, 1, 1, channels)
    place = (256 * which + pixels).view(-1)
    counts = torch.zeros(count * channels * 256, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(0, place, torch.ones_like(place))
    counts = counts.view(count, channels, 256)
    largest = counts.gather(2, pixels.amax((1, 2)).long()[..., None])
    step = (height * width - largest) // 255
    found = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    same = torch.arange(256, device=pixels.device)
    return torch.where(step > 0, found.clamp_(max=255), same).to(torch.uint8)


def _looked_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """Replace each value by that of its image's and channel's table, (n, C, 256) uint8."""
    count, height, width, channels = pixels.shape
    values = pixels.permute(0, 3, 1, 2).reshape(count, channels, -1).long()
    found = tables.gather(2, values).view(count, channels, height, width)
    return found.permute(0, 2, 3, 1)


_LESS: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": lambda pixels: pixels.new_zeros(1, 1, 1, 1),
    "color": _gray,
    "contrast": _mean,
    "sharpness": _smooth,
}
_TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "autocontrast": _stretched,
    "equalize": _equalized,
}
