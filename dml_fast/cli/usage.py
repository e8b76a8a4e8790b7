"""What tyro says of a wrong command line, as one sentence."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import TypeVar

from dml_fast.errors import UserError, check_choice

T = TypeVar("T")

_RULE = re.compile(r"\n─+\n")
_TYPES = {"INT": "a whole number", "FLOAT": "a number", "STR": "text", "PATH": "a path"}
_WANTED = {"invalid literal for int": "INT", "could not convert string to float": "FLOAT"}


def in_one_sentence(parse: Callable[[], T], command: str) -> T:
    """Return what a parser of tyro returns.

    Raises:
        UserError: it has refused the command line; the message is tyro's, without its box.
        SystemExit: it has printed its help.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        if stop.code != 2:
            raise
    raise UserError(_sentence(_parts(said.getvalue()), command))


def _parts(box: str) -> list[str]:
    """Return what stands between the lines of a box, without its frame and title."""
    lines = [line.strip().strip("│").rstrip() for line in box.strip().splitlines()]
    inside = [line.removeprefix(" ") for line in lines if line[:1] not in ("╭", "╰")]
    return _RULE.split("\n".join(inside))


def _sentence(parts: list[str], command: str) -> str:
    what = " ".join(parts[0].split())
    if found := re.fullmatch(r"Unrecognized options: (.*)", what):
        near = [name for part in parts[1:] for name in re.findall(r"^    (--[\w-]+)", part, re.M)]
        return _unknown(found[1].split(", "), near[:2], command)
    if found := re.fullmatch(
        r"invalid choice '(.*)' for argument '(.*)'\. Expected.*\((.*)\)\.", what
    ):
        check_choice(found[2], found[1], re.findall(r"'(.*?)'", found[3]))
    if found := re.fullmatch(r"Missing value for argument '(.*)'\..*", what):
        return f"{found[1]} has no value: give one"
    if found := re.match(r"Error parsing (\S+): no type matching (\S+) could.*? \['(.*?)'\]", what):
        return _wrong(found[1], found[3], found[2])
    if found := re.fullmatch(r"Error parsing (\S+): (.*?)(?: with base 10)?: '(.*)'", what):
        for beginning, kind in _WANTED.items():
            if found[2].startswith(beginning):
                return _wrong(found[1], found[3], kind)
    if what.startswith("Missing from"):
        missing = re.findall(r"^    (\S+)\n((?: {8}.*\n?)+)", parts[0], re.M)
        needs = " and ".join(
            f"{name.strip('{}')} ({' '.join(text.removesuffix('(required)').split()).rstrip('. ')})"
            for name, text in ((n, t.strip()) for n, t in missing)
        )
        return f"{command} needs {needs}: see {command} --help"
    return f"{what.rstrip('.')}: see {command} --help"


def _unknown(tokens: list[str], near: list[str], command: str) -> str:
    first = tokens[0]
    if not first.startswith("-"):
        return (
            f"{first!r} belongs to no option: leave it out, or put quotes around a value of words"
        )
    advice = f"did you mean {' or '.join(near)}?" if near else f"see {command} --help"
    return f"{first} is no option of {command}: {advice}"


def _wrong(flag: str, value: str, kinds: str) -> str:
    """Return what to give; the kinds are tyro's, such as ``{off}|FLOAT``."""
    words = [_TYPES.get(kind, kind.strip("{}").replace(",", " or ")) for kind in kinds.split("|")]
    return f"{flag} is {value!r}: give {' or '.join(words)}"
