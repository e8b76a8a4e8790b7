"""Decode image files: JPEG with simplejpeg, other formats with Pillow, on all cores.

EXIF orientation is ignored, as in the usual training pipelines.
"""

from __future__ import annotations

import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from dml_fast.data.corrupt import BadImage, CorruptFiles
from dml_fast.data.storage import MOST_PIXELS, CorruptImageError, Storage, check_sides
from dml_fast.errors import UserError
from dml_fast.machine import available_bytes, cores

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 256  # files per task: enough to outweigh the overhead of a task

PNG = b"\x89PNG\r\n\x1a\n"

Pixels = npt.NDArray[np.uint8]

Size: TypeAlias = int | tuple[int, int]
"""The size in pixels that images are brought to.

0: images keep their size. S: the shorter side is resized to S (bilinear, with antialiasing) and the
centre S x S is kept. (H, W): images are resized to height H and width W, whatever their shape."""


def decode_image(raw: bytes, image_size: Size = 0) -> Pixels:
    """Decode one image.

    Gray, palette, CMYK and 16-bit images become 8-bit RGB. Transparency is dropped. The size in the
    header is checked first (`MOST_PIXELS`).

    Args:
        raw: the content of its file.
        image_size: see `Size`.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        CorruptImageError: the image cannot be decoded.
    """
    import simplejpeg
    from PIL import Image

    file = io.BytesIO(raw)
    try:
        if simplejpeg.is_jpeg(raw):
            try:
                check_sides(*simplejpeg.decode_jpeg_header(raw)[:2])
                pixels = simplejpeg.decode_jpeg(raw, fastdct=False, fastupsample=False)
                return fit(pixels, image_size)
            except ValueError:
                pass  # Pillow decodes unusual JPEGs and says what is wrong with damaged ones
        check_png(raw)
        with Image.open(file, formats=_formats()) as image:
            check_sides(image.height, image.width)
            return fit(np.asarray(_to_rgb(image)), image_size)
    except CorruptImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow has the same limit
        raise CorruptImageError(str(error)) from error
    except Exception as error:  # decoders raise errors of many types for damaged files
        reason = str(error).replace(repr(file), "").replace("\n", " ").strip()
        raise CorruptImageError(reason or type(error).__name__) from error


def check_png(raw: bytes) -> None:
    """Compare the checksums of a PNG's pixels, which Pillow does not; ignore other files.

    Raises:
        CorruptImageError: one is wrong.
    """
    if not raw.startswith(PNG):
        return
    start, kind = len(PNG), b""
    while kind != b"IEND":
        kind, size = raw[start + 4 : start + 8], int.from_bytes(raw[start : start + 4], "big")
        end = start + 8 + size
        if end + 4 > len(raw):
            return  # Pillow says whether pixels are missing
        if kind == b"IDAT" and zlib.crc32(raw[start + 4 : end]) != int.from_bytes(
            raw[end : end + 4], "big"
        ):
            raise CorruptImageError("a checksum of the PNG file is wrong")
        start = end + 4


