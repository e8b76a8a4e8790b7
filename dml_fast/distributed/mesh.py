"""The mesh and the shares: which rank holds which students and which part of a batch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from dml_fast.errors import UserError

Shares: TypeAlias = tuple[tuple[int, ...], ...]
"""The students of each row, in increasing order."""


class Mesh(NamedTuple):
    """COHORT rows of DATA ranks each: rank r is in row ``r // data``, column ``r % data``.

    The ranks of a row hold the same students and see different images. The ranks of a column hold
    different students and see the same images. The ranks of a row are neighbours, since they
    exchange most.

    Attributes:
        cohort: number of rows.
        data: number of columns.
    """

    cohort: int
    data: int

    def __str__(self) -> str:
        return f"{self.cohort}x{self.data}"


def choose_mesh(text: str, students: int, world: int) -> Mesh:
    """Return the mesh of ``--mesh``, or one with as many rows as share the students out equally.

    Args:
        text: ``COHORTxDATA``, or "".
        students: K.
        world: number of processes.

    Raises:
        UserError: the mesh does not fit the processes, or has more rows than students.
    """
    if not text:
        rows = math.gcd(students, world)
        return Mesh(rows, world // rows)
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not (int(match[1]) and int(match[2])):
        raise UserError(f"--mesh is {text!r}: give COHORTxDATA, such as 2x1")
    mesh = Mesh(int(match[1]), int(match[2]))
    if mesh.cohort * mesh.data != world:
        started = f"there {'is one process' if world == 1 else f'are {world} processes'}"
        raise UserError(
            f"--mesh {mesh} needs {mesh.cohort * mesh.data} processes and {started}: give torchrun "
            f"--nproc-per-node {mesh.cohort * mesh.data}, or another --mesh"
        )
    if mesh.cohort > students:
        raise UserError(
            f"--mesh {mesh} has {mesh.cohort} rows for {students} students: give at most "
            f"{students} rows, such as --mesh {choose_mesh('', students, world)}"
        )
    return mesh


def choose_shares(text: str, students: int, rows: int) -> Shares:
    """Share students out over the rows.

    Args:
        text: "" for equal shares, or how many students each row holds: ``3,1``. With ``measured``
            the shares are about equal, until `balanced` replaces them.
        students: K.
        rows: number of rows of the mesh.

    Raises:
        UserError: K students cannot be shared out in this way.
    """
    if text == "measured":
        sizes = _even(students, rows)
    elif not text:
        if students % rows:
            raise UserError(
                f"{students} students cannot be shared out equally over the {rows} rows of the "
                "mesh: give another --cohort or --mesh, or uneven --shares such as "
                f"{','.join(str(n) for n in _even(students, rows))}"
            )
        sizes = _even(students, rows)
    else:
        sizes = _given(text, students, rows)
    ends = [sum(sizes[: i + 1]) for i in range(rows)]
    return tuple(tuple(range(end - n, end)) for n, end in zip(sizes, ends, strict=True))


def balanced(costs: Sequence[float], rows: int) -> Shares:
    """Share students out by cost: the longest step first, to the row with the least work.

    Args:
        costs: of a step of each of K students, in any unit.
        rows: number of rows of the mesh, at most K; each gets a student.
    """
    work = [0.0] * rows
    held: list[list[int]] = [[] for _ in range(rows)]
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        row = min(range(rows), key=lambda r: (bool(held[r]), work[r], r))
        work[row] += costs[k]
        held[row].append(k)
    return tuple(tuple(sorted(students)) for students in sorted(held))


def _given(text: str, students: int, rows: int) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise UserError(f"--shares is {text!r}: give measured, or numbers such as 3,1")
    sizes = [int(part) for part in parts]
    if len(sizes) != rows or sum(sizes) != students:
        raise UserError(
            f"--shares {text} is for {sum(sizes)} students on {len(sizes)} rows, and there are "
            f"{students} students and {rows} rows: give {rows} numbers that add up to {students}"
        )
    return sizes


def _even(students: int, rows: int) -> list[int]:
    return [students // rows + (row < students % rows) for row in range(rows)]
