"""The loss of Deep Mutual Learning (Zhang et al., CVPR 2018): functions and modules."""

from __future__ import annotations

from dml_fast.loss.linear import FusedLinearMutualLoss, linear_mutual_loss
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
    "MutualStats",
    "linear_mutual_loss",
    "mutual_loss",
    "mutual_loss_and_grad",
    "peer_divergence",
]
