"""Images that stay in their files until they are needed."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dml_fast.data.corrupt import BadImage, CorruptFiles
from dml_fast.data.decode import (
    Pixels,
    Size,
    check_memory,
    decode_image,
    first_size,
    fit,
    size_error,
)
from dml_fast.data.storage import CorruptImageError, Ids, Storage
from dml_fast.errors import UserError
from dml_fast.machine import cores


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N images in files, used in place of an array (N, 3, H, W) of pixels.

    Attributes:
        files: where their bytes are.
        size: the size that they are brought to.
        shape: (N, 3, H, W), the shape of the decoded images.
        margin: see `dml_fast.data.decode.fitted`.
        loader: the decoder: dali or fallback.
        threads: how many threads decode.
        first: the file that ``shape`` was read from.
        corrupt: records the files that cannot be decoded, or raises an error for them.
    """

    files: Storage
    size: Size
    shape: tuple[int, int, int, int]
    margin: bool
    loader: str
    threads: int
    first: Path
    corrupt: CorruptFiles

    @classmethod
    def of(
        cls,
        files: Storage,
        size: Size,
        *,
        margin: bool,
        loader: str,
        threads: int,
        corrupt: CorruptFiles,
    ) -> ImageFiles:
        """List files; their size, if ``size`` is not given, is that of the first that is decoded.

        Raises:
            UserError: no file can be decoded, or ``corrupt`` refuses the first that cannot be.
        """
        if size:
            sides = size if isinstance(size, tuple) else (size, size)
            first = files.path(0)
        else:
            first, *found = first_size(files, size, corrupt.allowed)
            sides = (found[0], found[1])
        shape = (len(files), 3, *sides)
        return cls(files, size, shape, margin, loader, threads or cores(), first, corrupt)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, ids: Ids | slice) -> ImageFiles:
        """Return some of the images, in the order of ``ids``."""
        files = self.files[ids]
        return replace(self, files=files, shape=(len(files), *self.shape[1:]))

    def decoded(self, index: int) -> Pixels:
        """Decode an image and bring it to (H, W, 3) uint8.

        Raises:
            CorruptImageError: it cannot be read or decoded.
            UserError: its size differs from that of the first image, and ``size`` is 0.
        """
        out = fit(decode_image(self.files.read(index)), self.size, self.margin)
        if out.shape[:2] != self.shape[2:]:
            raise size_error(self.files.path(index), out.shape[:2], self.first, self.shape[2:])
        return out

    def sample(self, count: int) -> Pixels:
        """Decode up to ``count`` images, evenly spaced among the N.

        Returns:
            (<= count, 3, H, W) uint8; images that cannot be decoded are missing.

        Raises:
            UserError: none of them can be decoded, ``corrupt`` refuses one that cannot be, or they
                do not fit in memory.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        check_memory(len(chosen), *self.shape[2:])
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._sampled, chosen.tolist()))
        good = [pixels for pixels in found if pixels is not None]
        if not good:
            raise UserError(
                f"none of {len(found)} images of {len(self)}, {self.files.path(0)} first, can be "
                "decoded: replace them"
            )
        return np.stack(good).transpose(0, 3, 1, 2)

    def _sampled(self, index: int) -> Pixels | None:
        try:
            return self.decoded(index)
        except CorruptImageError as error:
            self.corrupt.add(BadImage(self.files.path(index), str(error)))
            return None


def manifest_of(root: Path, files: Storage) -> npt.NDArray[np.uint64]:
    """Identify files by name and size, without reading them.

    Args:
        root: the folder that names are relative to.
        files: N files.

    Returns:
        (N,) uint64 hashes.
    """
    out = np.empty(len(files), np.uint64)
    for row in range(len(files)):
        key = f"{files.path(row).relative_to(root).as_posix()}\0{files.size(row)}"
        name = key.encode("utf-8", "surrogateescape")  # a file's name is bytes
        out[row] = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
    return out
