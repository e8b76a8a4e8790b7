"""Batches of pairs: all pairs are on the device, and a batch is one gather from each side.

Each time a pair is shown, its displacement is drawn anew, and is its label. What is drawn is a
function of (seed, epoch, step, pair). So there is no state to save, and any number of ranks see the
same crops.
"""

from __future__ import annotations

import logging
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from dml_fast.data.loaders.assemble import Batch, TrainBatch
from dml_fast.data.pairs import WORDS, Crops, Ids, PairSet, label_of
from dml_fast.data.philox import Draws
from dml_fast.data.sampling import Order, place_among_equals, sequential, share_of, steps_from

_FEW = 100  # pairs
_TURN = 1 << 24  # a pair that is in a batch twice is drawn as if in another step

_log = logging.getLogger("dml_fast")


class PairLoader:
    """Training batches of pairs that are on the device.

    No global random generator is read or changed.

    Args:
        pairs: P of them.
        order: the batches of all ranks together.
        seed: the run's seed.
        device: where batches are made.
        dither: the deviation of soft targets in pixels; 0 for hard ones.
        symmetrise: whether rows and columns of both crops are flipped at random.
        rank: the rank of this process, 0..ranks-1; it takes that share of each batch.
        ranks: R, a divisor of the batch size of ``order``.
    """

    def __init__(
        self,
        pairs: PairSet,
        order: Order,
        *,
        seed: int,
        device: torch.device | str,
        dither: float = 0.0,
        symmetrise: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.steps_per_epoch = order.steps
        self._pairs, self._order, self._rank, self._ranks = pairs, order, rank, ranks
        self._draws = Draws(seed, "pairs")
        self._symmetrise = symmetrise
        self._cutter = Cutter(pairs, torch.device(device))
        self._shares = torch.from_numpy(_dithered(pairs.search, dither)) if dither else None
        if len(pairs) < _FEW:
            _log.warning(
                "%d training pairs are few: with 80 the errors of their alignment were learned by "
                "heart (4.1 to 5.2 px on other pairs), with 1,000 they were not",
                len(pairs),
            )

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[TrainBatch]:
        """Yield the batches of ``epoch`` from ``start_step`` (0..steps_per_epoch) on."""
        steps = steps_from(start_step, self.steps_per_epoch)
        batches = self._order(epoch)
        mine = share_of(batches.shape[1], self._rank, self._ranks)
        for step in steps:
            ids = batches[step]
            view = step + _TURN * place_among_equals(ids)
            words = self._draws.words(ids, epoch, WORDS, view=view)[:, mine]
            crops = self._pairs.crops(ids[mine], words, flip=self._symmetrise)
            inputs, target, sent = self._cutter(ids[mine], crops)
            if self._shares is not None:
                target = self._soft(crops).to(inputs.device)
            yield TrainBatch(inputs, target, sent)

    def close(self) -> None:
        """Free the pairs."""
        self._cutter.close()

    def _soft(self, crops: Crops) -> Tensor:
        """Return the shares of all displacements, (N, C) float32, rows that sum to 1."""
        assert self._shares is not None
        rows, columns = self._shares[torch.from_numpy(crops.shown.T + self._pairs.search)]
        soft: Tensor = (rows[:, :, None] * columns[:, None, :]).flatten(1)
        return soft


class Cutter:
    """Cuts crops out of pairs that are on the device.

    Args:
        pairs: P of them.
        device: where they are kept.
    """

    def __init__(self, pairs: PairSet, device: torch.device) -> None:
        self._device, self._patch, self._search = device, pairs.patch, pairs.search
        self._a, self._b = (torch.as_tensor(side).to(device) for side in (pairs.a, pairs.b))

    def __call__(self, ids: Ids, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets and indices of N crops.

        Args:
            ids: (N,) int64, the pairs that they are of.
            crops: where they are.

        Returns:
            (N, 2, S, S) float32, the crop of a in the middle of zeros and that of b; (N,) int64
            classes; (N,) int64 ``ids``; all on the device.
        """
        numbers = np.concatenate(
            [np.stack([ids, label_of(crops.shown, self._search)]), *(x.T for x in crops[1:])]
        )
        sent = torch.from_numpy(numbers)  # one small copy
        if self._device.type == "cuda":
            sent = sent.pin_memory()
        sent = sent.to(self._device, non_blocking=True)
        row, target, *place = sent
        patch, side = self._patch, self._patch + 2 * self._search
        inputs = self._a.new_zeros(len(ids), 2, side, side)
        middle = slice(self._search, self._search + patch)
        inputs[:, 0, middle, middle] = _cut(self._a, row, place[0:2], place[4:6], patch)
        inputs[:, 1] = _cut(self._b, row, place[2:4], place[4:6], side)
        return inputs, target, row

    def close(self) -> None:
        """Free the pairs."""
        self._a = self._b = torch.empty(0)


def pair_batches(
    pairs: PairSet, *, batch_size: int, device: torch.device, rank: int, ranks: int
) -> Generator[Batch]:
    """Yield every pair once, in order: see `dml_fast.data.loaders.evaluation_batches`."""
    for ids in sequential(len(pairs), batch_size, rank, ranks):
        part = pairs.subset(ids)  # so that only these are on the device
        places = np.arange(len(ids))
        inputs, target, _ = Cutter(part, device)(places, part.to_evaluate(places))
        yield Batch(inputs, target, torch.from_numpy(ids).to(device))


def _cut(
    images: Tensor, row: Tensor, first: list[Tensor], flipped: list[Tensor], side: int
) -> Tensor:
    """Return squares (N, side, side) of images (P, h, w).

    Args:
        images: to cut from.
        row: (N,) their indices.
        first: two (N,), the first row and the first column.
        flipped: two (N,), 1 where the rows, and where the columns, are flipped.
        side: of the squares, in pixels.
    """
    steps = torch.arange(side, device=images.device)
    rows, columns = (
        start[:, None] + torch.where(turned[:, None] != 0, side - 1 - steps, steps)
        for start, turned in zip(first, flipped, strict=True)
    )
    _, height, width = images.shape
    place = ((row * height)[:, None] + rows) * width
    return images.view(-1)[place[:, :, None] + columns[:, None, :]]


def _dithered(search: int, dither: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return the shares of 2R + 1 displacements, in each row around another: (2R + 1, 2R + 1).

    They are those of a normal distribution of deviation ``dither``, cut off at the square's border.
    """
    steps = np.arange(2 * search + 1, dtype=np.float64)
    with np.errstate(over="ignore"):
        shares = np.exp(-(((steps[:, None] - steps) / dither) ** 2) / 2)
    found: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    found = (shares / shares.sum(1, keepdims=True)).astype(np.float32)
    return found
