"""Pairs of images of one scene, roughly aligned, and the crops of them that students see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.names import Names
from dml_fast.data.philox import Draws, Words, below
from dml_fast.models.inputs import InputSpec

Ids = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.float32]

WORDS = 6  # random words that decide a crop: displacement, place and flips, each in two directions


class Crops(NamedTuple):
    """Where the crops of N pairs lie; rows come before columns everywhere.

    Attributes:
        shown: (N, 2) int64, the displacement t that is seen: what is at u in the crop of a is at
            u + search + t in the crop of b, in pixels.
        in_a: (N, 2) int64, the first row and column of the crop of a, patch x patch pixels.
        in_b: (N, 2) int64, likewise of b, whose crop is wider by ``search`` pixels on each side.
        flipped: (N, 2) int64, whether the rows, and the columns, of both crops are flipped, 0 or 1.
    """

    shown: Ids
    in_a: Ids
    in_b: Ids
    flipped: Ids


@dataclass(frozen=True)
class PairSet:
    """P pairs of images (a, b), b with a margin of m pixels on each side.

    Attributes:
        a: (P, h, w) float32.
        b: (P, h + 2m, w + 2m) float32.
        offset: (P, 2) int64, the known displacement: what is at u in a is at u + m + offset in b.
        numbers: (P,) int64, the pairs' indices in their file, which are their names too.
        search: R, the largest displacement that students tell, in pixels.
        patch: height and width of the crops of a, in pixels.
        seed: of the displacement and the place that each pair is evaluated with.
    """

    a: Pixels
    b: Pixels
    offset: Ids
    numbers: Ids
    search: int
    patch: int
    seed: int

    def __len__(self) -> int:
        return len(self.numbers)

    def subset(self, ids: Ids) -> PairSet:
        """Return copies of the pairs ``ids`` (n,) int64, in that order."""
        return replace(
            self,
            a=self.a[ids],
            b=self.b[ids],
            offset=self.offset[ids],
            numbers=self.numbers[ids],
        )

    @property
    def names(self) -> Sequence[str]:
        """P names: the numbers as text."""
        return Names(str, self.numbers)

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What a student gets for a pair: both crops in one tensor."""
        return (InputSpec("pair", (1, 1, self.patch, self.search)),)

    @property
    def margin(self) -> int:
        """Return m, in pixels."""
        more: int = self.b.shape[1] - self.a.shape[1]
        return more // 2

    @property
    def room(self) -> Ids:
        """Return (2,) int64: the offsets up to which every displacement can be shown, in pixels."""
        size = np.array(self.a.shape[1:], np.int64)
        return size - self.patch + self.margin - 2 * self.search

    @cached_property
    def labels(self) -> Ids:
        """The displacement that each pair is evaluated with, as an index of the classes, (P,)."""
        return label_of(self.to_evaluate(np.arange(len(self))).shown, self.search)

    def to_evaluate(self, ids: Ids) -> Crops:
        """Return the crops that pairs are evaluated with, which depend on the seed alone.

        Args:
            ids: (N,) int64, indices of pairs.
        """
        words = Draws(self.seed, "pairs to evaluate").words(self.numbers[ids], 0, WORDS)
        return self.crops(ids, words, flip=False)

    def crops(self, ids: Ids, words: Words, *, flip: bool) -> Crops:
        """Return crops of pairs with random displacements at random places.

        All displacements are equally likely; so are all places where one can be shown.

        Args:
            ids: (N,) int64, indices of pairs.
            words: (WORDS, N) uint32 random words.
            flip: whether rows, and columns, of both crops are flipped at random. The displacement
                in the pair is then such that the flipped one is as was drawn.
        """
        shown = below(words[:2].T, 2 * self.search + 1) - self.search
        flipped = below(words[4:6].T, 2) * int(flip)
        moved = np.where(flipped, -shown, shown)
        first = self.margin + self.offset[ids] - self.search - moved  # of b, for a crop of a at 0
        size = np.array(self.a.shape[1:], np.int64)
        spare = size + 2 * self.margin - self.patch - 2 * self.search
        low, high = np.maximum(0, -first), np.minimum(size - self.patch, spare - first)
        in_a = low + below(words[2:4].T, high - low + 1)
        return Crops(shown, in_a, in_a + first, flipped)


def label_of(displacements: Ids, search: int) -> Ids:
    """Return displacements (..., 2) within the square as indices of its classes, (...) int64."""
    label: Ids = (
        (displacements[..., 0] + search) * (2 * search + 1) + displacements[..., 1] + search
    )
    return label


def displacement_of(labels: Ids, search: int) -> Ids:
    """Return the displacements (..., 2) int64 in pixels, rows and columns, of classes (...)."""
    return np.stack(np.divmod(labels, 2 * search + 1), -1) - search


def displacement_names(search: int) -> tuple[str, ...]:
    """Return the names of the (2 search + 1)^2 classes, row by row: "-8,-8" is the first."""
    steps = range(-search, search + 1)
    return tuple(f"{rows},{columns}" for rows in steps for columns in steps)


def constant_squares(images: Pixels, side: int) -> npt.NDArray[np.bool_]:
    """Return which of P images (P, h, w) have a square of side x side equal pixels, (P,) bool."""
    found = [_constant_squares(images[i : i + 256], side) for i in range(0, len(images), 256)]
    return np.concatenate(found)


def _constant_squares(images: Pixels, side: int) -> npt.NDArray[np.bool_]:
    down = _sums(images[:, 1:] != images[:, :-1], side - 1, side)
    right = _sums(images[:, :, 1:] != images[:, :, :-1], side, side - 1)
    same: npt.NDArray[np.bool_] = ((down == 0) & (right == 0)).any(axis=(1, 2))
    return same


def _sums(marks: npt.NDArray[np.bool_], height: int, width: int) -> npt.NDArray[np.int64]:
    """Return how many marks each window of height x width pixels has, at each of its places."""
    total = np.zeros((len(marks), marks.shape[1] + 1, marks.shape[2] + 1), np.int64)
    marks.cumsum(1, dtype=np.int64).cumsum(2, out=total[:, 1:, 1:])
    rows: npt.NDArray[np.int64] = total[:, height:] - total[:, : total.shape[1] - height]
    columns: npt.NDArray[np.int64] = rows[:, :, width:] - rows[:, :, : rows.shape[2] - width]
    return columns
