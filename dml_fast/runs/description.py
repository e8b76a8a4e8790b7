"""What ``config.json`` holds of a run, and what ``--resume`` has changed of that: ``--epochs``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from dml_fast.config import TrainConfig, flag
from dml_fast.errors import UserError
from dml_fast.foreign import Unfit, typed


class StudentJson(TypedDict):
    """What ``config.json`` holds of a student."""

    arch: str
    parameters: int


Field: TypeAlias = Literal["epochs", "kl_warmup"]

Change = TypedDict(
    "Change",
    {
        "step": int,
        "epoch": int,
        "field": Field,
        "from": int | float,
        "to": int | float,
    },
)
"""An option that has another value from some step on.

``step`` and ``epoch`` are the steps and the whole epochs before it, ``from`` and ``to`` its values.
"""


class _Changed(TypedDict, total=False):
    changes: list[Change]  # only of a run that was changed


class Description(_Changed):
    """What ``config.json`` holds: the package's version, the configuration, the data's facts."""

    dml_fast: str
    config: dict[str, Any]
    data: dict[str, Any]
    students: list[StudentJson]


_FIELDS: tuple[Field, ...] = get_args(Field)


def checked_changes(found: Any, where: str) -> list[Change]:
    """Return the changes of a run from JSON.

    Raises:
        Unfit: one is incomplete, or of another type.
    """
    changes: list[Change] = typed(found, list[Change], where)
    for change in changes:
        whole = change["field"] == "epochs"
        for value in (change["from"], change["to"]):
            if value < whole or (whole and type(value) is not int):
                raise Unfit(f"{where} has {change['field']} of {value}")
    return changes


def earlier(config: TrainConfig, changes: Sequence[Change]) -> Iterator[TrainConfig]:
    """Yield the configurations that a run had, the newest first, beginning with its own."""
    yield config
    for change in reversed(changes):
        former: dict[str, Any] = {change["field"]: change["from"]}
        config = replace(config, **former)
        yield config


def with_new(
    before: Sequence[Change], own: TrainConfig, wanted: TrainConfig, step: int, epoch: int
) -> list[Change]:
    """Return a run's changes once it goes on from a step.

    Args:
        before: those that it has; of one after this step, the steps are done anew.
        own: its configuration.
        wanted: with which it goes on.
        step: steps done.
        epoch: whole epochs done.

    Returns:
        These and the new ones; none at step 0, as the run then has had no other values.
    """
    if not step:
        return []
    kept: list[Change] = [
        {**change, "step": min(change["step"], step), "epoch": min(change["epoch"], epoch)}
        for change in before
    ]
    new: list[Change] = [
        {
            "step": step,
            "epoch": epoch,
            "field": name,
            "from": getattr(own, name),
            "to": getattr(wanted, name),
        }
        for name in _FIELDS
        if getattr(own, name) != getattr(wanted, name)
    ]
    return kept + new


def check_epochs(own: TrainConfig, wanted: TrainConfig, ended: int, begun: int) -> None:
    """Refuse a number of epochs with which a run cannot go on.

    Args:
        own: its configuration.
        wanted: with which it goes on.
        ended: its whole epochs.
        begun: these, and one more if some steps of it are done.

    Raises:
        UserError: it says why.
    """
    if wanted.epochs == own.epochs:
        return
    if own.method == "distill" and ended >= own.epochs:
        raise UserError(
            f"--epochs is {wanted.epochs} and the teacher of this distillation has ended its "
            f"{own.epochs}: leave it out"
        )
    if wanted.epochs < begun:
        raise UserError(
            f"--epochs is {wanted.epochs} and the run has begun epoch {begun}: give at least that"
        )


def in_words(changes: Sequence[Change]) -> str:
    """Return the changes as ``--epochs 15, then 30 from step 330 (after epoch 6)``; "" for none."""
    return "; ".join(
        f"{flag(c['field'])} {c['from']:g}, then {c['to']:g} from step {c['step']} "
        f"(after epoch {c['epoch']})"
        for c in changes
    )
