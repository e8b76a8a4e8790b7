"""Options that end or stop a run before its epochs. Nothing here imports torch."""

from __future__ import annotations

from dml_fast.config.fields import Options, flag
from dml_fast.errors import UserError


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
