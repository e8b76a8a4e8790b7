"""The options of a training run. Importing this package does not load torch."""

from __future__ import annotations

from dml_fast.config.fields import Method, flag
from dml_fast.config.options import TrainConfig

__all__ = ["Method", "TrainConfig", "flag"]
