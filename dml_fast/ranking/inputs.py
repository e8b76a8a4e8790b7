"""Arguments for ranking, numpy arrays or tensors, converted to what the C++ code takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dml_fast.errors import UserError, brief, first_line

if TYPE_CHECKING:
    from torch import Tensor

ArrayLike: TypeAlias = "NDArray[Any] | Tensor | list[Any] | tuple[Any, ...]"
Floats: TypeAlias = "NDArray[np.float32] | NDArray[np.float64]"
Ints: TypeAlias = NDArray[np.int64]

_MOST_INT64 = 2**63 - 1


def as_numpy(value: ArrayLike, name: str) -> NDArray[Any]:
    """Return the same numbers as an array: a CPU tensor's memory, or a CUDA tensor's copy.

    Raises:
        UserError: ``value``, called ``name``, has masked entries, or cannot be an array, as lists
            of different lengths or sparse tensors.
    """
    if isinstance(value, np.ma.MaskedArray) and (hidden := int(np.ma.getmaskarray(value).sum())):
        raise UserError(f"{name} has {hidden} masked entries: fill or remove them")
    try:
        if hasattr(value, "detach"):
            tensor = value.detach().cpu()
            if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such type
                tensor = tensor.float()
            return np.asarray(tensor.numpy())
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        raise UserError(
            f"{name} is {brief(value)}, which is no array ({first_line(error)}): pass a numpy "
            "array or a dense tensor"
        ) from None


def as_floats(value: ArrayLike, name: str, shape: str) -> Floats:
    """Return a C-contiguous (rows, columns) array of float32 or float64; float64 stays float64.

    Args:
        value: float32 and float64 are taken as they are (copied only if strided or misaligned);
            float16, bfloat16 and integers become the smallest of these types that holds them.
        name: for messages.
        shape: for messages, for example ``(Q, G)``.

    Raises:
        UserError: not two-dimensional, empty, or not numbers.
    """
    array = as_numpy(value, name)
    if array.ndim != 2:
        raise UserError(f"{name} has {array.ndim} dimension(s): pass {shape}")
    if 0 in array.shape:
        raise UserError(f"{name} is empty, its shape is {array.shape}: pass {shape}")
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise UserError(f"{name} has type {array.dtype}: pass float32 or float64")
    single = np.can_cast(array.dtype, np.float32)
    return np.require(array, np.float32 if single else np.float64, ["C", "A"])


def as_ids(value: ArrayLike, name: str, length: int) -> NDArray[Any]:
    """Return identities or cameras as (length,) int64, strings or bytes; uint64 beyond int64.

    Raises:
        UserError: length, shape or type do not fit.
    """
    array = as_numpy(value, name)
    if array.ndim != 1 or len(array) != length:
        raise UserError(f"{name} has shape {array.shape}: pass one for each row, ({length},)")
    if array.dtype.kind == "T":  # numpy's strings of any length
        array = array.astype(np.str_)
    if array.dtype.kind not in "iuUS":
        raise UserError(
            f"{name} has type {array.dtype}: pass integers up to 64 bits, strings or bytes"
        )
    if array.dtype.kind in "US":
        return array
    if array.dtype.kind == "u" and array.size and int(array.max()) > _MOST_INT64:
        return array.astype(np.uint64)
    return array.astype(np.int64)


def comparable(
    q: NDArray[Any], g: NDArray[Any], q_name: str, g_name: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return two arrays of `as_ids` so that numpy compares them without rounding.

    Raises:
        UserError: one holds integers, strings or bytes, and the other does not.
    """
    kinds = {q.dtype.kind, g.dtype.kind}
    if len(kinds) == 1:
        return q, g
    if kinds == {"i", "u"}:  # numpy would compare them in float64
        return q.astype(object), g.astype(object)
    raise UserError(
        f"{q_name} has type {q.dtype} and {g_name} {g.dtype}: pass integers, strings or bytes "
        "for both"
    )
