"""Image files as DALI is given them: ordinary JPEGs and PNGs as they are, all others as PPM.

DALI decodes ordinary files to Pillow's pixels. Others it decodes to other pixels (CMYK, 16 bits),
or it ends the pipeline without naming the file (damaged ones); so those are decoded here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.decode import Pixels, decode_image

_PNG = b"\x89PNG\r\n\x1a\n"


class Encoded(NamedTuple):
    """A file's bytes (n,) uint8, and the height and width of its image in pixels."""

    data: npt.NDArray[np.uint8]
    height: int
    width: int


def encoded(raw: bytes, *, by_pillow: bool = False) -> Encoded:
    """Takes a file that DALI can decode as it is, or makes one of its pixels.

    Args:
        raw: the file's bytes.
        by_pillow: decode it here whatever it is.

    Raises:
        CorruptImageError: it is one of those decoded here and damaged.
    """
    if not by_pillow:
        size = _size_of_ordinary(raw)
        if size is not None:
            return Encoded(np.frombuffer(raw, np.uint8), *size)
    return as_ppm(decode_image(raw))


def as_ppm(pixels: Pixels) -> Encoded:
    """Writes (H, W, 3) pixels as a file without compression."""
    height, width, _ = pixels.shape
    header = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
    return Encoded(np.concatenate([header, pixels.reshape(-1)]), height, width)


def _size_of_ordinary(raw: bytes) -> tuple[int, int] | None:
    """Height and width of a whole 8-bit gray or colour JPEG or PNG; None for all other files."""
    if raw[:3] == b"\xff\xd8\xff":
        import simplejpeg

        if raw[-2:] != b"\xff\xd9":
            return None  # truncated, or something follows the image
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(raw)
        except ValueError:
            return None
        return (height, width) if colours in ("YCbCr", "Gray") else None
    if raw[:8] == _PNG and raw[-8:-4] == b"IEND" and raw[24] == 8 and raw[25] in (0, 2):
        return int.from_bytes(raw[20:24], "big"), int.from_bytes(raw[16:20], "big")
    return None
