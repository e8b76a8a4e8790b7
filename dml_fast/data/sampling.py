"""Which images are in which batch: the order of an epoch as a pure function of (seed, epoch).

The batches here are those of all ranks together. Of the B = R * b images in a batch, rank r takes
the rows [r * b, (r + 1) * b). So all ranks have the same number of steps and see different images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dml_fast.data.philox import Draws, below
from dml_fast.errors import UserError, check_whole

Ids = npt.NDArray[np.int64]

WINDOW = 1 << 16  # images that are shuffled together, at least
LANES = 8  # windows that are read from at once, at most


class Order(Protocol):
    """The batches of every epoch.

    Attributes:
        steps: the number of batches per epoch, the same in all epochs.
    """

    steps: int

    def __call__(self, epoch: int) -> Ids:
        """Return indices of images: (steps, B) int64."""
        ...


class ShuffledOrder:
    """A new permutation of the images in every epoch, without the last N mod B of it.

    Args:
        count: N.
        batch_size: B, 1..N.
        seed: of the permutations.

    Raises:
        UserError: ``batch_size`` is not in 1..N.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        check_whole("batch_size", batch_size, 1)
        if batch_size > count:
            raise UserError(
                f"batch size {batch_size} does not fit {count} training rows: "
                f"choose a --batch-size from 1 to {count}"
            )
        self.steps = count // batch_size
        self._count, self._batch_size = count, batch_size
        self._draws = Draws(seed, "order")

    def __call__(self, epoch: int) -> Ids:
        """Return indices of images: (steps, B) int64."""
        order = self.permutation(epoch)
        return order[: self.steps * self._batch_size].reshape(self.steps, self._batch_size)

    def permutation(self, epoch: int) -> Ids:
        """Return all images in the order of an epoch: (N,) int64."""
        return self._draws.permutation(self._count, epoch)


class CyclicOrder:
    """Permutations of the images end to end: they come round as often as the steps need.

    The second epoch goes on where the first ended. A batch may hold an image twice, at the seam of
    two permutations, or because it is larger than N.

    Args:
        count: N.
        batch_size: B, at least 1.
        seed: of the permutations.
        steps: the number of batches per epoch, at least 1.
        purpose: of the random numbers.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, steps: int, purpose: str = "order"
    ) -> None:
        for name, value in (("count", count), ("batch_size", batch_size), ("steps", steps)):
            check_whole(name, value, 1)
        self.steps = steps
        self._count, self._batch_size = count, batch_size
        self._draws = Draws(seed, purpose)

    def __call__(self, epoch: int) -> Ids:
        """Return indices of images: (steps, B) int64."""
        length = self.steps * self._batch_size
        first, start = divmod(epoch * length, self._count)
        turns = range(first, first - (-(start + length) // self._count))
        drawn = np.concatenate([self._draws.permutation(self._count, turn) for turn in turns])
        return drawn[start : start + length].reshape(self.steps, self._batch_size)


class Regrouped:
    """Batches of another order in epochs of another length; they come round as often as needed.

    Args:
        order: the batches.
        steps: the number of batches per epoch, at least 1.
    """

    def __init__(self, order: Order, steps: int) -> None:
        check_whole("steps", steps, 1)
        self.steps = steps
        self._order = order

    def __call__(self, epoch: int) -> Ids:
        """Return indices of images: (steps, B) int64."""
        first, start = divmod(epoch * self.steps, self._order.steps)
        rounds = range(first, first - (-(start + self.steps) // self._order.steps))
        drawn = np.concatenate([self._order(each) for each in rounds])
        return drawn[start : start + self.steps]


class ShardOrder:
    """An order that reads tar shards one after another and mixes images of several shards.

    In every epoch the shards are shuffled and grouped into windows of whole shards, with at least
    ``window`` images each. Images are shuffled within their window. If there is only one window,
    this is a `ShuffledOrder`. With several windows, the order is cut into lanes, which are
    contiguous and equally long, and each batch takes the next images of every lane. So the rows of
    a rank come from its own part of the shards in all batches. The lanes depend on B alone: batches
    are the same with any number of ranks.

    Args:
        shards: (N,) int64, the shard of each image.
        batch_size: B, 1..N.
        seed: of the permutations.
        window: the least number of images that are shuffled together.

    Raises:
        UserError: ``batch_size`` is not in 1..N.
    """

    def __init__(self, shards: Ids, batch_size: int, seed: int, window: int) -> None:
        self._plain = ShuffledOrder(len(shards), batch_size, seed)
        self.steps = self._plain.steps
        self._batch_size, self._window = batch_size, window
        _, self._shard, self._sizes = np.unique(shards, return_inverse=True, return_counts=True)
        self._draws = Draws(seed, "shards")

    def __call__(self, epoch: int) -> Ids:
        """Return indices of images: (steps, B) int64."""
        shuffled = self._plain.permutation(epoch)
        windows = self._windows(epoch)
        lanes = math.gcd(self._batch_size, LANES) if windows.any() else 1
        order = shuffled[np.argsort(windows[self._shard[shuffled]], kind="stable")]
        cut = order[: self.steps * self._batch_size].reshape(lanes, self.steps, -1)
        return cut.transpose(1, 0, 2).reshape(self.steps, self._batch_size)

    def _windows(self, epoch: int) -> Ids:
        """Return each shard's window, (shards,) int64; shards left at the end join the last one."""
        order = self._draws.permutation(len(self._sizes), epoch)
        windows = np.empty_like(order)
        number = held = 0
        left = int(self._sizes.sum())
        for shard in order.tolist():
            if held >= self._window and left >= self._window:
                number, held = number + 1, 0
            windows[shard] = number
            held, left = held + int(self._sizes[shard]), left - int(self._sizes[shard])
        return windows


