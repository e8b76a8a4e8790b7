"""Students of finished runs by name: ``RUN`` for all of a run, ``RUN:k`` for one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from dml_fast.config.fields import names_in
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run


class NamedStudent(NamedTuple):
    """One student of a run.

    Attributes:
        path: as the user gave it: the run's folder, or a checkpoint in it.
        number: of the student.
    """

    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"

    @property
    def run(self) -> Run:
        """The run."""
        return Run.open(Path(self.path).expanduser())


def students_named(text: str, option: str) -> list[NamedStudent]:
    """Return the students of a list with commas.

    Args:
        text: ``RUN`` or ``RUN:k``, and so on.
        option: by which the user gives it.

    Raises:
        UserError: a run or a student does not exist, or a student is there twice.
    """
    found: list[NamedStudent] = []
    for name in names_in(text):
        path, number = _parts(name)
        try:
            students = range(len(Run.open(Path(path).expanduser()).config.architectures))
        except UserError as error:
            raise UserError(f"{option} {name}: {error}") from None
        if number is not None and number not in students:
            raise UserError(
                f"{option} {name}: the students of that run are 0 to {len(students) - 1}: give one "
                "of these, or the run alone for all"
            )
        found += [NamedStudent(path, k) for k in ([number] if number is not None else students)]
    for one in found:
        if found.count(one) > 1:
            raise UserError(f"{option} {text} names student {one} twice: name each once")
    return found


def _parts(name: str) -> tuple[str, int | None]:
    """Return the path, and the student's number if there is one after a colon."""
    path, colon, number = name.rpartition(":")
    # a folder may have such a name
    if not colon or not (number.isascii() and number.isdigit()) or os.path.exists(name):
        return name, None
    return path, int(number[:9])
