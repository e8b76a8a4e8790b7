"""Types of a configuration's fields: which values each may take, in words for messages.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin

from dml_fast.errors import UserError, brief, check_choice, check_number
from dml_fast.machine import MOST_THREADS


class Bounds(NamedTuple):
    """Which values a number may take, as metadata of a field's type.

    Attributes:
        words: what an error message asks for.
        allow: whether a value is within the bounds; false for NaN.
    """

    words: str
    allow: Callable[[float], bool]

    def __repr__(self) -> str:
        """Return the words alone, as tyro shows them for a value of another type."""
        return self.words


Count: TypeAlias = Annotated[int, Bounds("a whole number of at least 1", lambda x: x >= 1)]
ThreadsOrZero: TypeAlias = Annotated[
    int, Bounds(f"a whole number from 0 to {MOST_THREADS}", lambda x: 0 <= x <= MOST_THREADS)
]
Seed: TypeAlias = Annotated[
    int, Bounds("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
]
Positive: TypeAlias = Annotated[float, Bounds("a number above 0", lambda x: 0 < x < inf)]
NonNegative: TypeAlias = Annotated[
    float, Bounds("a finite number, 0 or more", lambda x: 0 <= x < inf)
]
Share: TypeAlias = Annotated[float, Bounds("a number from 0 to 1", lambda x: 0 <= x <= 1)]
ShareBelowOne: TypeAlias = Annotated[
    float, Bounds("a number from 0 to below 1", lambda x: 0 <= x < 1)
]
ShareAboveZero: TypeAlias = Annotated[
    float, Bounds("a number above 0, at most 1", lambda x: 0 < x <= 1)
]
CountOrZero: TypeAlias = Annotated[int, Bounds("a whole number, 0 or more", lambda x: x >= 0)]
Decay: TypeAlias = Annotated[float, Bounds("a number between 0 and 1", lambda x: 0 < x < 1)]
NonNegativeOrAuto: TypeAlias = Literal["auto"] | NonNegative
ShareBelowOneOrAuto: TypeAlias = Literal["auto"] | ShareBelowOne
PositiveOrOff: TypeAlias = Literal["off"] | Positive
DecayOrOff: TypeAlias = Literal["off"] | Decay
NumberEach: TypeAlias = Annotated[float | str, get_args(NonNegative)[1]]
BelowOneEach: TypeAlias = Annotated[float | str, get_args(ShareBelowOne)[1]]
"""A number for all students, or a text with one for each, ``0.1,0.05``."""


def check_field(name: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type, a number out of bounds, and a name that does not exist.

    Args:
        name: of the option.
        value: to check.
        hint: the field's type, with its `Bounds`.

    Raises:
        UserError: it names the option, its value and what may be given.
    """
    if get_origin(hint) is Annotated and get_origin(choices := get_args(hint)[0]) is Literal:
        hint = choices
    origin = get_origin(hint)
    if origin is Literal:
        check_choice(name, value, get_args(hint))
        return
    words = ""
    if origin is Union:  # a word or a number
        word, hint = get_args(hint)
        if value == (only := get_args(word)[0]):
            return
        words = f"{only}, or "
    kind, *limits = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if kind == float | str:
        for part in numbers_in(name, value):
            check_field(name, part, Annotated[(float, *limits)])
        return
    for bounds in limits:
        check_number(name, value, words + bounds.words, bounds.allow)
    fits = isinstance(value, int | float) if kind is float else type(value) is kind
    if not fits:
        raise UserError(f"{name} is {brief(value)}: give a value of type {kind.__name__}")


def numbers_in(name: str, value: Any) -> tuple[float, ...]:
    """Return the number, or the numbers of a list with commas.

    Raises:
        UserError: it is neither.
    """
    if not isinstance(value, str):
        return (value,)
    try:
        return tuple(map(float, value.split(",")))
    except ValueError:
        raise UserError(
            f"{name} is {brief(value)}: give a number, or one per student, as in 0.1,0.05"
        ) from None
