"""The handwritten digits that come with scikit-learn: 1,797 gray images of 8x8 pixels.

Source: UCI "Optical Recognition of Handwritten Digits" (Kaynak 1995), its test half.
"""

from __future__ import annotations

import numpy as np

from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.splits import remaining, stratified_sample
from dml_fast.errors import UserError
from dml_fast.rng import numpy_generator

_TEST, _VAL = 359, 270  # a fifth, and 15 % of all: the rest, 1168, is enough to learn from
_SEED = 1797


def read_digits() -> RawData:
    """Reads the digits in a fixed, stratified split: 1168 train, 270 validation, 359 test.

    Grey levels 0..16 are scaled to 0..255.

    Raises:
        UserError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    images = np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    everything = ImageSet(images, digits.target.astype(np.int64))
    rest, test = _set_aside(everything, _TEST)
    train, val = _set_aside(rest, _VAL)
    return RawData(
        name="digits",
        classes=tuple("0123456789"),
        train=train,
        val=val,
        test=test,
        pad=1,
        flip=False,
    )


def _set_aside(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    taken = stratified_sample(images.labels, count, numpy_generator(_SEED, count))
    return images.subset(remaining(len(images), taken)), images.subset(taken)
