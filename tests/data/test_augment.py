"""Augmentation against per-image references, and the loop in C++ against it, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_cases import MEAN, STD, normalized, random_images
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_fast import _native
from dml_fast.data.loaders.augment import Normalizer, augment, jitter_colors


def case(
    channels: int, height: int, width: int, pad: int, erased: bool, seed: int, count: int = 9
) -> dict:
    rng = np.random.default_rng(seed)
    tall = rng.integers(0, height + 1, count)
    wide = rng.integers(0, width + 1, count)
    boxes = [rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1), tall, wide]
    normalize = Normalizer(rng.uniform(0.2, 0.7, channels), rng.uniform(0.1, 0.4, channels), "cpu")
    return {
        "images": rng.integers(0, 256, (5, height, width, channels), dtype=np.uint8),
        "rows": rng.integers(0, 5, count),
        "crops": rng.integers(0, [[2 * pad + 1], [2 * pad + 1], [2]], (3, count)),
        "erased": np.stack(boxes) if erased else np.zeros((4, 0), np.int64),
        "scale": normalize.scale.numpy(),
        "shift": normalize.shift.numpy(),
        "pad": pad,
        "threads": 1,
    }


def by_torch(made: dict) -> np.ndarray:
    normalize = Normalizer((0.5,), (0.5,), "cpu")
    normalize.scale, normalize.shift = (torch.from_numpy(made[k]) for k in ("scale", "shift"))
    images, rows, crops, erased = (
        torch.from_numpy(made[name]) for name in ("images", "rows", "crops", "erased")
    )
    boxes = erased if erased.shape[1] else None
    return augment(images, rows, crops, pad=made["pad"], normalize=normalize, erased=boxes).numpy()


@settings(deadline=None, max_examples=80)
@given(
    channels=st.sampled_from([1, 2, 3, 4]),
    height=st.integers(1, 20),
    width=st.integers(1, 40),
    pad=st.integers(0, 25),
    erased=st.booleans(),
    seed=st.integers(0, 999),
)
@pytest.mark.parametrize("level", ["baseline", ""])
def test_equal_to_torch_bit_for_bit(
    level: str, channels: int, height: int, width: int, pad: int, erased: bool, seed: int
) -> None:
    made = case(channels, height, width, pad, erased, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DML_FAST_ISA", level)
        ours = _native.augment(**made)
    expected = by_torch(made)
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    np.testing.assert_array_equal(ours.view(np.uint32), (expected + 0.0).view(np.uint32))


def test_threads_change_nothing() -> None:
    made = case(3, 128, 128, 4, True, 0, count=300)
    one = _native.augment(**made)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(_native.augment(**(made | {"threads": threads})), one)


BAD = {
    "rows must be indices": {"rows": np.array([5] * 9)},
    "rows must be": {"rows": np.array([-1] * 9)},
    "crops must begin": {"crops": np.full((3, 9), 5)},
    r"crops must be \(3, B\)": {"crops": np.zeros((3, 8), np.int64)},
    "erased rectangles": {"erased": np.full((4, 9), 5)},
    r"erased must be \(4, B\)": {"erased": np.zeros((4, 3), np.int64)},
    "a value for each channel": {"scale": np.ones(2, np.float32)},
    r"\(N, H, W, C\)": {"images": np.zeros((5, 8, 8), np.uint8)},
}


@pytest.mark.parametrize("message", BAD)
def test_what_would_leave_the_arrays_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.augment(**(case(3, 8, 8, 2, True, 0) | BAD[message]))


@pytest.mark.parametrize("name", ["images", "rows", "crops", "erased", "scale", "shift"])
def test_nothing_is_converted(name: str) -> None:
    made = case(3, 8, 8, 2, True, 0)
    with pytest.raises(TypeError):
        _native.augment(**(made | {name: made[name].astype(np.float64)}))
    if made[name].ndim > 1:
        with pytest.raises(TypeError):
            _native.augment(**(made | {name: np.asfortranarray(made[name])}))


@settings(deadline=None, max_examples=30)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    pad=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_augmentation_equals_a_per_image_reference(
    channels: int, height: int, width: int, pad: int, flip: bool, seed: int
) -> None:
    data = random_images(9, channels, height, width)
    ids = np.array([4, 0, 8, 8, 1])
    rng = np.random.default_rng(seed)
    crops = rng.integers(0, [[2 * pad + 1], [2 * pad + 1], [1 + flip]], (3, len(ids)))
    out = augment(
        torch.from_numpy(data.images).permute(0, 2, 3, 1).contiguous(),
        torch.from_numpy(ids),
        torch.from_numpy(crops),
        pad=pad,
        normalize=Normalizer(MEAN[:channels], STD[:channels], "cpu"),
    )
    for row, (index, top, left, mirrored) in enumerate(zip(ids, *crops, strict=True)):
        padded = np.pad(normalized(data.images[index]), ((0, 0), (pad, pad), (pad, pad)))
        expected = padded[:, top : top + height, left : left + width]
        if mirrored:
            expected = expected[:, :, ::-1]
        np.testing.assert_allclose(out[row].permute(2, 0, 1).numpy(), expected, atol=2e-5)


def test_colour_jitter_equals_pillows_up_to_its_rounding() -> None:
    from PIL import Image, ImageEnhance

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 9, 8, 3), dtype=np.uint8)
    factors = rng.uniform(0.6, 1.4, (3, 6)).astype(np.float32)
    ours = jitter_colors(torch.from_numpy(pixels).float(), torch.from_numpy(factors)).numpy()
    for image, out, (b, c, s) in zip(pixels, ours, factors.T.tolist(), strict=True):
        theirs = ImageEnhance.Brightness(Image.fromarray(image)).enhance(b)
        theirs = ImageEnhance.Color(ImageEnhance.Contrast(theirs).enhance(c)).enhance(s)
        assert np.abs(np.asarray(theirs) - out).max() < 5  # it rounds down three times


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_by_one_changes_nothing(channels: int) -> None:
    pixels = torch.rand(2, 4, 5, channels) * 255
    torch.testing.assert_close(jitter_colors(pixels, torch.ones(3, 2)), pixels)
