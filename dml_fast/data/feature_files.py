"""The files of fitted features: arrays as .npz without pickles, their SHA-256, and their checks."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dml_fast.data.npz import arrays_in
from dml_fast.foreign import Unfit

ARRAYS_FILE = "features.npz"

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]
"""The columns of N rows by name: texts (N,) of dtype object, or vectors (N, D) float32."""


def arrays_to_bytes(arrays: Mapping[str, Array]) -> bytes:
    """Return what ``features.npz`` holds: arrays of numbers or of text, never objects."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def arrays_of(folder: Path) -> dict[str, Array]:
    """Read all arrays of ``features.npz`` in a folder.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    path = folder / ARRAYS_FILE
    with arrays_in(path, str(path), "restore it") as file:
        return {name: file.read(name) for name in file.names}


def taken(arrays: Mapping[str, Array], name: str, dtype: type, *shape: int) -> Array:
    """Return one array, if it is there, of that type and shape, and finite.

    Args:
        arrays: of the file.
        name: of the array.
        dtype: its type; ``str`` for text of any length.
        shape: its shape; -1 for any length.

    Raises:
        Unfit: it is not.
    """
    if name not in arrays:
        raise Unfit(f"it has no {name}")
    found = arrays[name]
    fits = found.dtype.kind == "U" if dtype is str else found.dtype == dtype
    if not fits or found.ndim != len(shape):
        raise Unfit(f"{name} is {found.dtype} of shape {found.shape}")
    if any(wanted not in (-1, size) for size, wanted in zip(found.shape, shape, strict=True)):
        raise Unfit(f"{name} has shape {found.shape}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise Unfit(f"{name} has numbers that are not finite")
    return found


def digest_of(arrays: Mapping[str, Array], texts: object = None) -> str:
    """Return the SHA-256 of arrays, and of texts that JSON can hold, whatever file they are in."""
    header = {name: [str(a.dtype), a.shape] for name, a in sorted(arrays.items())}
    digest = hashlib.sha256(json.dumps([header, texts]).encode())
    for _, array in sorted(arrays.items()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
