r"""``--labels FILE``: the labels of rows by name, in lines ``name<TAB>class``.

Blank lines, lines that begin with ``#``, and a first line ``name<TAB>class`` say nothing. A name
that cannot stand in such a line is written as messages show it: a tab as ``\t``, a newline as
``\n``, a byte that is not UTF-8 as ``\xe9``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from dml_fast.data.columns import two_columns
from dml_fast.errors import UserError, escaped
from dml_fast.foreign import content, shown, utf8

_HEADER = ("name", "class")
_FORM = "write a name, a tab and a class in each line"


def read_labels(path: str | Path) -> bytes:
    """Return what a file of labels holds.

    Raises:
        UserError: it cannot be read.
    """
    return content(Path(path).expanduser(), "give --labels a file of names and classes")


class LabelFile:
    """The labels that a file gives to rows, and which of them were asked for.

    Args:
        path: of the file.
        classes: the names of all classes; a label is an index of them.

    Attributes:
        path: the file's name, for messages.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or names no row; or a line of it has not
            two columns, has a class that is none, or gives a row a second class.
    """

    def __init__(self, path: str | Path, classes: Sequence[str]) -> None:
        self.path = shown(path)
        self._labels: dict[str, int] = {}
        self._lines: dict[str, int] = {}
        self._comments: dict[str, int] = {}
        self._found: set[str] = set()
        known = {escaped(name): label for label, name in enumerate(classes)}
        if len(known) < len(classes):
            twice = Counter(map(escaped, classes)).most_common(1)[0][0]
            raise UserError(
                f"--labels {self.path}: two classes of the data are called {_quoted(twice)}: give "
                "each its own name"
            )
        text = utf8(read_labels(path), self._refuse)
        lines = two_columns(text, _HEADER, _FORM, self._refuse, self._comments)
        for number, name, called in lines:
            self._add(number, name, called, known)
        if not self._labels:
            raise UserError(f"--labels {self.path} names no row: {_FORM}")

    def __len__(self) -> int:
        """Return how many rows the file names."""
        return len(self._labels)

    def of(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the labels of rows, (N,) int64, -1 for those that the file does not name.

        Args:
            names: N rows of the data.

        Raises:
            UserError: a name in the file is that of two rows, or a row's name begins with ``#`` and
                the file's line is a comment.
        """
        labels = np.full(len(names), -1, np.int64)
        for row, name in enumerate(map(escaped, names)):
            if name in self._comments:
                self._refuse(
                    self._comments[name],
                    f"is a comment, as it begins with #, and a row is called {_quoted(name)}: "
                    "rename the row, or write the comment without a tab",
                )
            if (label := self._labels.get(name)) is None:
                continue
            if name in self._found:
                self._refuse(
                    self._lines[name],
                    f"names {_quoted(name)}, and two rows of the data are called so: rename one",
                )
            self._found.add(name)
            labels[row] = label
        return labels

    def check(self, others: Iterable[str], example: str) -> None:
        """Check that all names were found.

        Args:
            others: names of files of the data that are not in use.
            example: the name of a row.

        Raises:
            UserError: a name is none of the data.
        """
        unused = set(map(escaped, others))
        missing = self._labels.keys() - self._found
        for name in self._labels:
            if name in missing and name not in unused:
                self._refuse(
                    self._lines[name],
                    f"names {_quoted(name)}, and no row of the data is called so: write names such "
                    f"as {_quoted(escaped(example))}",
                )

    def _add(self, number: int, name: str, called: str, known: dict[str, int]) -> None:
        if not name:
            self._refuse(number, f"has no name: {_FORM}")
        if (label := known.get(called)) is None:
            near = get_close_matches(called, known, n=2) or list(known)[:3]
            more = ", ..." if len(near) < len(known) else ""
            self._refuse(
                number,
                f"has the class {_quoted(called)}, which is none of the data's {len(known)}: write "
                f"one of them ({', '.join(near)}{more})",
            )
        earlier = self._labels.setdefault(name, label)
        line = self._lines.setdefault(name, number)
        if earlier != label:
            self._refuse(
                number,
                f"gives {_quoted(name)} the class {_quoted(called)}, and line {line} gave it "
                "another: remove one of the lines",
            )

    def _refuse(self, line: int, what: str) -> NoReturn:
        raise UserError(f"--labels {self.path}: line {line} {what}")


def _quoted(text: str) -> str:
    """Return a text that is already `escaped` for a message; `repr` would double backslashes."""
    return f"'{text if len(text) <= 80 else f'{text[:77]}...'}'"
