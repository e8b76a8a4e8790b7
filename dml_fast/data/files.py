"""Images that stay in their files until they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dml_fast.data.decode import (
    BadImage,
    CorruptFiles,
    CorruptImageError,
    Pixels,
    Size,
    cores,
    decode_image,
    first_size,
    fit,
    size_error,
)
from dml_fast.errors import UserError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N images in files; stands where an array (N, 3, H, W) of pixels would.

    Attributes:
        paths: (N,) str.
        size: what images are brought to (see `Size`).
        shape: (N, 3, H, W), as they are given to the network.
        margin: see `dml_fast.data.decode.fitted`.
        loader: who decodes them: dali or fallback.
        threads: that decode.
        first: the file that ``shape`` was read from.
        corrupt: notes what cannot be decoded, or refuses it.
    """

    paths: npt.NDArray[np.object_]
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
        paths: Sequence[Path],
        size: Size,
        *,
        margin: bool,
        loader: str,
        threads: int,
        corrupt: CorruptFiles,
    ) -> ImageFiles:
        """Takes the images' size from the first that can be decoded, if ``size`` does not say it.

        Raises:
            UserError: it cannot be decoded.
        """
        if size:
            sides = size if isinstance(size, tuple) else (size, size)
            first = paths[0]
        else:
            first, *found = first_size(paths, size, corrupt.allowed)
            sides = (found[0], found[1])
        names = np.array([str(path) for path in paths], dtype=object)
        shape = (len(names), 3, *sides)
        return cls(names, size, shape, margin, loader, threads or cores(), first, corrupt)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, ids: Ids | slice) -> ImageFiles:
        """Some of the files, in that order."""
        paths = self.paths[ids]
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ImageFiles(**{**values, "paths": paths, "shape": (len(paths), *self.shape[1:])})

    def path(self, index: int) -> Path:
        """Returns one file."""
        return Path(self.paths[index])

    def fitted(self, pixels: Pixels, path: Path) -> Pixels:
        """Brings a decoded image (h, w, 3) to (H, W, 3).

        Raises:
            UserError: it is not as large as the others and no size was asked for.
        """
        out = fit(pixels, self.size, self.margin)
        if out.shape[:2] != self.shape[2:]:
            raise size_error(path, out.shape[:2], self.first, self.shape[2:])
        return out

    def sample(self, count: int) -> Pixels:
        """Decodes up to ``count`` images at even distances: (<= count, 3, H, W)."""
        chosen = np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64))
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._decoded, chosen.tolist()))
        good = [pixels for pixels in found if pixels is not None]
        if not good:
            raise UserError(
                f"none of {len(found)} images of {len(self)}, {self.paths[0]} first, can be "
                "decoded: replace them"
            )
        return np.stack(good).transpose(0, 3, 1, 2)

    def _decoded(self, index: int) -> Pixels | None:
        path = self.path(index)
        try:
            return self.fitted(decode_image(path), path)
        except CorruptImageError as error:
            self.corrupt.add(BadImage(path, str(error)))
            return None


def manifest_of(root: Path, paths: Sequence[Path]) -> npt.NDArray[np.uint64]:
    """Identifies files by name and size, without reading them.

    Args:
        root: names are relative to it.
        paths: N files.

    Returns:
        (N,) hashes of 64 bits.
    """
    out = np.empty(len(paths), np.uint64)
    for row, path in enumerate(paths):
        try:
            size = path.stat().st_size
        except OSError:
            size = -1  # a broken link: decoding it will say so
        key = f"{path.relative_to(root).as_posix()}\0{size}"
        out[row] = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return out
