"""``--class-weights FILE``: the weight of each class, in lines ``class<TAB>weight``.

Blank lines, lines that begin with ``#``, and a first line ``class<TAB>weight`` say nothing. A class
is written as messages show it, as in a file of labels (`dml_fast.data.label_files`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from dml_fast.data.columns import two_columns
from dml_fast.errors import UserError, brief, escaped
from dml_fast.foreign import content, shown, utf8

_HEADER = ("class", "weight")
_FORM = "write a class, a tab and its weight"
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?"


def read_weights(path: str | Path) -> bytes:
    """Return what a file of weights holds.

    Raises:
        UserError: it cannot be read.
    """
    return content(Path(path).expanduser(), "give --class-weights a file, or auto")


def weights_in(path: str | Path, classes: Sequence[str]) -> list[float]:
    """Return the weights that a file gives to C classes, in their order.

    Args:
        path: of the file.
        classes: the classes' names.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or does not name all classes once; or a
            line has not two columns, or no number of 0 or more; or all weights are 0.
    """
    refuse = partial(_refuse, path)
    text = utf8(read_weights(path), refuse)
    known = set(map(escaped, classes))
    found: dict[str, float] = {}
    for number, name, weight in two_columns(text, _HEADER, _FORM, refuse):
        if name not in known:
            some = ", ".join(sorted(known)[:3])
            refuse(number, f"has the class {brief(name)}, which is none of the data's ({some})")
        if name in found:
            refuse(number, f"names {brief(name)} a second time: remove one of the lines")
        if not re.fullmatch(_NUMBER, weight) or float(weight) < 0:
            refuse(number, f"has the weight {brief(weight)}: give a number of 0 or more")
        found[name] = float(weight)
    if missing := [name for name in map(escaped, classes) if name not in found]:
        raise UserError(
            f"--class-weights {shown(path)} has no weight for {len(missing)} of {len(classes)} "
            f"classes, {brief(missing[0])} first: add a line for each"
        )
    if not any(found.values()):
        raise UserError(f"--class-weights {shown(path)} has zeros alone: give some class more")
    return [found[escaped(name)] for name in classes]


def _refuse(path: str | Path, line: int, what: str) -> NoReturn:
    raise UserError(f"--class-weights {shown(path)}: line {line} {what}")
