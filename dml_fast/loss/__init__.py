"""The loss of Deep Mutual Learning (Zhang et al., CVPR 2018), and one for hash codes."""

from __future__ import annotations

from dml_fast.loss.linear import FusedLinearMutualLoss, linear_mutual_loss
from dml_fast.loss.mihash import MIHashLoss, mihash_loss
from dml_fast.loss.mutual import (
    FusedMutualLoss,
    MutualStats,
    mutual_loss,
    mutual_loss_and_grad,
    peer_divergence,
)

__all__ = [
    "FusedLinearMutualLoss",
    "FusedMutualLoss",
    "MIHashLoss",
    "MutualStats",
    "linear_mutual_loss",
    "mihash_loss",
    "mutual_loss",
    "mutual_loss_and_grad",
    "peer_divergence",
]
