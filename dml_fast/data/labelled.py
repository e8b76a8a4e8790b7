"""Batches in which a fixed number of rows has a label; the others teach without one."""

from __future__ import annotations

import logging

import numpy as np

from dml_fast.data.balanced import BalancedOrder, order_of_rows
from dml_fast.data.sampling import CyclicOrder, Ids, Order
from dml_fast.errors import UserError, check_number, check_whole

logger = logging.getLogger(__name__)


class LabelledOrder:
    """Batches of B rows, of which U have no label and L = B - U have one.

    U is B times the share, rounded, but at most B - 1. An epoch is one pass over the rows without a
    label, except for those left at its end that fill no batch. Labelled rows come round as often as
    needed: permutations of them end to end, through all epochs. Both kinds are spread evenly over a
    batch. So each of R ranks has L / R labelled rows, and the mean of the ranks' means is the mean
    over the batch. Batches are the same with any number of ranks.

    Args:
        labels: (N,) int64, -1 for a row without a label.
        batch_size: B, of all ranks together.
        share: of the batch that has no label, in [0, 1); with 0 those rows are in no batch.
        seed: of the permutations.
        steps: the number of batches per epoch, for which the rows without a label come round too;
            0 for one pass.
        ranks: R, a divisor of B and of L.
        shards: (N,) int64, the shard of each row; None where rows are not read from shards.
        balance: whether all classes are equally frequent among the labelled rows.

    Raises:
        UserError: no row has a label, R does not divide L, or there are fewer than U rows without a
            label and no ``steps``.
    """

    def __init__(
        self,
        labels: Ids,
        batch_size: int,
        share: float,
        seed: int,
        steps: int = 0,
        ranks: int = 1,
        *,
        shards: Ids | None = None,
        balance: bool = False,
    ) -> None:
        check_whole("batch_size", batch_size, 1)
        check_whole("steps", steps, 0)
        check_share(share)
        known, unknown = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
        if not len(known):
            raise UserError("no training row has a label: give some of them one")
        wanted = round(batch_size * share)
        without = min(wanted, batch_size - 1)
        each = batch_size - without
        if each % ranks:
            raise UserError(_undivided(batch_size, share, each, ranks))
        if without > len(unknown) and not steps:
            raise UserError(
                f"a batch of {batch_size} has {without} rows without a label "
                f"(--unlabelled-share {share:g}) and the training data {len(unknown)}: give a "
                f"smaller --unlabelled-share or --batch-size, or --epoch-steps"
            )
        if share and (without < wanted or not without):
            logger.info(_rounded(batch_size, share, without))
        part = unknown if without else known
        own = order_of_rows(
            labels[part],
            without or batch_size,
            seed,
            steps=steps,
            shards=None if shards is None else shards[part],
            balance=balance and not without,
        )
        self.steps = own.steps
        self._parts: list[tuple[Ids, Order]] = [(part, own)]
        if without:
            taught: Order = CyclicOrder(len(known), each, seed, own.steps, "known")
            if balance:
                taught = BalancedOrder(labels[known], each, seed, own.steps)
            self._parts.insert(0, (known, taught))
        turns = np.arange(batch_size + 1) * each // batch_size
        self._labelled = np.diff(turns) > 0  # (B,)

    def __call__(self, epoch: int) -> Ids:
        """Return indices of rows: (steps, B) int64."""
        batches = np.empty((self.steps, len(self._labelled)), np.int64)
        for place, (rows, order) in zip(
            (self._labelled, ~self._labelled), self._parts, strict=False
        ):
            batches[:, place] = rows[order(epoch)]
        return batches


def check_share(share: object) -> None:
    """Refuse a share of rows without a label that no batch can have.

    Raises:
        UserError: it is no number, or out of range.
    """
    words = "a number from 0 to below 1"
    check_number("unlabelled_share", share, words, lambda x: 0 <= x < 1)


def _undivided(batch_size: int, share: float, each: int, ranks: int) -> str:
    fits = max(ranks, ranks * round(each / ranks))
    return (
        f"--unlabelled-share {share:g} of --batch-size {batch_size} leaves {each} labelled rows, "
        f"which {ranks} columns of processes cannot share equally: give --unlabelled-share "
        f"{1 - fits / batch_size:.4g}, which leaves {fits}"
    )


def _rounded(batch_size: int, share: float, without: int) -> str:
    what = f"--unlabelled-share {share:g} of --batch-size {batch_size}"
    if not without:
        return f"{what} is no row: rows without a label are in no batch"
    return f"{what} leaves no labelled row: {without} rows of a batch have no label, and 1 has one"
