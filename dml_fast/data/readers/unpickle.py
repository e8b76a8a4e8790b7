"""Reads CIFAR's pickled batches without running anything that is in them.

A pickle is a program: it may name any function and call it. This reader answers the five names
that a pickled uint8 array contains with objects of its own and refuses every other name, so no
function of Python's or numpy's can be reached. What it can build: numbers, strings, bytes, None,
lists, tuples, sets, dicts, uint8 arrays, and the inert stand-ins themselves.
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
    """Stands for a global: may be called and nothing else.

    An instance rather than a function or class: pickle can set attributes of a function and
    make instances of a class without calling it.
    """

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., object]) -> None:
        self._build = build

    def __call__(self, *args: object) -> object:
        return self._build(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it tries to change a function")


class _DType:
    """A dtype in the making: only uint8 is let through, so its state says nothing."""

    __slots__ = ()

    def __init__(self, code: object, *_flags: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not uint8")

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """An array in the making: empty until pickle hands over its state."""

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
    # how Python 3 writes bytes in a protocol that Python 2 can read
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
        """Answers with a stub; the real module is never imported or looked into."""
        stub = _STUBS.get((module, name))
        if stub is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stub


def read_batch(raw: bytes, origin: str) -> dict[str, Any]:
    """Reads a pickled dict of plain values and uint8 arrays, as CIFAR's batches are.

    Args:
        raw: the file's bytes.
        origin: the file's name, for messages.

    Returns:
        The dict with its keys as str; strings of Python 2 are bytes. Arrays are read-only.

    Raises:
        UserError: the file is damaged, or names anything but a uint8 array.
    """
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise nearly anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"{origin} is refused ({reason}): it is damaged or no CIFAR batch; delete it and fetch "
            "the data again"
        ) from error
    if not isinstance(batch, dict):
        raise UserError(
            f"{origin} is not a CIFAR batch: it holds no dict; delete it and fetch the data again"
        )
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): (
            getattr(value, "value", None) if isinstance(value, _Array) else value
        )
        for key, value in batch.items()
    }
