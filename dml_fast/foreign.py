"""What other people and machines made: files whose content may be damaged, names that are bytes."""

from __future__ import annotations

import json
import os
import stat
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import isfinite
from typing import (
    IO,
    Any,
    Literal,
    NoReturn,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from dml_fast.errors import UserError, brief, printable, reason

_LONGEST = 200  # characters of an error's message
_LARGEST = 2**63  # whole numbers of files are smaller, as they are those of torch and numpy


class Unfit(ValueError):
    """A value that is not what the place wants, in words for `reading`."""


@contextmanager
def reading(what: str | os.PathLike[str], advice: str = "restore it") -> Iterator[None]:
    """Turn each exception that a file's content causes into one sentence.

    Libraries raise whatever their parser stumbles on: ``np.load`` alone raises ten types. So
    nothing but the parsing of one file belongs into the block.

    Args:
        what: the file, or what in it is read.
        advice: what the user can do.

    Raises:
        UserError: the block raised an exception. A `UserError` passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # RecursionError and MemoryError too
        words = "cannot be read" if isinstance(error, OSError) else "is damaged"
        name = "" if isinstance(error, OSError | Unfit) else f"{type(error).__name__}: "
        why = f"{name}{reason(error)}"[:_LONGEST]
        raise UserError(f"{what} {words} ({why}): {advice}") from None


def content(path: str | os.PathLike[str], advice: str = "restore it") -> bytes:
    """Return what a file holds.

    Args:
        path: the file, or a link to it.
        advice: what the user can do.

    Raises:
        UserError: it cannot be read, or is no file.
    """
    with reading(path, advice), opened(path) as file:
        return file.read()


def utf8(data: bytes, refuse: Callable[[int, str], NoReturn]) -> str:
    """Return the text of a file, without the mark at its beginning that some editors write.

    Args:
        data: what the file holds.
        refuse: gets the first line that is not UTF-8, from 1, and words.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(data.count(b"\n", 0, error.start) + 1, "is not UTF-8: save the file as UTF-8")


def opened(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file to read bytes, but no pipe or device, which could have no end.

    Raises:
        OSError: it cannot be opened.
        Unfit: it is no file.
    """
    # without O_NONBLOCK, a pipe to which nothing is written waits here for ever
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Unfit("it is not a file")
    return file


def json_value(text: str | bytes, what: str | os.PathLike[str], advice: str = "restore it") -> Any:
    """Return the value of a JSON text of a file, UTF-8 where it is bytes.

    Args:
        text: the text.
        what: the file, or what in it is read.
        advice: what the user can do.

    Raises:
        UserError: the text is no JSON (NaN and Infinity are none), or an object has one key twice.
    """
    with reading(what, advice):
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=_with_keys_once, parse_constant=_no_number_of_json
        )


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise Unfit("a key occurs twice")
    return values


def _no_number_of_json(text: str) -> None:
    raise Unfit(f"{text} is no number of JSON")


def typed(value: Any, hint: Any, where: str) -> Any:
    """Return a value of a foreign file, if it is of the type that the place wants.

    Args:
        value: of JSON, TOML or a pickle.
        hint: None, a class, a union, a Literal, list[X], tuple[X, Y], dict[X, Y], or a TypedDict,
            which may have more keys. An int is no bool, a float may be an int.
        where: the place, for the message; "it" for a whole file.

    Returns:
        The value; a tuple where the hint is one, a float where it is one.

    Raises:
        Unfit: it is of another type, a whole number of more than 64 bits, or not finite.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        return _typed_dict(value, hint, where)
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return typed(value, part, where)
            except Unfit:
                continue
    elif origin is Literal:
        if value in parts and type(value) is type(parts[parts.index(value)]):
            return value
    elif origin is list and type(value) is list:
        return [typed(item, parts[0], f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        key, item = parts
        found = {
            typed(k, key, f"a key of {where}"): typed(v, item, _within(where, brief(k)))
            for k, v in value.items()
        }
        # itself where nothing was converted: a torch module's state has attributes
        return value if all(found[k] is value[k] for k in found) else found
    elif origin is tuple and type(value) in (list, tuple):
        wanted = [parts[0]] * len(value) if parts[-1] is ... else parts
        if len(wanted) == len(value):
            return tuple(
                typed(item, part, f"{where}[{i}]")
                for i, (item, part) in enumerate(zip(value, wanted, strict=True))
            )
    elif hint is float and type(value) in (int, float):
        if abs(value) < _LARGEST and isfinite(value):
            return float(value)
    elif hint is int and type(value) is int:
        if abs(value) < _LARGEST:
            return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif (
        hint is Any
        or type(value) is hint
        or (origin is None and hint not in (int, float) and isinstance(value, hint))
    ):
        return value
    raise Unfit(f"{where} is {brief(value)} and not {_words(hint)}")


def _typed_dict(value: Any, hint: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise Unfit(f"{where} is {brief(value)} and not an object")
    for name in sorted(hint.__required_keys__ - value.keys()):
        raise Unfit(f"{where} has no {name}")
    hints = _hints(hint)
    return {
        key: typed(item, hints[key], _within(where, key)) if key in hints else item
        for key, item in value.items()
    }


def _within(where: str, key: str) -> str:
    return key if where == "it" else f"{where}.{key}"


@lru_cache
def _hints(hint: Any) -> dict[str, Any]:
    return get_type_hints(hint)


def _words(hint: Any) -> str:
    """Return what a type is called in a message."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if hint is None or hint is type(None):
        return "null"
    if origin in (list, tuple):
        return "such a list"
    return "an object" if origin is dict else f"a {hint.__name__}"


def shown(name: object) -> str:
    r"""Return a file's name or a class so that it can be printed, in one line.

    A file's name is bytes: those that are not UTF-8 become ``\xe9`` and the like, as do control
    characters, which would move the cursor or break a table.
    """
    text = os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else str(name)
    return printable(text)
