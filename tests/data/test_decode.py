"""Decoding of single images, against Pillow."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from data_cases import picture, save
from PIL import Image

from dml_fast.data import decode

FORMATS = {
    "rgb.png": (picture(1), {}),
    "rgb.bmp": (picture(1), {}),
    "rgb.webp": (picture(1), {"lossless": True}),
    "rgb.jpg": (picture(1), {"quality": 90}),
    "SUFFIX.JPEG": (picture(1), {"quality": 90}),
    "progressive.jpg": (picture(1), {"progressive": True}),
    "gray.jpg": (picture(1)[..., 0], {}),
    "gray.png": (picture(1)[..., 0], {}),
    "cmyk.jpg": (Image.fromarray(picture(1)).convert("CMYK"), {}),
    "palette.png": (Image.fromarray(picture(1)).quantize(16), {}),
    "alpha.png": (Image.fromarray(picture(1)).convert("RGBA"), {}),
    "bits.png": (Image.fromarray(picture(1)).convert("1"), {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_equals_pillow(name: str, tmp_path: Path) -> None:
    source, options = FORMATS[name]
    path = save(tmp_path / name, source, **options)
    expected = np.asarray(Image.open(path).convert("RGB"))
    # simplejpeg and Pillow round the conversion from CMYK differently, and nothing else
    assert np.abs(decode.decode_image(path.read_bytes()).astype(int) - expected).max() <= (
        "cmyk" in name
    )


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    wide = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("wide.png", "wide.tif"):
        out = decode.decode_image(save(tmp_path / name, Image.fromarray(wide)).read_bytes())
        np.testing.assert_array_equal(out, np.repeat((wide // 256)[..., None], 3, axis=2))


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    palette = Image.fromarray(picture(1)).quantize(16)
    path = save(tmp_path / "palette.png", palette, transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode.decode_image(path.read_bytes())
    np.testing.assert_array_equal(pixels, np.asarray(palette.convert("RGB")))


def test_pixels_of_more_than_sixteen_bits_are_refused(tmp_path: Path) -> None:
    for wide in (np.full((4, 4), 70_000, dtype=np.int32), np.ones((4, 4), dtype=np.float32)):
        path = save(tmp_path / "wide.tif", Image.fromarray(wide))
        with pytest.raises(decode.CorruptImageError, match="pixels are not supported"):
            decode.decode_image(path.read_bytes())


def test_the_orientation_in_exif_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = save(tmp_path / "turned.jpg", picture(1, 16, 24), exif=exif)
    plain = save(tmp_path / "plain.jpg", picture(1, 16, 24))
    sides = [decode.decode_image(path.read_bytes()) for path in (turned, plain)]
    np.testing.assert_array_equal(*sides)


@pytest.mark.parametrize(("height", "width", "size"), [(20, 31, 8), (31, 20, 8), (5, 6, 12)])
def test_image_size_resizes_the_shorter_side_and_keeps_the_centre(
    height: int, width: int, size: int, tmp_path: Path
) -> None:
    source = picture(3, height, width)
    out = decode.decode_image(save(tmp_path / "x.png", source).read_bytes(), size)
    scale = size / min(height, width)
    whole = Image.fromarray(source).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    expected = whole.crop((left, top, left + size, top + size))
    np.testing.assert_array_equal(out, np.asarray(expected))
