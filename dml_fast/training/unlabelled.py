"""What rows without a label mean for a run: options that depend on them, and lines of the log."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from dml_fast.config import TrainConfig
from dml_fast.data import DataSet
from dml_fast.errors import UserError

logger = logging.getLogger(__name__)


def settled(config: TrainConfig, data: DataSet, columns: int = 1) -> TrainConfig:
    """Return the configuration with what the training rows decide, and say so in the log.

    Args:
        config: checked.
        data: that it names.
        columns: data columns of the mesh, whose ranks share the labelled rows of a batch equally.

    Raises:
        UserError: rows without a label would do nothing.
    """
    count = int(np.count_nonzero(data.train.labels < 0))
    new = config.settled(unlabelled=count > 0)
    if count and config.unlabelled_share == "auto":
        new = replace(new, unlabelled_share=_divided(new, columns))
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
        "rows without a label, %.4g %% of each batch, teach by the mutual term alone%s",
        100 * float(share),
        _ramp(config, new),
    )
    return new


def _divided(config: TrainConfig, columns: int) -> float:
    """Return the share nearest to the configuration's that leaves each column as many labels."""
    share, batch = float(config.unlabelled_share), config.batch_size
    labelled = batch - round(batch * share)
    nearest = columns * max(1, int(labelled / columns + 0.5))
    return share if nearest in (labelled, batch) else 1 - nearest / batch


def _ramp(config: TrainConfig, new: TrainConfig) -> str:
    if config.kl_warmup != "auto":
        return ""
    return f", whose weight grows for {new.kl_warmup:g} epochs (--kl-warmup)"
