"""Image files that are unusual, and files that are no images."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(**options: object) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    small.resize((24, 24), Image.Resampling.BICUBIC).save(out, "JPEG", **options)
    return out.getvalue()


def foreign(folder: Path) -> None:
    """Every unusual kind of whole file, all of 24 x 24 pixels."""
    picture = Image.open(io.BytesIO(jpeg(quality=95)))
    wide = np.linspace(0, 65535, 576).astype(np.uint16).reshape(24, 24)
    exif = Image.Exif()
    exif[0x112] = 6  # turned by 90 degrees
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "gray.jpg")
    picture.convert("L").save(folder / "gray.png")
    picture.convert("1").save(folder / "bits.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("LA").save(folder / "gray alpha.png")
    picture.quantize(16).save(folder / "palette.png")
    picture.quantize(16).save(folder / "palette.gif")
    Image.fromarray(wide).save(folder / "wide.png")
    Image.fromarray(wide).save(folder / "wide.tif")
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "progressive.jpg", progressive=True)
    picture.save(folder / "444.jpg", subsampling=0)
    picture.save(folder / "with spaces & ünïcödé 图片.jpg")
    picture.save(folder / "transparent.png", transparency=(0, 0, 0))
    picture.save(folder / "lossless.webp", lossless=True)
    (folder / "followed.jpg").write_bytes(jpeg() + b"something of the camera's")
    (folder / "png named.jpg").write_bytes((folder / "gray.png").read_bytes())
    (folder / "jpeg named.png").write_bytes(jpeg())


def rotten() -> bytes:
    """A JPEG whose middle was overwritten: its beginning and end are whole."""
    whole = bytearray(jpeg(quality=95))
    half = len(whole) // 2
    whole[half : half + 200] = b"\xff\xd8" * 100
    return bytes(whole)


def claiming(height: int, width: int, image: bytes) -> bytes:
    """Return a JPEG or PNG whose header states another size; the rest is as before."""
    changed = bytearray(image)
    if image.startswith(b"\x89PNG"):
        changed[16:24] = struct.pack(">II", width, height)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    else:
        at = image.index(b"\xff\xc0") + 5  # the frame of a baseline JPEG
        changed[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(changed)


BAD = {
    "empty.jpg": b"",
    "text.jpg": b"this is no image",
    "short.jpg": jpeg()[:-60],
    "header only.jpg": jpeg()[:200],
    "short.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    "no pixels.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x18\0\0\0\x18\x08\2\0\0\0" + b"\0" * 9
    + b"IEND\xaeB\x60\x82",
}  # fmt: skip
