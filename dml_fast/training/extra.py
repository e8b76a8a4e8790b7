"""Which loss on features a run has beside the mutual loss: one at most."""

from __future__ import annotations

from typing import NamedTuple

from dml_fast.config import TrainConfig
from dml_fast.engine import FeatureLoss
from dml_fast.loss.mihash import MIHashLoss
from dml_fast.loss.triplet import TripletLoss


class Extra(NamedTuple):
    """A loss on features.

    Attributes:
        key: of its mean, before the weight, in a student's entry of ``metrics.jsonl``; "" for none.
        loss: as `dml_fast.engine.Engine` takes it.
        weight: above 0 where there is a loss.
    """

    key: str = ""
    loss: FeatureLoss | None = None
    weight: float = 0.0


def extra_of(config: TrainConfig) -> Extra:
    """Return the loss on features that a run's options name; those of weight 0 are none."""
    if config.head_kind == "hash" and config.mihash_weight:
        loss = MIHashLoss(bins=config.mihash_bins, scale=config.mihash_scale)
        return Extra("mihash", loss, config.mihash_weight)
    if config.triplet_weight:
        return Extra("triplet", TripletLoss(config.triplet_margin), config.triplet_weight)
    return Extra()
