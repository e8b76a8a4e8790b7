"""dml_fast: Deep Mutual Learning (Zhang et al., CVPR 2018, arXiv 1706.00384), fast and exact.

The public names are imported when they are first used, so that ``import dml_fast`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dml_fast.version import __version__ as __version__

if TYPE_CHECKING:
    from dml_fast.config import TrainConfig
    from dml_fast.engine import Engine
    from dml_fast.loss import (
        FusedMutualLoss,
        MIHashLoss,
        mutual_loss,
        mutual_loss_and_grad,
    )
    from dml_fast.loss.linear import FusedLinearMutualLoss, linear_mutual_loss
    from dml_fast.models import create_model

__all__ = [
    "Engine",
    "FusedLinearMutualLoss",
    "FusedMutualLoss",
    "MIHashLoss",
    "TrainConfig",
    "create_model",
    "linear_mutual_loss",
    "mutual_loss",
    "mutual_loss_and_grad",
]

_HOMES = {
    "Engine": "dml_fast.engine",
    "FusedLinearMutualLoss": "dml_fast.loss.linear",
    "FusedMutualLoss": "dml_fast.loss",
    "MIHashLoss": "dml_fast.loss",
    "TrainConfig": "dml_fast.config",
    "create_model": "dml_fast.models",
    "linear_mutual_loss": "dml_fast.loss.linear",
    "mutual_loss": "dml_fast.loss",
    "mutual_loss_and_grad": "dml_fast.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dml_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