def repeated(
    count: int, batch_size: int, seed: int, *, steps: int = 0, shards: Ids | None = None
) -> Order:
    """Return the order of all rows: one pass in an epoch, or as many rounds as the steps need.

    Args:
        count: N.
        batch_size: B.
        seed: of the permutations.
        steps: the number of batches per epoch; 0 for one pass.
        shards: (N,) int64, the shard of each row; None where rows are not read from shards.

    Raises:
        UserError: ``batch_size`` is above N, where that is not allowed.
    """
    if shards is not None:
        order = ShardOrder(shards, batch_size, seed, WINDOW)
        return Regrouped(order, steps) if steps else order
    if steps:
        return CyclicOrder(count, batch_size, seed, steps)
    return ShuffledOrder(count, batch_size, seed)


class IdentityOrder:
    """Batches of K images of each of P identities (Hermans et al., arXiv 1703.07737, section 2).

    In every epoch an identity's images are shuffled and cut into groups of K, and the rest is left
    out. An identity with fewer than K images is one group, in which some images are drawn again. No
    batch holds two groups of an identity.

    Args:
        labels: (N,) int64 identities.
        batch_size: B = P K.
        num_instances: K, a divisor of B.
        seed: of everything random.

    Raises:
        UserError: K does not divide B, or there are fewer than P identities.
    """

    def __init__(self, labels: Ids, batch_size: int, num_instances: int, seed: int) -> None:
        check_whole("batch_size", batch_size, 1)
        check_whole("num_instances", num_instances, 1)
        if batch_size % num_instances:
            raise UserError(
                f"--num-instances {num_instances} does not divide --batch-size {batch_size}: "
                "give a divisor of it"
            )
        self._each = num_instances
        self._identities = batch_size // num_instances
        self._draws = Draws(seed, "identities")
        _, label, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        self._label, self._sizes = label, sizes
        groups = np.maximum(sizes // num_instances, 1)
        # T batches can be filled if and only if there are P T groups, with at most T of an identity
        self.steps = int(groups.sum()) // self._identities
        while self.steps and np.minimum(groups, self.steps).sum() < self._identities * self.steps:
            self.steps -= 1
        if not self.steps:
            raise UserError(
                f"a batch of {batch_size} images, {num_instances} of each identity, needs "
                f"{self._identities} identities to train on and there are {len(sizes)}: "
                "give a smaller --batch-size or a larger --num-instances"
            )
        self._groups = np.minimum(groups, self.steps)

    def __call__(self, epoch: int) -> Ids:
        """Return (steps, B) indices of images; the K of an identity are next to each other."""
        draws = self._draws
        groups = self._drop(epoch)
        # Identities in a random order put their groups into one step after another, and begin again
        # at the first step after the last. No identity has more groups than there are steps, so no
        # step holds two groups of an identity.
        order = draws.permutation(len(groups), epoch, 0)
        owner = np.repeat(order, groups[order])
        columns = draws.permutation(self.steps, epoch, 1)
        placed = owner.reshape(self._identities, self.steps)[:, columns]
        images = self._deal(groups, epoch)  # (all groups, K), those of an identity together
        turn = place_among_equals(placed.ravel())
        first = np.cumsum(groups) - groups
        rows = first[placed.ravel()] + turn
        batches = images[rows].reshape(self._identities, self.steps, self._each)
        ordered: Ids = batches.transpose(1, 0, 2).reshape(self.steps, -1)
        return ordered

    def _drop(self, epoch: int) -> Ids:
        """Return how many groups of each identity are used, P T in all; a few are left out."""
        owners = np.repeat(np.arange(len(self._groups)), self._groups)
        order = self._draws.permutation(len(owners), epoch, 2)
        kept = owners[order[: self._identities * self.steps]]
        return np.bincount(kept, minlength=len(self._groups))

    def _deal(self, groups: Ids, epoch: int) -> Ids:
        """Draw each identity's groups of images: (sum of ``groups``, K) int64."""
        order = self._draws.permutation(len(self._label), epoch, 3)
        order = order[np.argsort(self._label[order], kind="stable")]  # shuffled within identities
        first = np.cumsum(self._sizes) - self._sizes
        owner = np.repeat(np.arange(len(groups)), groups)
        turn = place_among_equals(owner)
        place = turn[:, None] * self._each + np.arange(self._each)
        size = self._sizes[owner, None]
        words = self._draws.words(np.arange(place.size).reshape(place.shape), epoch, 1, view=4)
        again = below(words[0], size)  # used only for an identity with fewer than K images
        dealt: Ids = order[first[owner, None] + np.where(place < size, place, again)]
        return dealt


def sequential(count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Ids]:
    """Yield the indices 0..count-1 in order; all ranks together see each once.

    A rank takes every R-th batch. The last batch may be short. It is not padded: evaluation is not
    captured in a graph or compiled, and every metric would have to leave the padding out again.

    Args:
        count: N.
        batch_size: B, at least 1; it may exceed N.
        rank: 0..ranks-1.
        ranks: R.

    Yields:
        (<= B,) int64.
    """
    for start in range(rank * batch_size, count, ranks * batch_size):
        yield np.arange(start, min(start + batch_size, count))


def share_of(size: int, rank: int, ranks: int) -> slice:
    """Return which of a batch's ``size`` rows a rank takes, of ``ranks``, which divide them."""
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def steps_from(start: int, steps: int) -> range:
    """Return the steps of an epoch from ``start`` (0..steps) on.

    Raises:
        IndexError: there is no such step.
    """
    if not 0 <= start <= steps:
        raise IndexError(f"step {start} is outside 0..{steps}")
    return range(start, steps)


def place_among_equals(values: Ids) -> Ids:
    """Count, for each of N values, the equal values before it: (N,) int64."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    places = np.empty_like(values)
    places[order] = np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))
    return places
