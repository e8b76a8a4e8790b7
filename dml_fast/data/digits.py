"""The handwritten digits that come with scikit-learn: 1,797 gray images of 8x8 pixels.

Source: UCI "Optical Recognition of Handwritten Digits" (Kaynak 1995), its test half.
"""

from __future__ import annotations

import numpy as np

from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.splits import remaining, stratified_sample
from dml_fast.errors import UserError
from dml_fast.rng import numpy_generator

_TEST_FRACTION = 0.2
_TEST_SEED = 1797


def read_digits() -> RawData:
    """Reads the digits; a fixed, stratified fifth of them (359) is the test set.

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
    count = round(_TEST_FRACTION * len(everything))
    test = stratified_sample(everything.labels, count, numpy_generator(_TEST_SEED))
    return RawData(
        name="digits",
        classes=tuple("0123456789"),
        train=everything.subset(remaining(len(everything), test)),
        val=None,
        test=everything.subset(test),
        pad=1,
        flip=False,
    )
