"""What other people and machines made: files whose content may be damaged, names that are bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dml_fast.errors import UserError, printable, reason

_LONGEST = 200  # characters of an error's message


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
        name = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        why = shown(f"{name}{reason(error)}"[:_LONGEST])
        raise UserError(f"{shown(what)} {words} ({why}): {advice}") from None


def json_value(text: str | bytes, what: str | os.PathLike[str], advice: str = "restore it") -> Any:
    """Return the value of a JSON text of a file, UTF-8 where it is bytes.

    Args:
        text: the text.
        what: the file, or what in it is read.
        advice: what the user can do.

    Raises:
        UserError: the text is no JSON, or an object has one key twice.
    """
    with reading(what, advice):
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_with_keys_once)


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def shown(name: object) -> str:
    r"""Return a file's name or a class so that it can be printed, in one line.

    A file's name is bytes: those that are not UTF-8 become ``\xe9`` and the like, as do control
    characters, which would move the cursor or break a table.
    """
    text = os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else str(name)
    return printable(text)
