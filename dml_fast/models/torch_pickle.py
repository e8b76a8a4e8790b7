"""Unpickle what ``torch.save`` wrote; no code in it runs, and its numbers stay in the file.

A pickle is a program that may call anything. Here it can call only stand-ins of our own: those of
torch's functions note where a tensor lies in the file, and all others make an empty object. So a
checkpoint loads whatever lies beside its weights.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dml_fast.models.stored import Stored, file_part

_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}
_UNUSUAL = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_qtensor": "quantised",
    "_rebuild_meta_tensor_no_storage": "without values (of the meta device)",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_tensor_v3": "of a rare type",
    "_rebuild_wrapper_subclass": "of a tensor subclass",
    "_rebuild_device_tensor_from_numpy": "of a device that is not here",
    "_rebuild_device_tensor_from_cpu_tensor": "of a device that is not here",
}


class Storage(NamedTuple):
    """Numbers in the file.

    Attributes:
        key: their name in the file.
        dtype: of each.
        start: index of the first one that counts, of a view.
        length: how many there are, from index 0.
    """

    key: str
    dtype: torch.dtype
    start: int
    length: int

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.length * self.dtype.itemsize


class Storages:
    """The storages that a pickle refers to.

    Attributes:
        path: the file.
        found: the storages by key.
        places: where the bytes of each begin.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Storage] = {}
        self.places: dict[str, int] = {}

    def storage(self, reference: object) -> Storage:
        """Return the storage that a pickle's persistent id names."""
        match reference:
            case (
                "storage",
                _Stub(dtype=torch.dtype() as dtype),
                str(key),
                str(),
                int(count),
                *views,
            ):
                pass
            case _:
                raise pickle.UnpicklingError("it refers to something that is no storage")
        if count < 0:
            raise pickle.UnpicklingError(f"storage {key} has a negative size")
        storage = self.found.setdefault(key, Storage(key, dtype, 0, count))
        if storage != (key, dtype, 0, count):
            raise pickle.UnpicklingError(f"storage {key} is described in two ways")
        if views and views[0] is not None:
            return storage._replace(start=_whole(_sequence(views[0])[1]))
        return storage

    def tensor(self, storage: object, offset: object, shape: object, strides: object) -> Stored:
        """Note where a tensor lies."""
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor has no storage")
        sizes, steps = (tuple(map(_whole, _sequence(x))) for x in (shape, strides))
        first = _whole(offset) + storage.start
        last = first + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
        if 0 not in sizes and last >= storage.length:
            raise pickle.UnpicklingError("a tensor is larger than its storage")

        def read() -> Tensor:
            if 0 in sizes:
                return torch.empty(sizes, dtype=storage.dtype)
            width = storage.dtype.itemsize
            start = self.places[storage.key] + first * width
            part = file_part(self.path, start, (last - first + 1) * width)
            return torch.frombuffer(part, dtype=storage.dtype).as_strided(sizes, steps).contiguous()

        return Stored(sizes, storage.dtype, read)


class _Empty(dict[Any, Any]):
    """An object of an unknown class: it keeps the items of a dictionary, and nothing else."""

    def append(self, _: object) -> None:
        """Leave an item out."""

    def extend(self, _: object) -> None:
        """Leave items out."""


class _Stub:
    """A stand-in for a function or a class; a pickle can call it and cannot change it.

    Attributes:
        build: makes what a call returns.
        dtype: the type that the class of a storage or a name of torch stands for.
    """

    __slots__ = ("build", "dtype")

    def __init__(self, build: Callable[..., object], dtype: torch.dtype | None = None) -> None:
        self.build = build
        self.dtype = dtype


def _empty(*_: object, **__: object) -> _Empty:
    return _Empty()


def _parameter(data: object, *_: object) -> object:
    return data


def _size(items: object) -> tuple[Any, ...]:
    return tuple(_sequence(items))


def _from_type(function: object, _type: object, args: object, _state: object) -> object:
    if not isinstance(function, _Stub):
        raise pickle.UnpicklingError("it calls something that is no function")
    return function.build(*_sequence(args))


def _encode(text: object, _encoding: object = None) -> bytes:
    return str(text).encode("latin1")


def _ordered(*items: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(*items)


def _unusual(problem: str) -> Callable[..., Stored]:
    return lambda *_: Stored.unreadable(problem)


def _whole(number: object) -> int:
    if type(number) is not int or number < 0:
        raise pickle.UnpicklingError("a size is not a whole number")
    return number


def _sequence(items: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError("a list is missing")
    return items


_REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
OPCODES = {
    code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED
}
"""Those that torch writes, of Python's own unpickler: the one in C takes as much memory as a number
in the file says, and so do some of the others."""


class Unpickler(pickle._Unpickler):
    """An unpickler in which each opcode that calls, or sets attributes, is replaced."""

    stack: list[Any]
    append: Callable[[object], None]

    def __init__(self, file: IO[bytes], storages: Storages) -> None:
        super().__init__(file, encoding="latin1")  # strings of Python 2
        self._storages = storages
        tensor = storages.tensor
        self._stubs = {
            "collections.OrderedDict": _Stub(_ordered),
            "torch._utils._rebuild_tensor": _Stub(lambda s, o, n, k: tensor(s, o, n, k)),
            "torch._utils._rebuild_tensor_v2": _Stub(lambda s, o, n, k, *_: tensor(s, o, n, k)),
            "torch._utils._rebuild_parameter": _Stub(_parameter),
            "torch._utils._rebuild_parameter_with_state": _Stub(_parameter),
            "torch._tensor._rebuild_from_type_v2": _Stub(_from_type),
            "torch.nn.parameter.Parameter": _Stub(_parameter),
            "torch.Size": _Stub(_size),
            "_codecs.encode": _Stub(_encode),
            "torch.storage.UntypedStorage": _Stub(_empty, torch.uint8),
            **{
                f"torch.{name}Storage": _Stub(_empty, dtype) for name, dtype in _DTYPES.items()
            },
            **{
                f"torch._utils.{name}": _Stub(_unusual(problem))
                for name, problem in _UNUSUAL.items()
            },
        }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name. The module itself is neither imported nor used."""
        return self._stubs.get(f"{module}.{name}") or _Stub(_empty)

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage of a key."""
        return self._storages.storage(pid)

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Stub):
            raise pickle.UnpicklingError("it calls something that is no function")
        self.append(function.build(*_sequence(arguments)))

    def _call_with_keywords(self) -> None:
        self.stack.pop()
        self._call()

    def _leave_out(self) -> None:
        self.stack.pop()

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **OPCODES,
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.NEWOBJ_EX[0]: _call_with_keywords,
        pickle.BUILD[0]: _leave_out,  # the attributes of an object
    }
