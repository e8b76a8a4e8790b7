"""Configurations as TOML and JSON, and which options two runs must share.

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dml_fast.config.fields import flag
from dml_fast.config.options import TrainConfig
from dml_fast.errors import UserError, brief
from dml_fast.foreign import Unfit, reading, typed

MAY_CHANGE_ON_RESUME = frozenset({
    "backend", "data", "data_threads", "device", "executor", "fsdp", "loader", "log", "log_every",
    "max_skipped", "max_steps", "max_time", "mesh", "patience", "save_every", "shares",
    "skip_corrupt",
})  # fmt: skip
"""Options that ``--resume`` may change: they decide where and how a run is computed, not what."""

NOT_A_SETTING = frozenset({
    "arch", "cohort",  # compared together: --arch a --cohort 2 and --arch a,a are the same
    "backend", "data_threads", "download", "executor", "loader", "log", "log_every", "max_skipped",
    "max_steps", "max_time", "out", "save_every", "seed",
})  # fmt: skip
"""Options in which two runs of one setting may differ: the seed, and what changes no result."""


def from_mapping(values: Any, where: str) -> TrainConfig:
    """Build a configuration from names and values, as TOML and JSON give them.

    Args:
        values: field name (dashes or underscores) to value.
        where: the source, as an error message calls it.

    Raises:
        UserError: no names and values, an unknown name, one that is there twice, or a value of the
            wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: the configuration is {brief(values)}: give names and values")
    hints = get_type_hints(TrainConfig)
    names = [field.name for field in fields(TrainConfig)]
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name == "tensorboard" and isinstance(value, bool):  # of before --log
            name, value = "log", name * value
        if name == "compile" and isinstance(value, bool):  # as --compile alone
            value = "student" if value else "off"
        if name not in names:
            near = difflib.get_close_matches(name[:99], names, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --help for the names"
            raise UserError(f"{where}: unknown key {brief(key)}; {hint}")
        if name in kwargs:
            raise UserError(f"{where}: {key} is there twice: leave one out")
        kwargs[name] = _typed(value, hints[name], f"{where}: {key}")
    return TrainConfig(**kwargs)


def load_toml(path: str) -> TrainConfig:
    """Read a configuration file; its keys are the long flags without the leading dashes.

    Raises:
        UserError: the file cannot be read or is not TOML, or as `from_mapping`.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with reading(f"--config {path}", "give a file of TOML in UTF-8"):
        text = Path(path).read_bytes()  # it may be a pipe
        values = tomllib.loads(text.decode("utf-8-sig").replace("\r\n", "\n"))
    return from_mapping(values, path)


CHANGES_A_RUN = frozenset({"epochs"})
"""Options that ``--resume`` may change although the result depends on them: it is recorded."""


def check_same_run(
    own: TrainConfig, wanted: TrainConfig, run: object, but: frozenset[str] = frozenset()
) -> None:
    """Refuse options with which a resumed run would no longer be the same.

    Args:
        own: the run's configuration.
        wanted: the configuration with which to continue.
        run: the run's name in the message.
        but: options that may differ.

    Raises:
        UserError: it names the first such option and both values.
    """
    if name := difference(own, wanted, but):
        asked, has = (str(getattr(c, name)) or "empty" for c in (wanted, own))
        raise UserError(
            f"{flag(name)} is {asked} and the run {run} has {has}: "
            f"leave {flag(name)} out to continue that run, or start a new one without --resume"
        )


def difference(first: TrainConfig, second: TrainConfig, but: frozenset[str] = frozenset()) -> str:
    """Return the first field in which two configurations are not of one run, or "".

    A run's own are settled. Those of runs before an option was there lack it, as does "auto" here.

    Args:
        first: one.
        second: the other.
        but: fields in which they may differ, beside `MAY_CHANGE_ON_RESUME`.
    """
    first, second = first.settled(unlabelled=False), second.settled(unlabelled=False)
    for name in sorted((field.name for field in fields(TrainConfig)), key="out".__eq__):
        if name not in MAY_CHANGE_ON_RESUME | but and getattr(first, name) != getattr(second, name):
            return name
    return ""


def _typed(value: Any, hint: Any, where: str) -> Any:
    if hint is str and type(value) is int:  # image_size = 64
        return str(_typed(value, int, where))
    try:
        return typed(value, hint, where)
    except Unfit:
        if get_origin(hint) is Literal:
            wanted = f"one of {', '.join(get_args(hint))}"
        elif get_origin(hint) is Union:
            wanted = f"{get_args(get_args(hint)[0])[0]} or a number"
        elif hint == float | str:
            wanted = "a number, or one per student, as in 0.1,0.05"
        else:
            wanted = f"a value of type {hint.__name__}"
        raise UserError(f"{where} is {brief(value)}: give {wanted}") from None
