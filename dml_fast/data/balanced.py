"""Batches in which all classes are equally frequent."""

from __future__ import annotations

import numpy as np

from dml_fast.data.philox import Draws, Words
from dml_fast.data.sampling import Ids, Order, repeated
from dml_fast.errors import check_whole


class BalancedOrder:
    """Every class in turn, and of each class its rows in turn.

    Permutations of the classes follow one another through all batches and epochs: after any number
    of rows, two classes differ by one row at most. A class's rows come in permutations end to end
    too, so that those of a rare class come round more often. A class without a row is left out.

    Args:
        labels: (N,) int64, none of them -1.
        batch_size: B, of all ranks together.
        seed: of the permutations.
        steps: the number of batches per epoch, at least 1.
    """

    def __init__(self, labels: Ids, batch_size: int, seed: int, steps: int) -> None:
        check_whole("batch_size", batch_size, 1)
        check_whole("steps", steps, 1)
        self.steps = steps
        self._batch_size = batch_size
        self._draws = Draws(seed, "balance")
        _, sizes = np.unique(labels, return_counts=True)
        self._sizes = sizes
        self._rows = np.argsort(labels, kind="stable")  # those of a class together
        self._first = np.cumsum(sizes) - sizes

    def __call__(self, epoch: int) -> Ids:
        """Return indices of rows: (steps, B) int64."""
        length, classes = self.steps * self._batch_size, len(self._sizes)
        start = epoch * length
        turns = np.arange(start // classes, -(-(start + length) // classes))
        words = self._draws.words(np.arange(classes), turns[:, None], 2, view=1)
        order = np.argsort(_keys(words), axis=1, kind="stable")  # the classes of each turn
        rows = np.take_along_axis(self._of_turns(turns), order, axis=1).ravel()
        skipped = start % classes
        return rows[skipped : skipped + length].reshape(self.steps, self._batch_size)

    def _of_turns(self, turns: Ids) -> Ids:
        """Return the row that each class gives in each of T consecutive turns: (T, C) int64."""
        before = turns[0] // self._sizes  # whole permutations of a class before these turns
        rounds = turns[-1] // self._sizes + 1 - before
        counts = rounds * self._sizes
        begin = np.cumsum(counts) - counts
        label = np.repeat(np.arange(len(counts)), counts)
        done, place = np.divmod(np.arange(counts.sum()) - begin[label], self._sizes[label])
        rows = self._rows[self._first[label] + place]
        keys = _keys(self._draws.words(rows, before[label] + done, 2))
        shuffled = rows[np.lexsort((keys, done, label))]
        of_class = turns[:, None] - before * self._sizes
        found: Ids = shuffled[begin + of_class]
        return found


def order_of_rows(
    labels: Ids,
    batch_size: int,
    seed: int,
    *,
    steps: int = 0,
    shards: Ids | None = None,
    balance: bool = False,
) -> Order:
    """Return the order of all rows, as `repeated`, or with ``balance`` of all classes in turn.

    Args:
        labels: (N,) int64; none of them is -1 with ``balance``.
        batch_size: B.
        seed: of the permutations.
        steps: the number of batches per epoch; 0 for N / B, rounded down.
        shards: (N,) int64, the shard of each row; unused with ``balance``.
        balance: whether all classes are equally frequent.

    Raises:
        UserError: ``batch_size`` is above N, where that is not allowed.
    """
    order = repeated(len(labels), batch_size, seed, steps=steps, shards=None if balance else shards)
    return BalancedOrder(labels, batch_size, seed, order.steps) if balance else order


def _keys(words: Words) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """Return two words as one number, by which a stable sort shuffles."""
    high, low = words.astype(np.uint64)
    keys: np.ndarray[tuple[int, ...], np.dtype[np.uint64]] = high << np.uint64(32) | low
    return keys
