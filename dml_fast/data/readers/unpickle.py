"""Read the pickled batches of CIFAR without running any code in them.

A pickle is a program: it may name any function and call it. This reader replaces the five names
that a pickled uint8 array contains by objects of its own, and refuses all other names. So a pickle
cannot reach any function of Python or numpy. It can build only numbers, strings, bytes, None,
lists, tuples, sets, dicts, uint8 arrays, and these replacements.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dml_fast.errors import UserError


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
        raise pickle.UnpicklingError("it tries to change a function")


class _DType:
    """A replacement for a dtype, which must be uint8; its state is ignored."""

    __slots__ = ()

    def __init__(self, code: object, *_flags: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not uint8")

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
                sizes = [size for size in shape if type(size) is int and size >= 0]
                if len(sizes) == len(shape) and math.prod(sizes) == len(raw):
                    flat = np.frombuffer(raw, dtype=np.uint8)
                    self.value = flat.reshape(sizes, order="F" if fortran else "C")
                    return
        raise pickle.UnpicklingError("it holds a malformed array")


def _encode(text: object, encoding: object) -> bytes:
    # Python 3 writes bytes as a call of this function in protocols that Python 2 can read
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it holds malformed bytes")
    return text.encode("latin1")


def _not_callable(*_args: object) -> object:
    raise pickle.UnpicklingError("it calls numpy.ndarray")


_STUBS = {
    ("numpy", "ndarray"): _Stub(_not_callable),
    ("numpy", "dtype"): _Stub(_DType),
    ("numpy.core.multiarray", "_reconstruct"): _Stub(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Stub(_Array),
    ("_codecs", "encode"): _Stub(_encode),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a name. The module itself is neither imported nor used."""
        stub = _STUBS.get((module, name))
        if stub is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
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
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise an error of almost any type
        reason = " ".join(str(error).split())
        raise UserError(
            f"{origin} is refused ({reason}): it is damaged or not a CIFAR batch; delete it and "
            "download the data again"
        ) from error
    if not isinstance(batch, dict):
        raise UserError(
            f"{origin} is not a CIFAR batch, which is a dict: delete it and download the data again"
        )
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): (
            getattr(value, "value", None) if isinstance(value, _Array) else value
        )
        for key, value in batch.items()
    }
