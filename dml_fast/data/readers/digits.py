"""The handwritten digits that come with scikit-learn: 1,797 gray images of 8x8 pixels.

Source: UCI "Optical Recognition of Handwritten Digits" (Kaynak 1995), its test half.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.splits import remaining, stratified_sample
from dml_fast.errors import UserError
from dml_fast.foreign import reading
from dml_fast.rng import numpy_generator

_COUNT = 1797
_TEST, _VAL = 359, 270  # a fifth, and 15 % of all: the rest, 1168, is enough to learn from
_SEED = 1797


def read_digits() -> RawData:
    """Read the digits in a fixed, stratified split: 1168 train, 270 validation, 359 test.

    Grey levels 0..16 are scaled to 0..255.

    Raises:
        UserError: scikit-learn or its file of digits is missing.
    """
    rows = _rows()
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    everything = ImageSet(images, rows[:, -1].astype(np.int64))
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


def _rows() -> npt.NDArray[np.float64]:
    """Read scikit-learn's file, without importing scikit-learn, which takes as long as torch.

    Returns:
        (1797, 65) float64: 64 gray levels 0..16 row by row, then the digit.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        )
    path = Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz"
    with reading(path, "reinstall scikit-learn"), gzip.open(path, "rt") as file:
        rows: npt.NDArray[np.float64] = np.loadtxt(file, delimiter=",").reshape(_COUNT, 65)
        return rows


def _set_aside(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    taken = stratified_sample(images.labels, count, numpy_generator(_SEED, count))
    return images.subset(remaining(len(images), taken)), images.subset(taken)
