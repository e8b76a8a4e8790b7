"""Reads the index of a checkpoint of several processes without running any code in it.

torch.distributed.checkpoint writes the index as a pickle, ``.metadata``. A pickle is a program: it
may name any class and set attributes of it. Here every name in it stands for an object that only
keeps what it is given. What the index says of each tensor is then taken out of these and checked.
"""

from __future__ import annotations

import io
import pickle
import re
from math import prod
from typing import Any, NamedTuple

import torch

from dml_fast.errors import brief
from dml_fast.foreign import Unfit, typed
from dml_fast.models.torch_pickle import OPCODES

FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")  # how the files of tensors are named


class Piece(NamedTuple):
    """A part of a tensor, and where it is.

    Attributes:
        offsets: of its first element, along each dimension.
        sizes: along each dimension.
        file: the name of the file, in the folder.
        start, length: its place there, in bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class Stored(NamedTuple):
    """A tensor of the checkpoint.

    Attributes:
        dtype: its type.
        size: along each dimension.
        pieces: at least one, together as large as the tensor.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    pieces: tuple[Piece, ...]


def read_index(raw: bytes) -> dict[str, Stored]:
    """Return what is stored, by name.

    Args:
        raw: the content of ``.metadata``.

    Raises:
        Exception: it is damaged, names something else than torch's index does, or a tensor is
            larger than what is stored of it.
    """
    index = _Unpickler(io.BytesIO(raw)).load()
    about = _field(index, "Metadata", "state_dict_metadata")
    places = {}
    for key, place in _field(index, "Metadata", "storage_data").items():
        name, offset = (_field(key, "MetadataIndex", part) for part in ("fqn", "offset"))
        places[name, _sizes(offset)] = place
    return {typed(n, str, "a name"): _stored(n, found, places) for n, found in about.items()}


def _stored(name: str, about: Any, places: dict[Any, Any]) -> Stored:
    dtype = _dtype(_state(_field(about, "TensorStorageMetadata", "properties"))[0])
    size = _sizes(_field(about, "TensorStorageMetadata", "size"))
    pieces = []
    for chunk in _field(about, "TensorStorageMetadata", "chunks"):
        offsets, sizes = (_sizes(_field(chunk, "ChunkStorageMetadata", x)) for x in _CHUNK)
        place = places[name, offsets]
        if _state(place).get("transform_descriptors"):
            raise Unfit(f"{brief(name)} is encoded")
        file, start, length = (_field(place, "_StorageInfo", x) for x in _PLACE)
        if not (isinstance(file, str) and FILE.fullmatch(file)):
            raise Unfit(f"{brief(name)} is in {brief(file)}, which is no file of a checkpoint")
        if not (type(start) is type(length) is int and start >= 0 and length > 0):
            raise Unfit(f"{brief(name)} is at no place")
        if prod(sizes) * dtype.itemsize > length:
            raise Unfit(f"{brief(name)} is larger than what is stored of it")
        fits = (o + n <= whole for o, n, whole in zip(offsets, sizes, size, strict=True))
        if not all(fits):
            raise Unfit(f"a part of {brief(name)} is outside of it")
        pieces.append(Piece(offsets, sizes, file, start, length))
    if not pieces or sum(prod(piece.sizes) for piece in pieces) != prod(size):
        raise Unfit(f"{brief(name)} is not whole")
    return Stored(dtype, size, tuple(pieces))


_CHUNK = ("offsets", "sizes")
_PLACE = ("relative_path", "offset", "length")


class _Record:
    """Stands for a class or a function of torch: keeps the arguments and the state."""

    __slots__ = ("args", "state")

    def __init__(self, *args: object) -> None:
        self.args: Any = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        # a pickle may call this on the class too, where an argument is missing then
        self.state = state


def _state(record: Any) -> Any:
    return record.state


def _field(record: Any, kind: str, name: str) -> Any:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise Unfit(f"{brief(record)} is no {kind}")
    if not isinstance(record.state, dict) or name not in record.state:
        raise Unfit(f"a {kind} has no {name}")
    return record.state[name]


def _sizes(record: Any) -> tuple[int, ...]:
    [found] = record.args
    if type(record).__name__ != "Size" or not all(type(n) is int and n >= 0 for n in found):
        raise Unfit("it has no sizes")
    return tuple(found)


def _dtype(found: Any) -> torch.dtype:
    dtype: torch.dtype | None = _DTYPES.get(found) if isinstance(found, type) else None
    if dtype is None:
        raise Unfit("it has a tensor of no type")
    return dtype


def _stand_in(name: str) -> type[_Record]:
    return type(name, (_Record,), {"__slots__": ()})


class _Unpickler(pickle._Unpickler):
    dispatch = OPCODES

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name. The module is neither imported nor used."""
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return _NAMES[module, name]


_METADATA = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_NAMES = {
    (module, name): _stand_in(name)
    for module, names in {
        _METADATA: (
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        _FILES: ("_StorageInfo", "_StoragePrefix"),
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),
        "torch": (
            "Size", "float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32",
            "int64", "bool",
        ),
        "torch.serialization": ("_get_layout",),
    }.items()
    for name in names
}  # fmt: skip
_DTYPES = {
    kind: getattr(torch, name)
    for (module, name), kind in _NAMES.items()
    if module == "torch" and name != "Size"
}
