"""What rows without a label mean for a run: options that depend on them, and lines of the log."""

from __future__ import annotations

import logging

import numpy as np

from dml_fast.config import TrainConfig
from dml_fast.data import DataSet
from dml_fast.errors import UserError

logger = logging.getLogger(__name__)


def settled(config: TrainConfig, data: DataSet) -> TrainConfig:
    """Return the configuration with what the training rows decide, and say so in the log.

    Args:
        config: checked.
        data: that it names.

    Raises:
        UserError: rows without a label would do nothing.
    """
    count = int(np.count_nonzero(data.train.labels < 0))
    new = config.settled(unlabelled=count > 0)
    share = new.unlabelled_share
    if not count:
        if share:
            logger.info("--unlabelled-share %s: every training row has a label", share)
        return new
    if config.method == "independent":
        raise UserError(
            f"--method independent learns nothing from the {count} training rows without a label: "
            "give --unlabelled-share 0 to leave them out, or --method dml"
        )
    for name in ("mixup", "cutmix"):
        if value := getattr(config, name):
            raise UserError(
                f"--{name} {value} blends labels and {count} training rows have none: leave it "
                "out, or give --unlabelled-share 0 to leave out these rows"
            )
    logger.info(
        "rows without a label, %g %% of each batch, teach by the mutual term alone%s",
        100 * float(share),
        _ramp(config, new),
    )
    return new


def _ramp(config: TrainConfig, new: TrainConfig) -> str:
    if config.kl_warmup != "auto":
        return ""
    return f", whose weight grows for {new.kl_warmup:g} epochs (--kl-warmup)"
