"""Pairs of images in one .npz file: ``pairs:FILE.npz``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dml_fast.data.npz import arrays_in, check_there
from dml_fast.data.pairs import Ids, PairSet, Pixels, constant_squares
from dml_fast.errors import UserError, brief, times

SPARE = 4  # pixels of the margin beyond the search
_SAVE = "save with numpy.savez(PATH, a=..., b=...)"

Array = npt.NDArray[Any]


def check_pairs(path: Path) -> None:
    """Refuse what is no file of pairs, by the names of its arrays.

    Raises:
        UserError: it is not there, or no such file.
    """
    check_there(path, "an .npz file of pairs")
    with arrays_in(path, str(path), _SAVE) as file:
        _check_names(path, file.names)


def read_pairs(path: Path, *, search: int, patch: int, seed: int) -> PairSet:
    """Read the pairs of a file; no pickle is opened.

    Args:
        path: of a file with ``a`` (P, h, w) and ``b`` (P, h + 2m, w + 2m), real numbers, and
            optionally ``offset`` (P, 2), whole numbers; see `PairSet`.
        search: the largest displacement that students tell, in pixels.
        patch: height and width of the crops of a, in pixels.
        seed: of the crops for evaluation.

    Raises:
        UserError: the file is missing, damaged or no .npz file, or its arrays are of other names,
            types or sizes; a pair has a number that is not finite, a crop without contrast, or an
            offset for which the margin is too small.
    """
    check_pairs(path)
    with arrays_in(path, str(path), _SAVE) as file:
        arrays = {name: file.read(name) for name in file.names}
    for name in ("a", "b"):
        _check_images(path, name, arrays[name])
    _check_sizes(path, arrays["a"], arrays["b"], search, patch)
    count = len(arrays["a"])
    offset = np.zeros((count, 2), np.int64)
    if "offset" in arrays:
        offset = _offsets(path, arrays["offset"], count)
    a, b = (_as_float32(path, name, arrays[name]) for name in ("a", "b"))
    for name, images, side in (("a", a, patch), ("b", b, patch + 2 * search)):
        _check_contrast(path, name, images, side)
    pairs = PairSet(a, b, offset, np.arange(count), search, patch, seed)
    check_room(pairs, f"{path}:")
    return pairs


def check_room(pairs: PairSet, where: str) -> None:
    """Refuse an offset with which some displacements could not be shown.

    Raises:
        UserError: it names the first pair with such an offset.
    """
    if len(wrong := np.flatnonzero((np.abs(pairs.offset) > pairs.room).any(axis=1))):
        pair = int(wrong[0])
        rows, columns = pairs.offset[pair].tolist()
        room = " and ".join(map(str, np.unique(pairs.room).tolist()))
        raise UserError(
            f"{where} pair {pairs.names[pair]} has the offset {rows},{columns}, and the margin of "
            f"{pairs.margin} pixels leaves room for {room}: leave {_such(wrong)} out, or give a "
            "wider margin"
        )


def _such(wrong: Sequence[int] | Ids) -> str:
    return "it" if len(wrong) == 1 else f"{len(wrong)} such pairs"


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in ("a", "b"):
        if name not in names:
            there = ", ".join(map(brief, names)) or "no array"
            raise UserError(f"{path} has {there}, and no {name}: {_SAVE}")
    for name in names:
        if name not in ("a", "b", "offset"):
            raise UserError(
                f"{path} has the array {brief(name)}, which is none of a, b, offset: leave it out"
            )


def _check_images(path: Path, name: str, array: Array) -> None:
    if array.ndim != 3 or array.dtype.kind not in "fiub" or 0 in array.shape:
        raise UserError(
            f"{path} has {name} of shape {array.shape} and type {array.dtype}: save real numbers, "
            "(pairs, height, width)"
        )


def _check_sizes(path: Path, a: Array, b: Array, search: int, patch: int) -> None:
    """Refuse images that do not fit each other, or the crops."""
    (count, *size), (others, *wider) = a.shape, b.shape
    if count != others:
        raise UserError(f"{path} has {count} images in a and {others} in b: give as many of each")
    more = [there - here for there, here in zip(wider, size, strict=True)]
    words = f"images of {times(size)} pixels in a and {times(wider)} in b"
    if more[0] != more[1] or more[0] % 2 or more[0] < 0:
        raise UserError(
            f"{path} has {words}: b must be wider and higher than a by twice one margin"
        )
    margin, least = more[0] // 2, search + SPARE
    if margin < least:
        raise UserError(
            f"{path} has {words}, a margin of {margin} pixels, and --search {search} needs "
            f"{least}: give a wider margin, or --search {max(margin - SPARE, 1)}"
        )
    if min(size) < patch:
        raise UserError(
            f"{path} has {words}, and --patch is {patch}: give --patch {min(size)} or less"
        )
    if (room := min(size) - patch + margin - 2 * search) < 0:
        raise UserError(
            f"{path} has {words}, too small to show crops of {patch} pixels displaced by up to "
            f"{search}: give a margin wider by {-room}"
            + (f", or --patch {patch + room}" if patch + room > 1 else "")
        )


def _offsets(path: Path, offset: Array, count: int) -> Ids:
    if offset.shape != (count, 2) or offset.dtype.kind not in "iu":
        raise UserError(
            f"{path} has offset of shape {offset.shape} and type {offset.dtype}: save whole "
            "numbers, (pairs, 2), rows before columns"
        )
    return np.clip(offset.astype(np.float64), -(2**31), 2**31).astype(np.int64)  # no room for these


def _as_float32(path: Path, name: str, array: Array) -> Pixels:
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, dtype=np.float32)
    if len(wrong := np.flatnonzero(~np.isfinite(found).all(axis=(1, 2)))):
        raise UserError(
            f"{path}: pair {wrong[0]} has a number in {name} that is no finite float32 number: "
            f"leave {_such(wrong)} out"
        )
    return found


def _check_contrast(path: Path, name: str, images: Pixels, side: int) -> None:
    if len(wrong := np.flatnonzero(constant_squares(images, side))):
        raise UserError(
            f"{path}: pair {wrong[0]} has a square of {side} x {side} equal pixels in {name}, "
            f"a crop in which nothing can be seen: leave {_such(wrong)} out"
        )
