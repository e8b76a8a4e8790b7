"""Where a run begins, and what ends or stops it before its epochs. Nothing here imports torch."""

from __future__ import annotations

from dml_fast.config.fields import Options, flag
from dml_fast.errors import UserError


def check_init_from(config: Options) -> None:
    """Refuse weights from two places, and from several runs."""
    source = config.init_from
    if source and config.pretrained:
        raise UserError(
            f"--init-from {source} and --pretrained {config.pretrained} both give weights to start "
            "from: leave one out"
        )
    if "," in source:
        raise UserError(f"--init-from is {source}: give one run, RUN, or one student of it, RUN:0")


def check_patience(config: Options, *, retrieval: bool, kind: str) -> None:
    """Refuse ``--patience`` where no validation says which epoch is better.

    Args:
        config: the options.
        retrieval: whether the students learn identities.
        kind: of what they read.

    Raises:
        UserError: it says why.
    """
    if not config.patience:
        return
    why = ""
    if kind == "pair":
        why = "of pairs that are as roughly aligned as those of training tells nothing"
    elif retrieval and config.val_fraction == 0:
        why = "is on the test images with --val-fraction 0, and these may not choose the epoch"
    if why:
        raise UserError(
            f"--patience {config.patience} waits for a better validation score, and validation "
            f"{why}: leave it out" + (", or give --val-fraction 0.1" if retrieval else "")
        )
    if config.method == "distill":
        raise UserError(
            f"--patience {config.patience} means nothing with --method distill, whose students "
            "begin when their teacher has ended: leave it out"
        )


def refuse_limits(config: Options, why: str) -> None:
    """Refuse options by which a run stops before its end, for commands that need whole runs.

    Args:
        config: the options.
        why: why the command needs them.

    Raises:
        UserError: it names the option.
    """
    for name in ("max_time", "max_steps"):
        if value := getattr(config, name):
            raise UserError(f"{flag(name)} is {value} and {why}: leave it out")
