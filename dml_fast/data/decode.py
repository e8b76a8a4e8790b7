"""Image files to one uint8 array: simplejpeg for JPEG, Pillow for the rest, on all cores.

EXIF orientation is ignored, as the usual training pipelines and DALI's default for parity do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dml_fast.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 256  # files a task: small against the whole, large against a thread's overhead

Pixels = npt.NDArray[np.uint8]

Size: TypeAlias = int | tuple[int, int]
"""0: images stay as they are. S: the shorter side is resized to S (bilinear, with antialiasing) and
the centre S x S is kept. (H, W): images are resized to that, whatever their shape."""


class BadImage(NamedTuple):
    """A file that could not be decoded, and why."""

    path: Path
    reason: str


class CorruptImageError(Exception):
    """A file cannot be decoded."""


def decode_image(path: Path, image_size: Size = 0) -> Pixels:
    """Decodes one file.

    Gray, palette, CMYK and 16-bit images become 8-bit RGB; transparency is dropped.

    Args:
        path: the file.
        image_size: see `Size`.

    Returns:
        (H, W, 3) uint8.

    Raises:
        CorruptImageError: it cannot be read or decoded.
    """
    import simplejpeg
    from PIL import Image

    try:
        raw = path.read_bytes()
        if simplejpeg.is_jpeg(raw):
            try:
                return _fit(
                    simplejpeg.decode_jpeg(raw, fastdct=False, fastupsample=False), image_size
                )
            except ValueError:
                pass  # an unusual form, or damage: Pillow decodes the one and names the other
        with Image.open(path) as image:
            return _fit(np.asarray(_to_rgb(image)), image_size)
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = str(error).replace(str(path), path.name).replace("\n", " ")
        raise CorruptImageError(reason or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels are not supported")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    if image.mode == "P":  # a palette may hide an alpha channel
        image = image.convert("RGBA")
    return image.convert("RGB")


def _fit(pixels: Pixels, size: Size) -> Pixels:
    """Brings an image to a `Size`."""
    height, width = pixels.shape[:2]
    if isinstance(size, tuple):
        return _resize(pixels, *size)
    if size == 0:
        return pixels
    shorter = min(height, width)
    new_height, new_width = (round(side * size / shorter) for side in (height, width))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return _resize(pixels, new_height, new_width)[top : top + size, left : left + size]


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    from PIL import Image

    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode_all(
    paths: Sequence[Path], *, image_size: Size, skip_corrupt: bool
) -> tuple[Pixels, list[BadImage]]:
    """Decodes many files into one array.

    Args:
        paths: N files, at least one.
        image_size: see `Size`; with 0 all must be as large as the first good one.
        skip_corrupt: whether files that cannot be decoded are left out instead of refused.

    Returns:
        (N - bad, 3, H, W) uint8 in the order of ``paths``, and what was left out.

    Raises:
        UserError: a file is corrupt, sizes differ, or the images do not fit in memory.
    """
    if image_size:  # before a single image of that size is made
        sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        _check_memory(len(paths), *sides)
    first, height, width = _first_size(paths, image_size, skip_corrupt)
    _check_memory(len(paths), height, width)
    images = np.empty((len(paths), 3, height, width), dtype=np.uint8)
    task = partial(_decode_chunk, paths, images, first, image_size)
    bad: list[int] = []
    found: list[BadImage] = []
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for failures in pool.map(task, range(0, len(paths), _CHUNK)):
                for index, reason in failures:
                    bad.append(index)
                    found.append(BadImage(paths[index], reason))
                    if not skip_corrupt:
                        raise corrupt_error(found[0])
        finally:
            pool.shutdown(cancel_futures=True)
    return (np.delete(images, bad, axis=0) if bad else images), found


def corrupt_error(bad: BadImage) -> UserError:
    """Returns the error for a file that cannot be decoded."""
    return UserError(
        f"{bad.path} cannot be decoded ({bad.reason}): replace or delete it, or leave such files "
        "out with --skip-corrupt"
    )


def _first_size(
    paths: Sequence[Path], image_size: Size, skip_corrupt: bool
) -> tuple[Path, int, int]:
    for path in paths:
        try:
            height, width, _ = decode_image(path, image_size).shape
            return path, height, width
        except CorruptImageError as error:
            if not skip_corrupt:
                raise corrupt_error(BadImage(path, str(error))) from error
    raise UserError(f"none of {len(paths)} images, {paths[0]} first, can be decoded: replace them")


def _decode_chunk(
    paths: Sequence[Path], images: Pixels, first: Path, image_size: Size, start: int
) -> list[tuple[int, str]]:
    failures = []
    for index in range(start, min(start + _CHUNK, len(paths))):
        try:
            pixels = decode_image(paths[index], image_size)
        except CorruptImageError as error:
            failures.append((index, str(error)))
            continue
        if pixels.shape[:2] != images.shape[2:]:
            height, width = pixels.shape[:2]
            raise UserError(
                f"{paths[index]} is {height}x{width} pixels (height x width) but {first} is "
                f"{images.shape[2]}x{images.shape[3]}: pass --image-size to bring all to one size"
            )
        images[index] = pixels.transpose(2, 0, 1)
    return failures


def _check_memory(count: int, height: int, width: int) -> None:
    # twice: the decoded images, and their copies in training and validation sets
    needed_gib = 2 * count * 3 * height * width / 2**30
    available_gib = available_bytes() / 2**30
    if needed_gib > available_gib:
        raise UserError(
            f"{count} images of {height}x{width} pixels need {needed_gib:.1f} GiB and "
            f"{available_gib:.1f} GiB of memory are available: choose a smaller --image-size or "
            "use fewer images"
        )


def available_bytes() -> int:
    """Returns how much memory can be had without swapping; all of it where only that is known."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
