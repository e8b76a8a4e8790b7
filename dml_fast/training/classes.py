"""What the frequencies of the classes mean for a run: their prior, and their weights."""

from __future__ import annotations

import logging

import numpy as np
import torch

from dml_fast.config import TrainConfig
from dml_fast.data import DataSet
from dml_fast.data.weight_files import weights_in
from dml_fast.engine.class_weight import balanced_weights
from dml_fast.engine.prior import log_prior

logger = logging.getLogger(__name__)


def prior_of(config: TrainConfig, data: DataSet) -> torch.Tensor | None:
    """Return the logarithms of the classes' shares, (C,) float32, if the run is to have them."""
    if config.prior != "balance":
        return None
    return log_prior(_counts(data, "prior: a class without a label counts as if it had one"))


def class_weights_of(config: TrainConfig, data: DataSet) -> torch.Tensor | None:
    """Return the weights of C classes in the cross-entropy, (C,) float32, if there are any.

    Args:
        config: its ``class_weights`` may be a file.
        data: that training uses.

    Raises:
        UserError: the file is wrong (`dml_fast.data.weight_files.weights_in`).
    """
    if not config.class_weights:
        return None
    if config.class_weights_file:
        return torch.tensor(weights_in(config.class_weights_file, data.classes))
    rule = "class weights: a class without a label counts as if it had one"
    weights = balanced_weights(_counts(data, rule))
    logger.info("class weights: from %.3g to %.3g", weights.min(), weights.max())
    return weights


def say_what_balance_means(config: TrainConfig, data: DataSet) -> None:
    """Say so if some classes cannot be drawn."""
    if config.balance:
        _counts(data, "balance: a class without a label is in no batch")


def _counts(data: DataSet, rule: str) -> list[int]:
    """Return how many labels each class has in training; say the rule if one has none."""
    labels = data.train.labels
    counts = np.bincount(labels[labels >= 0], minlength=len(data.classes))
    if not counts.all():
        logger.info(rule)
    found: list[int] = counts.tolist()
    return found
