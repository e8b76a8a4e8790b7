"""Resizing of parts of images in C++, against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dml_fast import _native


def part(rng: np.random.Generator, tall: int, wide: int) -> tuple[np.ndarray, list[int]]:
    """Make an image of noise, and a box in it that often touches the image's border."""
    top, left, below, right = rng.integers(0, 2, 4).tolist()
    shape = (top + tall + below, left + wide + right, 3)
    return rng.integers(0, 256, shape, dtype=np.uint8), [top, left, tall, wide]


def by_pillow(image: np.ndarray, box: list[int], height: int, width: int) -> np.ndarray:
    top, left, tall, wide = box
    cut = Image.fromarray(np.ascontiguousarray(image[top : top + tall, left : left + wide]))
    return np.asarray(cut.resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("level", ["baseline", ""])
def test_pixels_are_pillows(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal where Pillow resizes rows first, within 1 where it may begin with columns."""
    monkeypatch.setenv("DML_FAST_ISA", level)
    rng = np.random.default_rng(0)
    sides = [(1, 1), (1, 400), (400, 1), (2, 3), (224, 224), (24, 31), (31, 24), (700, 500)]
    sides += rng.integers(1, 120, (12, 2)).tolist()  # 2, 3, 4 and many weights
    for height, width in ((24, 31), (40, 7), (1, 1)):
        images, boxes = zip(*(part(rng, *side) for side in sides), strict=True)
        columns = np.ascontiguousarray(np.array(boxes).T[None])
        made = _native.resize_parts(list(images), columns, height, width, 2)
        assert made.shape == (1, len(sides), height, width, 3)
        for image, box, ours in zip(images, boxes, made[0], strict=True):
            theirs = by_pillow(image, box, height, width)
            apart = np.abs(ours.astype(int) - theirs).max()
            assert apart <= (1 if box[2] > height and box[3] != width else 0), (box, height, width)


def test_views_and_threads_change_nothing() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + n, 30, 3), dtype=np.uint8) for n in range(5)]
    boxes = np.array([[[n] * 5, [2] * 5, [9] * 5, [11 + n] * 5] for n in range(3)])
    made = _native.resize_parts(images, boxes, 8, 8, 3)
    for view in range(3):
        alone = _native.resize_parts(images, boxes[view : view + 1].copy(), 8, 8, 1)
        np.testing.assert_array_equal(made[view : view + 1], alone)
    assert len(np.unique(made.reshape(15, -1), axis=0)) == 15


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes": np.array([[[1], [0], [4], [4]]])}, "boxes must lie in the images"),
        ({"boxes": np.array([[[0], [0], [4], [0]]])}, "boxes must lie in the images"),
        ({"boxes": np.array([[[0], [-1], [4], [4]]])}, "boxes must lie in the images"),
        ({"boxes": np.zeros((1, 4, 2), np.int64)}, r"boxes must be \(V, 4, B\) for B images"),
        ({"images": [np.zeros((4, 4, 1), np.uint8)]}, r"images must be \(h, w, 3\)"),
        ({"width": 0}, "height and width must be 1..1048576"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict, message: str) -> None:
    good = {
        "images": [np.zeros((4, 4, 3), np.uint8)],
        "boxes": np.array([[[0], [0], [4], [4]]]),
        "height": 2,
        "width": 2,
        "threads": 1,
    }
    _native.resize_parts(**good)
    with pytest.raises(ValueError, match=message):
        _native.resize_parts(**(good | changed))


def test_other_types_and_layouts_are_refused() -> None:
    boxes = np.array([[[0], [0], [4], [4]]])
    for image in (np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8).T):
        with pytest.raises(TypeError):
            _native.resize_parts([image], boxes, 2, 2, 1)
