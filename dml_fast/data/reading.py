"""Who holds the images of a folder: memory, or files that DALI or this package decodes."""

from __future__ import annotations

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
from dml_fast.data.storage import Storage
from dml_fast.distributed.launch import Launch
from dml_fast.errors import UserError
from dml_fast.machine import available_bytes

LoaderName = Literal["auto", "resident", "dali", "fallback"]


class Reading(NamedTuple):
    """How image files are read.

    Attributes:
        size: what images are brought to.
        skip_corrupt: whether files that cannot be decoded are skipped instead of refused.
        loader: who holds and decodes them.
        resized: whether training shows random parts of the images, resized.
        threads: that decode; 0 for one a core.
        device: that trains.
    """

    size: Size = 0
    skip_corrupt: bool = False
    loader: LoaderName = "resident"
    resized: bool = False
    threads: int = 0
    device: str = "cpu"


class Loaded(NamedTuple):
    """What became of N files.

    Attributes:
        images: of the M that are left.
        kept: (M,) which files those are, increasing.
        manifest: (M,) of `manifest_of`.
        corrupt: those that could not be decoded, so far.
        choice: which loader was chosen and why, in one line; "" if it was asked for.
    """

    images: Pixels | ImageFiles
    kept: npt.NDArray[np.int64]
    manifest: npt.NDArray[np.uint64]
    corrupt: CorruptFiles
    choice: str

    def among(self, first: int, end: int) -> slice:
        """Which of the M are files ``first`` to ``end - 1``: they lie together."""
        start, stop = np.searchsorted(self.kept, [first, end]).tolist()
        return slice(start, stop)


def load(
    root: Path, files: Storage, how: Reading, *, corrupt: CorruptFiles | None = None
) -> Loaded:
    """Decodes files into memory, or lists them for a loader that decodes them as it goes.

    Args:
        root: the data folder.
        files: N files in it, at least one.
        how: to read them.
        corrupt: what was found to be so already.

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
    pixels, bad = decode_all(files, image_size=how.size, skip_corrupt=how.skip_corrupt)
    for file in bad:
        corrupt.add(file)
    lost = {file.path for file in bad}
    kept = np.flatnonzero([not lost or files.path(i) not in lost for i in range(len(files))])
    corrupt.report()
    return Loaded(pixels, kept, manifest[kept], corrupt, choice)


def _choose(files: Storage, how: Reading) -> tuple[str, str]:
    """The loader, and what is to be said of the choice."""
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
    fits = needed * 2 <= free  # once more while they are split and brought to the device
    name = "resident" if fits else streaming
    return name, (
        f"loader: {name}{'' if fits else advice}; {len(files)} images of {tall}x{wide} take "
        f"{needed / 2**30:.2f} GiB, {free / 2**30:.1f} are free"
    )


def _free_bytes(device: str) -> int:
    """Memory for images: at most half of what is free, so that training has room."""
    host = available_bytes() // Launch.from_environment().local_size
    if device.startswith("cuda"):
        import torch

        return min(host, torch.cuda.mem_get_info(device)[0]) // 2
    return host // 2


def dali_is_installed() -> bool:
    """Whether NVIDIA DALI can be imported; it is not imported yet."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def require_dali() -> None:
    """Checks for NVIDIA DALI.

    Raises:
        UserError: it is not installed.
    """
    if not dali_is_installed():
        raise UserError(
            "--loader dali needs NVIDIA DALI (Linux on x86-64): pip install 'dml_fast[dali]', or "
            "give --loader fallback"
        )
