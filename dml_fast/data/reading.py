"""Choose whether images are decoded into memory at once, or later by DALI or by threads."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.corrupt import CorruptFiles
from dml_fast.data.decode import (
    Pixels,
    Size,
    decode_all,
    first_size,
)
from dml_fast.data.files import ImageFiles, manifest_of
from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.storage import Storage
from dml_fast.errors import UserError
from dml_fast.machine import available_bytes, local_ranks

LoaderName = Literal["auto", "resident", "dali", "fallback"]


class Reading(NamedTuple):
    """How to read image files.

    Attributes:
        size: the size that images are brought to.
        skip_corrupt: whether files that cannot be decoded are skipped; if not, they are an error.
        loader: what holds and decodes the images.
        resized: whether training shows random parts of the images, resized.
        threads: how many threads decode; 0 for one per core.
        device: the device that trains.
    """

    size: Size = 0
    skip_corrupt: bool = False
    loader: LoaderName = "resident"
    resized: bool = False
    threads: int = 0
    device: str = "cpu"


class Loaded(NamedTuple):
    """The M images that were read from N files; the others were corrupt.

    Attributes:
        images: (M, 3, H, W) uint8, or M files that are decoded later.
        kept: (M,) int64, the indices of their files, increasing.
        manifest: (M,) uint64, see `manifest_of`.
        corrupt: the files that could not be decoded so far.
        choice: which loader was chosen and why, in one line; "" if the user named one.
    """

    images: Pixels | ImageFiles
    kept: npt.NDArray[np.int64]
    manifest: npt.NDArray[np.uint64]
    corrupt: CorruptFiles
    choice: str

    def among(self, first: int, end: int) -> slice:
        """Return where the images of files ``first`` to ``end - 1`` are among the M."""
        start, stop = np.searchsorted(self.kept, [first, end]).tolist()
        return slice(start, stop)


def load(
    root: Path, files: Storage, how: Reading, *, corrupt: CorruptFiles | None = None
) -> Loaded:
    """Decode files into memory, or list them for a decoder.

    Args:
        root: the data folder.
        files: N files in it, at least one.
        how: how to read them.
        corrupt: the files that are known to be corrupt.

    Raises:
        UserError: a file is corrupt, sizes differ, memory is too small or DALI is missing.
    """
    corrupt = corrupt or CorruptFiles(root, allowed=how.skip_corrupt)
    manifest = manifest_of(root, files)
    loader, choice = _choose(files, how)
    if loader != "resident":
        images = ImageFiles.of(
            files,
            how.size,
            margin=how.resized,
            loader=loader,
            threads=how.threads,
            corrupt=corrupt,
        )
        return Loaded(images, np.arange(len(files)), manifest, corrupt, choice)
    pixels, kept = decode_all(files, how.size, corrupt)
    corrupt.report()
    return Loaded(pixels, kept, manifest[kept], corrupt, choice)


def _choose(files: Storage, how: Reading) -> tuple[str, str]:
    """Return the loader, and a line for the log about the choice."""
    if how.loader == "resident" and how.resized:
        raise UserError(
            "--loader resident holds images at their final size and --crop resized cuts them out "
            "of larger ones: give --crop pad, or --loader auto"
        )
    if how.loader == "dali":
        require_dali()
    if how.loader != "auto":
        return how.loader, ""
    streaming = "dali" if dali_is_installed() else "fallback"
    advice = "" if streaming == "dali" else " (slow: pip install 'dml_fast[dali]')"
    if how.resized:
        return streaming, f"loader: {streaming}{advice}, for random resized crops"
    sides = how.size
    if not sides:
        _, *found = first_size(files, 0, how.skip_corrupt)
        sides = (found[0], found[1])
    tall, wide = sides if isinstance(sides, tuple) else (sides, sides)
    needed, free = len(files) * 3 * tall * wide, _free_bytes(how.device)
    fits = needed * 2 <= free  # a second copy exists while they are split and sent to the device
    name = "resident" if fits else streaming
    return name, (
        f"loader: {name}{'' if fits else advice}; {len(files)} images of {tall}x{wide} take "
        f"{needed / 2**30:.2f} GiB, {free / 2**30:.1f} are free"
    )


def _free_bytes(device: str) -> int:
    """Return how many bytes images may take: half of the free memory; training needs the rest."""
    host = available_bytes() // local_ranks()
    if device.startswith("cuda"):
        import torch

        return min(host, torch.cuda.mem_get_info(device)[0]) // 2
    return host // 2


def dali_is_installed() -> bool:
    """Return whether NVIDIA DALI can be imported, without importing it."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def require_dali() -> None:
    """Raise an error if NVIDIA DALI is not installed.

    Raises:
        UserError: it is not installed.
    """
    if not dali_is_installed():
        raise UserError(
            "--loader dali needs NVIDIA DALI (Linux on x86-64): pip install 'dml_fast[dali]', or "
            "give --loader fallback"
        )


def image_data(
    root: Path, classes: tuple[str, ...], sets: Mapping[str, ImageSet], loaded: Loaded
) -> RawData:
    """Return the parts of a folder of images; ``sets`` has train, and perhaps val and test."""
    return RawData(
        name=root.resolve().name,
        classes=classes,
        train=sets["train"],
        val=sets.get("val"),
        test=sets.get("test"),
        pad=min(sets["train"].images.shape[2:]) // 8,
        flip=True,
        corrupt=loaded.corrupt,
        choice=loaded.choice,
    )
