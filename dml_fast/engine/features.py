"""A loss on features: a second loss of a student's own pass, beside the mutual loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from dml_fast.engine.cohort import Cohort
from dml_fast.errors import UserError, brief, check_number

FeatureLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From features (N, D) and the target of a step, mostly (N,) classes, to a 0-d loss.

Its work is the same whatever the numbers are, and it does not wait for the device. Students may
call it at the same time.
"""


def check_feature_loss(loss: FeatureLoss | None, weight: float, cohort: Cohort) -> None:
    """Refuse a loss without a weight, a weight without a loss, and students without features.

    Raises:
        UserError: the argument of the engine, and what to give.
    """
    check_number(
        "feature_weight", weight, "a finite number, 0 or more", lambda x: 0 <= x < math.inf
    )
    if loss is None:
        if weight:
            raise UserError(
                f"feature_weight is {weight} and there is no feature_loss: give one, such as "
                "MIHashLoss() of dml_fast"
            )
        return
    if isinstance(loss, type) or not callable(loss):
        raise UserError(
            f"feature_loss is {brief(loss)}: give a function of features (N, D) and target (N,), "
            "such as MIHashLoss() of dml_fast"
        )
    if not weight:
        raise UserError(
            "feature_loss is given and feature_weight is 0: give a weight above 0, or leave out "
            "the loss"
        )
    for student in cohort:
        if not student.gives_features:
            raise UserError(
                f"feature_loss is given and a student ({student.arch}) gives no features: leave it "
                "out, or take a network with features_and_logits, such as an EmbeddingNet of "
                "dml_fast.models.embedding"
            )


def checked_value(value: object, loss: FeatureLoss) -> Tensor:
    """Return what a loss gave.

    Raises:
        UserError: it is no 0-d floating tensor.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        return value
    name = getattr(loss, "__name__", type(loss).__name__)
    raise UserError(
        f"the feature_loss {name} returned {brief(value)}: it must return a tensor of shape (), "
        "the mean over the rows"
    )
