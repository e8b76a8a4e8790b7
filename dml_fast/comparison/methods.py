"""What is compared: methods by name, or any options of training under a name of the user's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

from dml_fast.config import Method, TrainConfig, flag
from dml_fast.config.checks_longer import refuse_limits
from dml_fast.config.files import difference
from dml_fast.errors import UserError, brief
from dml_fast.training.executors import without_trial

METHODS: tuple[Method, ...] = get_args(Method)
_OF_ALL = ("seed", "out", "data", "val_fraction", "val_protocol", "device")


class Contestant(NamedTuple):
    """A method and the configuration of its runs, in which ``seed`` and ``out`` mean nothing."""

    name: str
    config: TrainConfig


def contestants(
    given: Sequence[str], base: TrainConfig, parse: Callable[[list[str], TrainConfig], TrainConfig]
) -> tuple[Contestant, ...]:
    """Return what is compared; differences are taken from the first.

    Args:
        given: names of methods, several with commas between them; or ``name=--flags``, options of
            training on top of those that hold for all.
        base: the options that hold for all.
        parse: from flags to a configuration on top of another.

    Raises:
        UserError: there are fewer than two, a name is none or occurs twice, two are the same, or
            one has options that must be the same for all.
    """
    found: list[Contestant] = []
    for text in given:
        head, equals, flags = text.partition("=")
        *names, last = (name.strip() for name in head.split(","))
        for name in names if equals else (*names, last):
            known = next((method for method in METHODS if method == name), None)
            if known is None:
                raise UserError(
                    f"--methods has {brief(name)}: give {', '.join(METHODS)}, or "
                    'name="--flags" with a name of your own'
                )
            found.append(Contestant(name, replace(base, method=known)))
        if equals:
            found.append(_named(last, flags, base, parse))
    if len(found) < 2:
        raise UserError("--methods has fewer than two: give at least two to compare")
    settled = [Contestant(name, without_trial(config)) for name, config in found]
    for place, (name, config) in enumerate(settled):
        for other, another in settled[:place]:
            if name == other:
                raise UserError(f"--methods has {name} twice: give each a name of its own")
            if config.patience == another.patience and not difference(config, another):
                raise UserError(f"--methods: {other} and {name} are the same: leave one out")
    for name, config in settled:
        config.check()
        refuse_limits(config, "methods are compared when they have ended")
        _check_rows(name, config)
    return tuple(settled)


def _named(
    name: str,
    flags: str,
    base: TrainConfig,
    parse: Callable[[list[str], TrainConfig], TrainConfig],
) -> Contestant:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise UserError(
            f"--methods has {brief(name)} as a name: give letters, digits, -, _, + and ."
        )
    try:
        words = shlex.split(flags)
    except ValueError as error:  # a quotation that does not end
        raise UserError(f"--methods: the flags of {name} cannot be read ({error})") from None
    config = parse(words, base)
    for field in _OF_ALL:
        if getattr(config, field) != getattr(base, field):
            raise UserError(
                f"--methods: {name} has {flag(field)}, which must be the same for all: give it "
                "outside of --methods"
            )
    return Contestant(name, config)


def _check_rows(name: str, config: TrainConfig) -> None:
    """Refuse, before any has trained, what would be refused when data are read or measured on."""
    if config.input_kind == "pair":
        raise UserError(
            f"--methods are compared on test rows and --data {config.data} has none: train each, "
            "and give python -m dml_fast.evaluate RUN --data pairs:OTHER.npz"
        )
    hidden = "--labels" if config.labels else "--labels-per-class" * bool(config.labels_per_class)
    if hidden and config.method == "independent" and config.unlabelled_share != 0:
        raise UserError(
            f"--methods: {name} learns nothing from the rows that {hidden} leaves without a label: "
            f'give {name}="--method independent --unlabelled-share 0" in its place'
        )
