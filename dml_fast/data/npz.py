"""Arrays of .npz and .npy files that anybody may have made: read whole, and no pickle is opened."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml_fast.errors import UserError
from dml_fast.foreign import Unfit, opened, reading
from dml_fast.machine import available_bytes


class Arrays(NamedTuple):
    """An open file of arrays.

    Attributes:
        what: the file, for messages.
        archive: the file.
        names: those of the arrays, in the file's order.
    """

    what: str
    archive: zipfile.ZipFile
    names: tuple[str, ...]

    def read(self, name: str) -> NDArray[Any]:
        """Read one array. Its whole entry is read first, which tests its checksum.

        Raises:
            UserError: it is larger than half of the free memory.
            Exception: of any type, for damage and for a pickle; see `arrays_in`.
        """
        entry = self.archive.getinfo(f"{name}.npy")
        _check_size(entry.file_size, f"{self.what} has {name}")
        return _parsed(self.archive.read(entry), name)


@contextmanager
def arrays_in(path: str | os.PathLike[str], what: str, advice: str) -> Iterator[Arrays]:
    """Open an .npz file, and turn whatever its content causes in the block into one sentence.

    Args:
        path: of the file.
        what: the file, for messages.
        advice: how to save such a file.

    Raises:
        UserError: it is missing, damaged or no .npz file, or the block raised an exception.
    """
    with reading(what, advice), opened(path) as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise UserError(f"{what} is one array: {advice}")
        with zipfile.ZipFile(file) as archive:
            entries = archive.namelist()
            found = tuple(n.removesuffix(".npy") for n in entries if n.endswith(".npy"))
            if len(set(found)) < len(found):
                raise Unfit("two of its arrays have one name")
            yield Arrays(what, archive, found)


def array_in(path: str | os.PathLike[str], advice: str) -> NDArray[Any]:
    """Return the array of an .npy file.

    Args:
        path: of the file.
        advice: how to save such a file.

    Raises:
        UserError: it is missing, damaged or no .npy file, or larger than half of the free memory.
    """
    with reading(path, advice), opened(path) as file:
        _check_size(os.fstat(file.fileno()).st_size, f"{path} has an array")
        return _parsed(file.read(), "it")


def check_there(path: Path, what: str) -> None:
    """Refuse a path that is a folder, or nothing.

    Args:
        path: of a file.
        what: the file to give, for the message.

    Raises:
        UserError: there is no file.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {what}")
    if not path.exists():
        raise UserError(f"{path} does not exist: give {what}")


def _check_size(size: int, what: str) -> None:
    if size > available_bytes() // 2:
        raise UserError(
            f"{what} of {size / 1e9:.1f} GB, more than half of the free memory: give smaller files"
        )


def _parsed(data: bytes, name: str) -> NDArray[Any]:
    content = BytesIO(data)
    array: NDArray[Any] = np.lib.format.read_array(content, allow_pickle=False)
    if content.read(1):
        raise Unfit(f"{name} has another shape than its data")
    return array
