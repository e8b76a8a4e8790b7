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
NonNegativeOrAuto: TypeAlias = Literal["auto"] | NonNegative
ShareBelowOneOrAuto: TypeAlias = Literal["auto"] | ShareBelowOne


def check_field(name: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type, a number out of bounds, and a name that does not exist.

    Args:
        name: of the option.
        value: to check.
        hint: the field's type, with its `Bounds`.

    Raises:
        UserError: it names the option, its value and what may be given.
    """
    origin = get_origin(hint)
    if origin is Literal:
        check_choice(name, value, get_args(hint))
        return
    words = ""
    if origin is Union:  # "auto" or a number
        if value == "auto":
            return
        hint, words = get_args(hint)[1], "auto, or "
    for bounds in getattr(hint, "__metadata__", ()):
        check_number(name, value, words + bounds.words, bounds.allow)
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    fits = isinstance(value, int | float) if kind is float else type(value) is kind
    if not fits:
        raise UserError(f"{name} is {brief(value)}: give a value of type {kind.__name__}")
