"""The logs that a run can write for other programs."""

from __future__ import annotations

from importlib.util import find_spec

from dml_fast.config.fields import names_in
from dml_fast.errors import UserError, brief

LOGS = {"tensorboard": "log", "wandb": "wandb", "mlflow": "mlflow", "csv": ""}
"""The names of ``--log``, each with the extra that installs what it needs."""


def check_logs(log: str) -> None:
    """Refuse logs that there are not.

    Args:
        log: the names, with commas.

    Raises:
        UserError: a name is unknown or there twice, or its package is missing.
    """
    names = names_in(log)
    known = f"{', '.join(list(LOGS)[:-1])} or {list(LOGS)[-1]}"
    for name in names:
        if name not in LOGS:
            raise UserError(f"--log names {brief(name)}: give {known}, or several with commas")
        if names.count(name) > 1:
            raise UserError(f"--log names {name} twice: leave one out")
        # a folder called wandb, which the program makes, looks like a package without a file
        if LOGS[name] and ((spec := find_spec(name)) is None or spec.origin is None):
            raise UserError(
                f"--log {name} needs {name}: pip install 'dml_fast[{LOGS[name]}]', or give --log "
                "without it"
            )
