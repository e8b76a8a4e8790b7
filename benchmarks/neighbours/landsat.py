"""Two bands of one scene as rough pairs to learn from, windows to test on, mutual information.

Rows and columns are pixels of 28.5 m. The bands of the scene are aligned; pairs are cut with a
known error.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml_fast.rng import numpy_generator

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
NAMES = ("blue", "green", "red", "near infrared", "short-wave infrared 1", "short-wave infrared 2")
LEARN = 215  # the rows above learn, those from here on test
PATCH, SEARCH = 24, 8
SIDE, MARGIN = 36, 20  # of a, and of b around it; errors of up to 12 pixels can be taken out


class Pairs(NamedTuple):
    """P pairs cut from two bands.

    Attributes:
        a: (P, h, w) float32.
        b: (P, h + 2m, w + 2m) float32.
        error: (P, 2), where in b, less the margin m, the content of a is: rows, columns.
    """

    a: Floats
    b: Floats
    error: Ints


def read_bands(path: Path, first: int, second: int) -> tuple[Floats, Floats]:
    """Return two bands (352, 349) of the scene as float32."""
    bands = np.load(path)["bands"].astype(np.float32)
    return bands[first], bands[second]


def rough_pairs(
    first: Floats,
    second: Floats,
    seed: int,
    *,
    count: int = 1000,
    bias: tuple[int, int] = (3, 2),
    noise: int = 1,
) -> Pairs:
    """Cut pairs of the upper rows, where b is off by ``bias`` and by up to ``noise`` pixels more.

    Args:
        first: (h, w), from which a is cut.
        second: (h, w), from which b is cut.
        seed: of the places and the errors.
        count: P.
        bias: rows and columns that all pairs are off by.
        noise: each pair is off by as much more, uniformly, in rows and in columns.
    """
    random = numpy_generator(seed, 1)
    error = np.asarray(bias) + random.integers(-noise, noise + 1, (count, 2))
    around = MARGIN + max(abs(x) for x in bias) + noise
    corner = random.integers(around, np.array([LEARN, first.shape[1]]) - SIDE - around, (count, 2))
    a = cut(first, corner, SIDE)
    b = cut(second, corner - MARGIN - error, SIDE + 2 * MARGIN)
    return Pairs(a, b, error)


def windows(first: Floats, second: Floats, seed: int, count: int = 60) -> Pairs:
    """Cut aligned windows of the lower rows: a of 24 x 24 pixels, b with the search around it."""
    random = numpy_generator(seed, 2)
    low, high = [LEARN + SEARCH, SEARCH], np.array(first.shape) - PATCH - SEARCH + 1
    corner = random.integers(low, high, (count, 2))
    b = cut(second, corner - SEARCH, PATCH + 2 * SEARCH)
    return Pairs(cut(first, corner, PATCH), b, np.zeros((count, 2), np.int64))


def cut(band: Floats, corner: Ints, side: int) -> Floats:
    """Return the squares (P, side, side) whose first pixels are at ``corner`` (P, 2)."""
    if (corner < 0).any() or (corner + side > band.shape).any():
        raise ValueError("a square does not lie in the scene")
    return np.stack([band[r : r + side, c : c + side] for r, c in corner])


def information(a: Floats, b: Floats, bins: int) -> NDArray[np.float64]:
    """Return the mutual information, in bits, of a and each place of it in b.

    Args:
        a: (h, w).
        b: (h + 2R, w + 2R).
        bins: of equal width from the least to the greatest value of each window.

    Returns:
        (2R + 1, 2R + 1): from the displacement (-R, -R) on.
    """
    rows, columns = b.shape[0] - a.shape[0] + 1, b.shape[1] - a.shape[1] + 1
    ours, theirs = bins * binned(a, bins), binned(b, bins)
    found = np.empty((rows, columns))
    for r in range(rows):
        for c in range(columns):
            there = theirs[r : r + a.shape[0], c : c + a.shape[1]]
            joint = np.bincount((ours + there).ravel(), minlength=bins * bins) / a.size
            square = joint.reshape(bins, bins)
            found[r, c] = entropy(square.sum(0)) + entropy(square.sum(1)) - entropy(joint)
    return found


def binned(window: Floats, bins: int) -> Ints:
    """Return the bin of each pixel."""
    low, high = float(window.min()), float(window.max())
    scaled = (window.astype(np.float64) - low) * (bins / max(high - low, 1e-12))
    return np.minimum(scaled.astype(np.int64), bins - 1)


def entropy(p: NDArray[np.float64]) -> float:
    """Return the entropy in bits of a distribution of any shape."""
    positive = p[p > 0]
    return float(-(positive * np.log2(positive)).sum())


def optimum(surface: NDArray[np.floating]) -> Ints:
    """Return the displacement (2,) of the maximum; of equals the shortest, then the first."""
    search = surface.shape[0] // 2
    best = np.argwhere(surface == surface.max()) - search
    return best[np.argmin(np.square(best).sum(1))]
