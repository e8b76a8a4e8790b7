"""Read the pickled batches of CIFAR without running any code in them.

A pickle is a program: it may name any function and call it. This reader replaces the five names
that a pickled uint8 array contains by objects of its own, and refuses all other names. So a pickle
cannot reach any function of Python or numpy. It can build only numbers, strings, bytes, None,
lists, tuples, dicts, uint8 arrays, and these replacements. Keys of dicts are strings and bytes:
to hash nested tuples may crash, or never end.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dml_fast.errors import brief
from dml_fast.foreign import Unfit, reading


class _Stub:
    """A replacement for a global name in a pickle: it can be called, but not changed.

    It is neither a function nor a class: pickle can set attributes of a function, and make an
    instance of a class without calling it.
    """

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., object]) -> None:
        self._build = build

    def __call__(self, *args: object) -> object:
        return self._build(*args)

    def __setstate__(self, state: object) -> None:
        raise Unfit("it tries to change a function")


class _DType:
    """A replacement for a dtype, which must be uint8; its state is ignored."""

    __slots__ = ()

    def __init__(self, code: object, *_flags: object) -> None:
        if code not in ("u1", b"u1"):
            raise Unfit(f"it holds an array of type {brief(code)}, not uint8")

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """A replacement for an array; ``value`` is set when pickle sets the state."""

    __slots__ = ("value",)

    value: npt.NDArray[np.uint8]

    def __init__(self, *_args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _DType(), bool() as fortran, bytes() as raw):
                sizes = [size for size in shape[:3] if type(size) is int and 0 <= size < 1 << 40]
                if len(sizes) == len(shape) and math.prod(sizes) == len(raw):
                    flat = np.frombuffer(raw, dtype=np.uint8)
                    self.value = flat.reshape(sizes, order="F" if fortran else "C")
                    return
        raise Unfit("it holds a malformed array")


def _encode(text: object, encoding: object) -> bytes:
    # Python 3 writes bytes as a call of this function in protocols that Python 2 can read
    if not isinstance(text, str) or encoding != "latin1":
        raise Unfit("it holds malformed bytes")
    return text.encode("latin1")


def _not_callable(*_args: object) -> object:
    raise Unfit("it calls numpy.ndarray")


_STUBS = {
    ("numpy", "ndarray"): _Stub(_not_callable),
    ("numpy", "dtype"): _Stub(_DType),
    ("numpy.core.multiarray", "_reconstruct"): _Stub(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Stub(_Array),
    ("_codecs", "encode"): _Stub(_encode),
}


# Left out are sets, instances of classes, persistent and extension ids, and buffers.
_ALLOWED = [
    ord(getattr(pickle, name))
    for names in (
        "PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET",
        "LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT",
        "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8",
        "SHORT_BINBYTES BINBYTES BINBYTES8 LIST EMPTY_LIST APPEND APPENDS TUPLE EMPTY_TUPLE TUPLE1",
        "TUPLE2 TUPLE3 EMPTY_DICT GLOBAL STACK_GLOBAL INST REDUCE BUILD",
    )
    for name in names.split()
]


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler; the one in C takes memory for the number of a place in its memo."""

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]

    def _no_operation(self) -> None:
        raise Unfit("it holds an operation that a batch does not need")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        if type(self.stack[-1]) is not dict or type(key) not in (str, bytes):
            raise Unfit("it holds a malformed dict")
        self.stack[-1][key] = value

    dispatch: ClassVar[dict[int, Any]] = (
        dict.fromkeys(range(256), _no_operation)
        | {code: pickle._Unpickler.dispatch[code] for code in _ALLOWED}
        | {ord("s"): _set_item, ord("u"): _set_items, ord("d"): _dict}
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a name. The module itself is neither imported nor used."""
        stub = _STUBS.get((module, name))
        if stub is None:
            raise Unfit(f"it asks for {module}.{name}")
        return stub


def read_batch(raw: bytes, origin: str) -> dict[str, Any]:
    """Read a pickled dict of plain values and uint8 arrays, such as a batch of CIFAR.

    Args:
        raw: the content of the file.
        origin: the name of the file, for messages.

    Returns:
        The dict, with keys as str and strings of Python 2 as bytes. Arrays are read-only.

    Raises:
        UserError: the file is damaged, or names something else than the parts of a uint8 array.
    """
    with reading(origin, "delete it and download the data again"):
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise Unfit("it is not a dict")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): (
            getattr(value, "value", None) if isinstance(value, _Array) else value
        )
        for key, value in batch.items()
    }
