"""Options of steps that do not fit together, in one sentence each."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.training.shares import place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "--accumulate is 0: give a whole number of at least 1"),
        (
            {"accumulate": 5},
            "--accumulate is 5 and does not divide --batch-size 64: give a divisor",
        ),
        (
            {"accumulate": 2, "update": "alternating"},
            "--accumulate 2 means nothing with --update alternating",
        ),
        (
            {"accumulate": 2, "small_loss": 0.3},
            "--accumulate is 2 and --small-loss 0.3 compares the rows of a whole batch",
        ),
        (
            {"data": "market1501:nowhere", "accumulate": 32},
            "--accumulate 32 makes parts of 2 images, which is no multiple of --num-instances 4",
        ),
        (
            {"data": "market1501:nowhere", "accumulate": 16, "triplet_weight": 0.5},
            "--accumulate 16 makes parts of one identity, and --triplet-weight 0.5 compares",
        ),
        ({"no_decay": "norms"}, "--no-decay is 'norms': give norm, bias, or norm,bias"),
        ({"no_decay": "bias,bias"}, "--no-decay is 'bias,bias': give norm, bias, or"),
        ({"no_decay": "norm,"}, "--no-decay is 'norm,': give norm, bias, or norm,bias"),
        ({"clip_norm": 0.0}, "--clip-norm is 0.0: give off, or a number above 0"),
        ({"clip_norm": math.inf}, "--clip-norm is inf: give off, or a number above 0"),
        ({"lr": "0.1,0.1,0.1"}, "--lr 0.1,0.1,0.1 gives 3 values and the cohort has 2 students"),
        ({"weight_decay": "0.1,nan"}, "--weight-decay is nan: give a finite number, 0 or more"),
        ({"momentum": "0.9,1"}, "--momentum is 1.0: give a number from 0 to below 1"),
        ({"lr": "0.1,"}, "--lr is '0.1,': give a number, or one per student"),
        ({"optimizer": ""}, "--optimizer is '', which is none of auto, sgd, adamw"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig(**options).check()


def test_parts_of_what_a_column_has() -> None:
    config = TrainConfig(cohort=2, batch_size=48, accumulate=16, mesh="1x2")
    config.check()
    with pytest.raises(
        UserError, match="--accumulate is 16 and does not divide --batch-size 48, over 2 columns 24"
    ):
        place(config, 2)
