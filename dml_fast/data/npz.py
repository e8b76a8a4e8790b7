"""Arrays of .npz files that anybody may have made: each is read whole, and no pickle is opened."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
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
        if entry.file_size > available_bytes() // 2:
            raise UserError(
                f"{self.what} has {name} of {entry.file_size / 1e9:.1f} GB, more than half of the "
                "free memory: give smaller files"
            )
        content = BytesIO(self.archive.read(entry))
        array: NDArray[Any] = np.lib.format.read_array(content, allow_pickle=False)
        if content.read(1):
            raise Unfit(f"{name} has another shape than its data")
        return array


@contextmanager
def arrays_in(path: str | PathLike[str], what: str, advice: str) -> Iterator[Arrays]:
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
