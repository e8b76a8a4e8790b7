"""Random rectangles: the part of an image that is erased, and the part that is shown."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dml_fast.data.philox import Words, below, uniform

_ATTEMPTS = 10
WORDS = 2 * _ATTEMPTS + 2
"""Words per rectangle: an area and an aspect ratio for each attempt, then top and left."""

Boxes = npt.NDArray[np.int64]


def erased_boxes(words: Words, erased: npt.NDArray[np.bool_], height: int, width: int) -> Boxes:
    """Draw the rectangles that are erased (Zhong et al., AAAI 2020, algorithm 1).

    A rectangle has 2 to 40 % of the image's area and an aspect ratio of 0.3 to 1 / 0.3, both
    uniform. Of ten attempts the first that fits is taken.

    Args:
        words: (WORDS, *S) uint32.
        erased: (*S) bool, whether a rectangle is erased.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Returns:
        (4, *S) int64, in pixels: top, left, height and width. Height and width are 0 if nothing is
        erased.
    """
    draws = uniform(words[: 2 * _ATTEMPTS])
    area = (0.02 + 0.38 * draws[:_ATTEMPTS]) * height * width
    aspect = 0.3 + (1 / 0.3 - 0.3) * draws[_ATTEMPTS:]
    tall, wide = (np.rint(side) for side in (np.sqrt(area * aspect), np.sqrt(area / aspect)))
    found, chosen = _first_fit(tall, wide, (tall < height) & (wide < width))
    chosen *= found & erased
    return _placed(words, chosen, np.int64(height), np.int64(width))


def resized_boxes(words: Words, heights: Boxes, widths: Boxes) -> Boxes:
    """Draw the parts of images that are resized to the network's input (Szegedy et al. 2015).

    A part has 8 to 100 % of the image's area, uniform, and an aspect ratio of 3/4 to 4/3, uniform
    in its logarithm. Of ten attempts the first that fits is taken; if none fits, the largest
    centred part with such a ratio.

    Args:
        words: (WORDS, *S) uint32.
        heights: of the images in pixels, int64, broadcast against S.
        widths: of the images in pixels, int64, broadcast against S.

    Returns:
        (4, *S) int64, in pixels: top, left, height and width, inside the image and at least 1 x 1.
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
    """Return whether any attempt fits, (*S), and the sides of the first that does, (2, *S)."""
    first = fits.argmax(0)[None]
    sides = [np.take_along_axis(side, first, 0)[0] for side in (tall, wide)]
    return np.asarray(fits.any(0)), np.stack(sides).astype(np.int64)


def _placed(
    words: Words, sides: Boxes, heights: Boxes | np.int64, widths: Boxes | np.int64
) -> Boxes:
    """Put rectangles of given sides (2, *S) at a random place in their images: (4, *S)."""
    top = below(words[-2], heights - sides[0] + 1)
    left = below(words[-1], widths - sides[1] + 1)
    return np.stack([top, left, *sides])
