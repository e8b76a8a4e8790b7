"""Decoding of single images, against Pillow."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from bad_image_cases import claiming, jpeg
from data_cases import picture, save
from PIL import Image

from dml_fast.data import decode
from dml_fast.data.loaders.encoded import encoded
from dml_fast.data.scan import decoded, glanced_at
from dml_fast.data.storage import LooseFiles

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


def saved(kind: str, pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


TOO_LARGE = {
    "x.jpg": claiming(26_000, 26_000, jpeg()),
    "x.png": claiming(26_000, 26_000, saved("PNG", picture(1))),
    "x.ppm": b"P6 26000 26000 255\n" + bytes(99),
    "profile.jpg": claiming(26_000, 26_000, saved("JPEG", picture(1), icc_profile=bytes(9000))),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_one_limit_on_the_size_of_images_holds_for_all_decoders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked before decoding. To fail here would take 2 GB."""
    from PIL import ImageFile

    for decoder in ((simplejpeg, "decode_jpeg"), (ImageFile.ImageFile, "load")):
        monkeypatch.setattr(*decoder, lambda *_args, **_options: pytest.fail("it was decoded"))
    path = tmp_path / name
    path.write_bytes(TOO_LARGE[name])
    message = r"26000x26000 pixels, and at most 178,956,970 are allowed|676000000 pixels\) exceeds"
    for read in (decode.decode_image, encoded):
        with pytest.raises(decode.CorruptImageError, match=message):
            read(TOO_LARGE[name])
    for look in (glanced_at, decoded):
        assert re.search(message, look(LooseFiles.of([path]), 0))


def test_an_image_of_no_height_or_of_few_bytes_is_corrupt() -> None:
    png = saved("PNG", picture(1))
    for raw in (claiming(0, 16, png), b"\x89PNG\r\n\x1a\nIEND1234"):
        with pytest.raises(decode.CorruptImageError):
            encoded(raw)


def test_a_narrow_image_is_not_resized_to_gigabytes(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", picture(1, 1, 20_000))
    with pytest.raises(decode.CorruptImageError, match="1x20000 pixels, too long and narrow"):
        decode.decode_image(path.read_bytes(), 224)
    assert decode.decode_image(path.read_bytes(), (128, 64)).shape == (128, 64, 3)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(decode.CorruptImageError, match="107374182400 bytes, and at most"):
        LooseFiles.of([tmp_path / "x.png"]).read(0)


def test_no_other_program_is_started() -> None:
    """For EPS, Pillow calls Ghostscript; the suffix of the file does not matter."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(decode.CorruptImageError, match="cannot identify image file"):
        decode.decode_image(eps)


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
