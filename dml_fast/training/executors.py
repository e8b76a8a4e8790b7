"""Runs that are compared with each other take one executor, and not each the winner of a trial."""

from __future__ import annotations

from dataclasses import replace

from dml_fast.config import TrainConfig
from dml_fast.engine.precision import pick_device


def without_trial(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the sequential executor, if a trial would choose on a CPU.

    A trial may choose differently in a run that is begun again, with other roundings.
    """
    if config.executor == "auto" and pick_device(config.device).type == "cpu":
        return replace(config, executor="sequential")
    return config