@lru_cache
def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow may open; for EPS it would start another program."""
    newer = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()
    return ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000", *newer)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels are not supported")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if image.mode == "P":  # a palette may hide an alpha channel
        image = image.convert("RGBA")
    return image.convert("RGB")


def fit(pixels: Pixels, size: Size, margin: bool = False) -> Pixels:
    """Resize and cut an image.

    Args:
        pixels: (h, w, 3) uint8.
        size: see `Size`.
        margin: see `fitted`.

    Returns:
        (H, W, 3) uint8.

    Raises:
        CorruptImageError: a long, narrow image would be resized to more than `MOST_PIXELS`.
    """
    if size == 0:
        return pixels
    height, width, top, left = fitted(pixels.shape[0], pixels.shape[1], size, margin)
    tall, wide = size if isinstance(size, tuple) else (size, size)
    return resize(pixels, height, width)[top : top + tall, left : left + wide]


def fitted(height: int, width: int, size: Size, margin: bool) -> tuple[int, int, int, int]:
    """Work out how an image is brought to a `Size`.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        size: the size that it is brought to, not 0.
        margin: for a size S, whether the shorter side is resized to 8/7 S and not to S, so that
            the centre S x S leaves a border out (256 for 224, as usual on ImageNet).

    Returns:
        Height and width that the image is resized to, then top and left of the part that is kept,
        all in pixels.

    Raises:
        CorruptImageError: a long, narrow image would be resized to more than `MOST_PIXELS`.
    """
    if isinstance(size, tuple):
        return (*size, 0, 0)
    shorter = round(size * 8 / 7) if margin else size
    tall, wide = (round(side * shorter / min(height, width)) for side in (height, width))
    if tall * wide > MOST_PIXELS:
        raise CorruptImageError(
            f"{height}x{width} pixels, too long and narrow to resize its shorter side to {shorter}"
        )
    return tall, wide, (tall - size) // 2, (wide - size) // 2


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize (h, w, 3) uint8 to (height, width, 3): bilinear, with antialiasing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    from PIL import Image

    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode_all(
    files: Storage, image_size: Size, corrupt: CorruptFiles
) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Decode many files into one array.

    Args:
        files: N files, at least one.
        image_size: see `Size`; with 0 all images must have the size of the first.
        corrupt: records the files that cannot be decoded, or raises an error for them.

    Returns:
        (M, 3, H, W) uint8 in the order of ``files``, without those that cannot be decoded, and the
        indices (M,) int64 of their files.

    Raises:
        UserError: a file is corrupt, sizes differ, or the images do not fit in memory.
    """
    if image_size:  # before an image of that size is made
        sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        check_memory(len(files), *sides)
    first, height, width = first_size(files, image_size, corrupt.allowed)
    check_memory(len(files), height, width)
    images = np.empty((len(files), 3, height, width), dtype=np.uint8)
    task = partial(_decode_chunk, files, images, first, image_size)
    bad: list[int] = []
    with ThreadPoolExecutor(cores()) as pool:
        try:
            for failures in pool.map(task, range(0, len(files), _CHUNK)):
                for index, reason in failures:
                    corrupt.add(BadImage(files.path(index), reason))
                    bad.append(index)
        finally:
            pool.shutdown(cancel_futures=True)
    kept = np.delete(np.arange(len(files)), bad)
    return (images[kept] if bad else images), kept


def first_size(files: Storage, image_size: Size, skip_corrupt: bool) -> tuple[Path, int, int]:
    """Find the first file that can be decoded.

    Returns:
        Its path, and the height and width of its image in pixels.

    Raises:
        UserError: no file can be decoded, or ``skip_corrupt`` is False and the first cannot be.
    """
    for index in range(len(files)):
        try:
            height, width, _ = decode_image(files.read(index), image_size).shape
            return files.path(index), height, width
        except CorruptImageError as error:
            if not skip_corrupt:
                raise BadImage(files.path(index), str(error)).error() from error
    raise UserError(
        f"none of {len(files)} images, {files.path(0)} first, can be decoded: replace them"
    )


def _decode_chunk(
    files: Storage, images: Pixels, first: Path, image_size: Size, start: int
) -> list[tuple[int, str]]:
    failures = []
    for index in range(start, min(start + _CHUNK, len(files))):
        try:
            pixels = decode_image(files.read(index), image_size)
        except CorruptImageError as error:
            failures.append((index, str(error)))
            continue
        if pixels.shape[:2] != images.shape[2:]:
            raise size_error(files.path(index), pixels.shape[:2], first, images.shape[2:])
        images[index] = pixels.transpose(2, 0, 1)
    return failures


def size_error(
    path: Path, sides: tuple[int, ...], first: Path, expected: tuple[int, ...]
) -> UserError:
    """Return the error for an image whose height and width differ from the first image's."""
    return UserError(
        f"{path} is {sides[0]}x{sides[1]} pixels (height x width) but {first} is "
        f"{expected[0]}x{expected[1]}: pass --image-size to bring all to one size"
    )


def check_memory(count: int, height: int, width: int) -> None:
    """Refuse more images than fit in memory twice.

    Raises:
        UserError: how many bytes they need, and how many are available.
    """
    # twice: the decoded images, and their copies in the training and validation sets
    needed_gib = 2 * count * 3 * height * width / 2**30
    available_gib = available_bytes() / 2**30
    if needed_gib > available_gib:
        raise UserError(
            f"{count} images of {height}x{width} pixels need {needed_gib:.1f} GiB and "
            f"{available_gib:.1f} GiB of memory are available: choose a smaller --image-size or "
            "use fewer images"
        )
