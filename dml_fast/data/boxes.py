"""Rectangles from random words: what is erased of an image, and which part of it is shown."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dml_fast.data.philox import Words, below, uniform

_ATTEMPTS = 10
WORDS = 2 * _ATTEMPTS + 2
"""Words that a rectangle takes: an area and an aspect ratio for each attempt, then its place."""

Boxes = npt.NDArray[np.int64]


def erased_boxes(words: Words, erased: npt.NDArray[np.bool_], height: int, width: int) -> Boxes:
    """Draws what is erased of images (Zhong et al., AAAI 2020, algorithm 1).

    A rectangle has 2 to 40 % of the image's area and an aspect ratio of 0.3 to 1 / 0.3, both
    uniform; the first of ten that fits is taken.

    Args:
        words: (WORDS, *S).
        erased: (*S), of which images something is erased.
        height: of the images, in pixels.
        width: of the images.

    Returns:
        (4, *S): top, left, height and width; the last two are 0 where nothing is erased.
    """
    draws = uniform(words[: 2 * _ATTEMPTS])
    area = (0.02 + 0.38 * draws[:_ATTEMPTS]) * height * width
    aspect = 0.3 + (1 / 0.3 - 0.3) * draws[_ATTEMPTS:]
    tall, wide = (np.rint(side) for side in (np.sqrt(area * aspect), np.sqrt(area / aspect)))
    found, chosen = _first_fit(tall, wide, (tall < height) & (wide < width))
    chosen *= found & erased
    return _placed(words, chosen, np.int64(height), np.int64(width))


def resized_boxes(words: Words, heights: Boxes, widths: Boxes) -> Boxes:
    """Draws the parts of images that are resized to the network's size (Szegedy et al. 2015).

    8 to 100 % of an image's area, uniform, at an aspect ratio of 3/4 to 4/3, uniform in its
    logarithm; the first of ten attempts that fits, else the largest centred part of such a ratio.

    Args:
        words: (WORDS, *S).
        heights: of the images in pixels, broadcast against S.
        widths: likewise.

    Returns:
        (4, *S): top, left, height and width, inside the image and at least 1 x 1.
    """
    heights, widths = (np.broadcast_to(side, words.shape[1:]) for side in (heights, widths))
    draws = uniform(words[: 2 * _ATTEMPTS])
    area = (0.08 + 0.92 * draws[:_ATTEMPTS]) * heights * widths
    aspect = np.exp(np.log(4 / 3) * (2 * draws[_ATTEMPTS:] - 1))  # width / height
    tall, wide = (np.rint(side) for side in (np.sqrt(area / aspect), np.sqrt(area * aspect)))
    fits = (tall >= 1) & (wide >= 1) & (tall <= heights) & (wide <= widths)
    found, chosen = _first_fit(tall, wide, fits)
    largest_tall = np.minimum(heights, np.maximum(np.rint(widths * 4 / 3), 1))
    largest_wide = np.minimum(widths, np.maximum(np.rint(heights * 4 / 3), 1))
    largest = np.stack([largest_tall, largest_wide]).astype(np.int64)
    boxes = _placed(words, np.where(found, chosen, largest), heights, widths)
    centred = (np.stack([heights, widths]) - largest) // 2
    boxes[:2] = np.where(found, boxes[:2], centred)
    return boxes


def _first_fit(
    tall: npt.NDArray[np.float64], wide: npt.NDArray[np.float64], fits: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], Boxes]:
    """Whether an attempt fits, and height and width (2, *S) of the first that does."""
    first = fits.argmax(0)[None]
    sides = [np.take_along_axis(side, first, 0)[0] for side in (tall, wide)]
    return np.asarray(fits.any(0)), np.stack(sides).astype(np.int64)


def _placed(
    words: Words, sides: Boxes, heights: Boxes | np.int64, widths: Boxes | np.int64
) -> Boxes:
    """Puts rectangles of given sides anywhere in their images."""
    top = below(words[-2], heights - sides[0] + 1)
    left = below(words[-1], widths - sides[1] + 1)
    return np.stack([top, left, *sides])
