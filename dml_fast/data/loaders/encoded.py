"""Image files for DALI: ordinary JPEGs and PNGs unchanged, all others as PPM.

DALI decodes ordinary files to the same pixels as Pillow does. Other files are decoded here, because
DALI decodes them to different pixels (CMYK, 16 bits), or stops without naming the file (damage).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.decode import PNG, Pixels, check_png, decode_image
from dml_fast.data.storage import check_sides

_EIGHT_BITS = (b"\x08\x00", b"\x08\x02")  # gray, RGB


class Encoded(NamedTuple):
    """The content of a file, (n,) uint8, and the height and width of its image in pixels."""

    data: npt.NDArray[np.uint8]
    height: int
    width: int


def encoded(raw: bytes, *, by_pillow: bool = False) -> Encoded:
    """Return the file itself if DALI can decode it, otherwise a PPM file of its pixels.

    Args:
        raw: the content of the file.
        by_pillow: whether to decode it here in any case.

    Raises:
        CorruptImageError: the image is too large, or the file is decoded here and damaged.
    """
    if not by_pillow:
        size = _size_of_ordinary(raw)
        if size is not None:
            check_sides(*size)
            return Encoded(np.frombuffer(raw, np.uint8), *size)
    return as_ppm(decode_image(raw))


def as_ppm(pixels: Pixels) -> Encoded:
    """Make an uncompressed image file (PPM) of (H, W, 3) uint8 pixels."""
    height, width, _ = pixels.shape
    header = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
    return Encoded(np.concatenate([header, pixels.reshape(-1)]), height, width)


def _size_of_ordinary(raw: bytes) -> tuple[int, int] | None:
    """Return height and width of a whole 8-bit gray or RGB JPEG or PNG, None for other files."""
    if raw[:3] == b"\xff\xd8\xff":
        import simplejpeg

        if raw[-2:] != b"\xff\xd9":
            return None  # truncated, or something follows the image
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
        except ValueError:
            return None
        return (height, width) if colours in ("YCbCr", "Gray") else None
    if raw[:8] == PNG and raw[-8:-4] == b"IEND" and raw[24:26] in _EIGHT_BITS:
        check_png(raw)
        return int.from_bytes(raw[20:24], "big"), int.from_bytes(raw[16:20], "big")
    return None
