"""Errors that end a command with one sentence, what to quote in it, and checks that raise it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Number, Real
from typing import Any

_PASSWORD = re.compile(r"(\w://)[^/?#\s]*@")
_QUERY = re.compile(r"(https?://[^\s?]*)\?[^\s)]*", re.IGNORECASE)


class _Printable(Exception):
    """An error whose message can be printed in one line, whatever names it quotes."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(_Printable, ValueError):
    """Wrong input: one sentence that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.

    Attributes:
        on_all_ranks: whether all processes of a run raise it, so that only rank 0 prints it.
    """

    on_all_ranks = False


class TrainingError(_Printable, RuntimeError):
    """Training cannot continue; what was saved is intact. The command line exits with code 1.

    Attributes:
        on_all_ranks: as in `UserError`.
    """

    on_all_ranks = False


class CheckpointError(Exception):
    """Several processes could not write or read a checkpoint together; all of them raise it."""


def reason(error: BaseException) -> str:
    """Return the operating system's message for an error or its cause, else its first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return an error's message without the traceback that some libraries append to it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        UserError: it names the choices, and those that are spelt nearly as the value.
    """
    known = [*choices]
    if isinstance(value, str) and value in known:
        return
    from difflib import get_close_matches

    near = get_close_matches(str(value).lower(), known, n=2, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else "give one of these"
    raise UserError(f"{name} is {brief(value)}, which is none of {', '.join(known)}: {advice}")


def check_number(name: str, value: object, words: str, allow: Callable[[Any], bool]) -> None:
    """Refuse a value that is no number, or not one that is allowed.

    Args:
        name: of the option.
        value: a number, from numpy too; True and False are none.
        words: what the message asks for.
        allow: whether a number is allowed; false for NaN.

    Raises:
        UserError: the value is refused.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not allow(value):
        raise UserError(f"{name} is {brief(value)}: give {words}")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse a value that is no whole number, or below ``least``.

    Raises:
        UserError: the value is refused.
    """
    words = f"a whole number of at least {least}"
    check_number(name, value, words, lambda n: isinstance(n, Integral) and int(n) >= least)


def brief(value: object) -> str:
    """Return what a value is, in a few words that a message can quote."""
    if value is None or isinstance(value, Number):
        try:
            text = str(value)
        except ValueError:  # it has over 4,300 digits
            return "a number of thousands of digits"
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, str | bytes):
        end: Any = "..." if isinstance(value, str) else b"..."
        return repr(value if len(value) <= 80 else value[:77] + end)
    kind = type(value).__name__
    article = "an" if kind[0] in "AEIOUaeiou" else "a"
    if isinstance(value, Mapping) and value:
        return f"{article} {kind} with the keys {', '.join(map(brief, [*value][:6]))}"
    if isinstance(value, list | tuple):
        return f"{article} {kind} of length {len(value)}"
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{article} {kind} of shape {tuple(shape)}"
    return f"{article} {kind}"


def times(size: Iterable[int]) -> str:
    """Write the size of an image or a shape as ``24 x 24``."""
    return " x ".join(map(str, size))


def printable(text: str) -> str:
    r"""Return a text in one line: bytes that are not UTF-8 become ``\xe9``, a newline ``\n``.

    URLs in it lose their passwords and signatures.
    """
    return masked(escaped(text))


def escaped(text: str) -> str:
    """Return a text as `printable` does, but with whole URLs."""
    if text.isprintable():  # in a tenth of the time
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def masked(text: str) -> str:
    """Return a text without the passwords and the queries, which may be signatures, of URLs."""
    return _QUERY.sub(r"\1?***", _PASSWORD.sub(r"\1***@", text))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode's stand-in for a byte
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
