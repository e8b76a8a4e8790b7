"""Which images make up which batch: orders of an epoch as pure functions of (seed, epoch)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from dml_fast.errors import UserError
from dml_fast.rng import numpy_generator

Ids = npt.NDArray[np.int64]


class Order(Protocol):
    """The batches of every epoch.

    Attributes:
        steps: batches an epoch, the same in all epochs.
    """

    steps: int

    def __call__(self, epoch: int) -> Ids:
        """Returns (steps, B) indices of images."""
        ...


class ShuffledOrder:
    """Every epoch another permutation of the images; the N mod B at its end are left out.

    Args:
        count: N.
        batch_size: B, 1..N.
        seed: of the permutations.

    Raises:
        UserError: ``batch_size`` is not in 1..N.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= count:
            raise UserError(
                f"batch size {batch_size} does not fit {count} training images: "
                f"choose a --batch-size from 1 to {count}"
            )
        self.steps = count // batch_size
        self._count, self._batch_size, self._seed = count, batch_size, seed

    def __call__(self, epoch: int) -> Ids:
        """Returns (steps, B) indices of images."""
        order = numpy_generator(self._seed, "order", epoch).permutation(self._count)
        return order[: self.steps * self._batch_size].reshape(self.steps, self._batch_size)


class IdentityOrder:
    """Batches of K images of each of P identities (Hermans et al., arXiv 1703.07737, section 2).

    An identity's images are cut into groups of K, others in every epoch; what is left over is left
    out of that epoch. An identity with fewer than K images is one group, filled up by drawing some
    of them again. No batch holds two groups of an identity.

    Args:
        labels: (N,) identities.
        batch_size: B = P K.
        num_instances: K, a divisor of B.
        seed: of everything random.

    Raises:
        UserError: K does not divide B, or there are fewer than P identities.
    """

    def __init__(self, labels: Ids, batch_size: int, num_instances: int, seed: int) -> None:
        if num_instances < 1 or batch_size % num_instances:
            raise UserError(
                f"--num-instances {num_instances} does not divide --batch-size {batch_size}: "
                "give a divisor of it"
            )
        self._each = num_instances
        self._identities = batch_size // num_instances
        self._seed = seed
        _, label, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        self._label, self._sizes = label, sizes
        groups = np.maximum(sizes // num_instances, 1)
        # T batches can be filled if and only if, with at most T groups of each, there are P T
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
        """Returns (steps, B) indices of images, an identity's K next to each other."""
        rng = numpy_generator(self._seed, "identities", epoch)
        groups = self._drop(rng)
        # Identities in a random order take their groups' places one after another, around and
        # around the steps: as none has more groups than there are steps, none meets itself.
        order = rng.permutation(len(groups))
        owner = np.repeat(order, groups[order])
        placed = owner.reshape(self._identities, self.steps)[:, rng.permutation(self.steps)]
        images = self._deal(groups, rng)  # (groups in all, K), an identity's together
        turn = _rank_among_equals(placed.ravel())
        first = np.cumsum(groups) - groups
        rows = first[placed.ravel()] + turn
        batches = images[rows].reshape(self._identities, self.steps, self._each)
        ordered: Ids = batches.transpose(1, 0, 2).reshape(self.steps, -1)
        return ordered

    def _drop(self, rng: np.random.Generator) -> Ids:
        """How many groups each identity gives, P T in all: a random few are left out."""
        owners = np.repeat(np.arange(len(self._groups)), self._groups)
        kept = rng.permutation(owners)[: self._identities * self.steps]
        return np.bincount(kept, minlength=len(self._groups))

    def _deal(self, groups: Ids, rng: np.random.Generator) -> Ids:
        """Draws each identity's groups of images: (sum of ``groups``, K)."""
        order = rng.permutation(len(self._label))
        order = order[np.argsort(self._label[order], kind="stable")]  # shuffled within identities
        first = np.cumsum(self._sizes) - self._sizes
        owner = np.repeat(np.arange(len(groups)), groups)
        turn = _rank_among_equals(owner)
        place = turn[:, None] * self._each + np.arange(self._each)
        size = self._sizes[owner, None]
        again = rng.integers(0, size, place.shape)  # only used where images are too few
        dealt: Ids = order[first[owner, None] + np.where(place < size, place, again)]
        return dealt


def _rank_among_equals(values: Ids) -> Ids:
    """For each value how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    ranks = np.empty_like(values)
    ranks[order] = np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))
    return ranks
