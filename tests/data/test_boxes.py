"""Random rectangles: inside their images, with the areas and ratios of the papers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast.data.boxes import WORDS, erased_boxes, resized_boxes
from dml_fast.data.philox import Draws


@settings(deadline=None, max_examples=50)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_boxes_lie_in_their_images(height: int, width: int, seed: int) -> None:
    words = Draws(seed, "boxes").words(np.arange(50), 0, WORDS)
    sides = np.full(50, height), np.full(50, width)
    top, left, tall, wide = resized_boxes(words, *sides)
    assert (tall >= 1).all() and (wide >= 1).all() and min(top.min(), left.min()) >= 0
    assert (top + tall <= height).all() and (left + wide <= width).all()
    top, left, tall, wide = erased_boxes(words, np.arange(50) % 2 == 0, height, width)
    assert not tall[1::2].any() and not wide[1::2].any() and min(top.min(), left.min()) >= 0
    assert (top + tall <= height).all() and (left + wide <= width).all()


def test_boxes_have_the_papers_areas_and_ratios() -> None:
    words = Draws(0, "boxes").words(np.arange(20_000), 0, WORDS)
    side = np.full(20_000, 1000)
    _, _, tall, wide = resized_boxes(words, side, side)
    area, ratio = tall * wide / 1e6, wide / tall
    assert 0.079 < area.min() < 0.1 and area.max() > 0.95
    assert 0.745 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.34
    assert abs(np.log(ratio).mean()) < 0.01
    _, _, tall, wide = erased_boxes(words, np.ones(20_000, bool), 1000, 1000)
    area, ratio = tall * wide / 1e6, tall / wide
    assert 0.0199 < area.min() < 0.03 and 0.39 < area.max() < 0.401
    assert 0.299 < ratio.min() < 0.32 and 3.2 < ratio.max() < 3.34


def test_an_image_too_long_for_any_attempt_shows_its_middle() -> None:
    words = Draws(0, "boxes").words(np.arange(500), 0, WORDS)
    boxes = resized_boxes(words, np.full(500, 10), np.full(500, 400))
    top, left, tall, wide = boxes[:, boxes[2] * boxes[3] == 10 * 13].T[0]
    assert (top, left, tall, wide) == (0, (400 - 13) // 2, 10, 13)
