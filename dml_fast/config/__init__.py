"""The options of a training run. Importing this package does not load torch."""

from __future__ import annotations

from dml_fast.config.fields import Method
from dml_fast.config.options import TrainConfig, flag

__all__ = ["Method", "TrainConfig", "flag"]
