"""Options that mean nothing where rows may have several labels. Nothing here imports torch."""

from __future__ import annotations

from dml_fast.config.fields import Options, flag
from dml_fast.errors import UserError

_ONE_CLASS = (
    "labels",
    "labels_per_class",
    "label_noise",
    "unlabelled_share",
    "prior",
    "small_loss",
    "class_weights",
    "balance",
)


def check_several_labels(config: Options) -> None:
    """Refuse options about rows of one class.

    Raises:
        UserError: it names the option and what to do.
    """
    where = f"with --data {config.data}, whose rows may have several labels (labels.csv)"
    for name in _ONE_CLASS:
        value = getattr(config, name)
        if value and value != getattr(Options, name):  # a share of 0 is what config.json has
            raise UserError(f"{flag(name)} means nothing {where}: leave it out")
    if config.head not in ("auto", "linear"):
        raise UserError(
            f"--head {config.head} compares rows by their one class, and means nothing {where}: "
            "leave it out"
        )
