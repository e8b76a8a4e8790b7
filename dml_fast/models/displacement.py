"""A network that compares two crops at all displacements: a learned metric for registration."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, nn

from dml_fast.errors import UserError, brief, check_whole
from dml_fast.models.base import conv_bn_relu, initialise

_TILE = 64
"""Pixels: the cost of a correlation by matrices grows with its side, so large crops are cut."""


class DisplacementNet(nn.Module):
    """Two encoders, f of crop a and g of crop b, and the correlation of their features.

    The logit of a displacement t of b against a is ``e^s * mean_u <f(a)(u), g(b)(u + t)>``: it is
    a log density ratio up to a constant, so logits of several patches, or students, add. Each
    encoder is a convolution of 3 x 3, another, and one of 1 x 1, with batch normalisation and ReLU
    between them: a feature sees 5 x 5 pixels. Features are not normalised.

    Each channel of a crop is standardised first, in the crop's own precision of at least float32;
    a constant channel becomes zeros, and passes no gradient on.

    Args:
        search: R; displacements are the (2R + 1)^2 of a square of side 2R + 1 pixels around 0.
        width: channels of the hidden layers.
        dim: D, the length of a feature vector.
        channels: of a and of b.

    Attributes:
        search: R.
        channels: of a and of b.
        log_scale: s, learned, at first 0.

    Raises:
        UserError: an argument is no whole number of at least 1, or ``channels`` no pair of them.
    """

    def __init__(
        self, search: int, width: int = 16, dim: int = 8, channels: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        if not isinstance(channels, Sequence) or len(channels) != 2:
            raise UserError(f"channels is {brief(channels)}: give those of a and of b, as (1, 1)")
        named = {"search": search, "width": width, "dim": dim}
        for name, value in (*named.items(), *(("channels", count) for count in channels)):
            check_whole(name, value, 1)
        self.search = search
        self.channels = channels
        self.encode_a, self.encode_b = (_encoder(count, width, dim) for count in channels)
        self.log_scale = nn.Parameter(torch.zeros(()))
        initialise(self)

    def displacements(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the logits of all displacements of b against a.

        What is at pixel u of a is at u + R + t of b, for the displacement t = (rows, columns).

        Args:
            a: (N, channels of a, h, w), real, of any height and width.
            b: (N, channels of b, h + 2R, w + 2R). A narrower b means a smaller R.

        Returns:
            (N, 2R + 1, 2R + 1) float32, or float64 for such crops; t is at t + R.

        Raises:
            UserError: the shapes do not fit.
        """
        self._check_shapes(a, b)
        found = self.encode_a(_standardised(a)), self.encode_b(_standardised(b))
        f, g = (x if x.dtype == torch.float64 else x.float() for x in found)
        with torch.autocast(f.device.type, enabled=False):
            return self.log_scale.exp() * _correlation(f, g)

    def _check_shapes(self, a: Tensor, b: Tensor) -> None:
        for name, x, count in (("a", a, self.channels[0]), ("b", b, self.channels[1])):
            if x.dim() != 4 or x.shape[1] != count:
                raise UserError(f"{name} has shape {tuple(x.shape)}: give (N, {count}, h, w)")
        if a.shape[0] != b.shape[0] or any(not 0 < a.shape[d] <= b.shape[d] for d in (2, 3)):
            raise UserError(
                f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}: give as many of both, and b "
                "wider by 2R"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of pairs as one tensor: (N, channels of a and b, S, S) to (N, (2R + 1)^2).

        S is the patch's side + 2R. The channels of a are read in the central square of the patch
        only; displacements are in row-major order from (-R, -R).

        Raises:
            UserError: x has another number of dimensions or channels, or S is at most 2R.
        """
        count = sum(self.channels)
        if x.dim() != 4 or x.shape[1] != count or min(x.shape[2:]) <= 2 * self.search:
            raise UserError(
                f"the pairs have shape {tuple(x.shape)}: give (N, {count}, S, S), with S above "
                f"{2 * self.search}"
            )
        inner = slice(self.search, -self.search)
        a, b = x[:, : self.channels[0], inner, inner], x[:, self.channels[0] :]
        return self.displacements(a, b).flatten(1)


def displacement(
    *, width: int, num_classes: int, channels: tuple[int, int], search: int
) -> DisplacementNet:
    """Build a network for pairs; see `dml_fast.models.create_model`.

    Raises:
        UserError: there are not as many classes as displacements.
    """
    wanted = (2 * search + 1) ** 2
    if num_classes != wanted:
        raise UserError(
            f"displacement_{width} has one logit for each of {wanted} displacements within "
            f"{search} pixels and not {num_classes}: give num_classes={wanted}"
        )
    return DisplacementNet(search, width, channels=channels)


def _encoder(channels: int, width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn_relu(channels, width, 3), conv_bn_relu(width, width, 3), nn.Conv2d(width, dim, 1)
    )


def _standardised(x: Tensor) -> Tensor:
    """Return each channel of each crop with mean 0 and variance 1; zeros for a constant one."""
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean((2, 3), keepdim=True)
    centred = x - mean
    variance = centred.square().mean((2, 3), keepdim=True)
    # the mean of equal numbers may be off by a rounding error
    flat = variance <= 1e-12 * mean.square()
    # the root of infinity has a gradient of 0, and not NaN as the root of 0
    return centred * variance.masked_fill(flat, torch.inf).rsqrt()


def _correlation(f: Tensor, g: Tensor) -> Tensor:
    """Return the mean over u of <f(u), g(u + t)>, for all t from 0 for which u + t is in g.

    Args:
        f: (N, D, h, w) float32 or float64.
        g: (N, D, h + rows - 1, w + columns - 1), the same.

    Returns:
        (N, rows, columns), of the same type.
    """
    height, width = f.shape[2:]
    rows, columns = g.shape[2] - height, g.shape[3] - width
    tiles = [
        _tile(f[..., top:bottom, left:right], g[..., top : bottom + rows, left : right + columns])
        for top, bottom in _cuts(height)
        for left, right in _cuts(width)
    ]
    total = tiles[0]
    for tile in tiles[1:]:
        total = total + tile
    return total / (height * width)


def _cuts(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + _TILE, size)) for start in range(0, size, _TILE)]


def _tile(f: Tensor, g: Tensor) -> Tensor:
    """Return the sums of a correlation by the convolution theorem, with Fourier's matrices.

    At batch 32, patch 24, search 8 and D = 8, one step of the network takes 70 ms on one core with
    matrices and 69 ms with torch.fft; torch's grouped convolution needs 400 ms for the correlation
    alone. Matrices are exported to any format, and compiled.
    """
    height, width = g.shape[2:]
    rows, columns = height - f.shape[2] + 1, width - f.shape[3] + 1
    f_real, f_imaginary = _transform(f, height, width)
    g_real, g_imaginary = _transform(g, height, width)
    real = (f_real * g_real + f_imaginary * g_imaginary).sum(1)
    imaginary = (f_real * g_imaginary - f_imaginary * g_real).sum(1)
    cosine, sine = _waves(g, height, height, rows)
    real, imaginary = (
        cosine.T @ real - sine.T @ imaginary,
        cosine.T @ imaginary + sine.T @ real,
    )
    half = width // 2 + 1
    cosine, sine = _waves(g, width, half, columns)
    # all frequencies of a real signal but the first, and the middle one, stand for two
    index = torch.arange(half, device=g.device)
    single = (index == 0) | (2 * index == width)
    weight = torch.where(single, 1.0, 2.0).to(g.dtype)
    return ((real * weight) @ cosine - (imaginary * weight) @ sine) / (height * width)


def _transform(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the Fourier transform of x, zero-padded to (height, width): (..., height, half)."""
    cosine, sine = _waves(x, width, width // 2 + 1, x.shape[-1])
    real, imaginary = x @ cosine.T, -(x @ sine.T)
    cosine, sine = _waves(x, height, height, x.shape[-2])
    return cosine @ real + sine @ imaginary, cosine @ imaginary - sine @ real


def _waves(like: Tensor, size: int, frequencies: int, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of 2 pi k x / size: (frequencies, positions) each."""
    k = torch.arange(frequencies, device=like.device)[:, None]
    x = torch.arange(positions, device=like.device)
    angle = (k * x % size).to(like.dtype) * (2 * pi / size)  # whole turns taken out exactly
    return angle.cos(), angle.sin()
