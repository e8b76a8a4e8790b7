"""Which code computes the mutual loss."""

from __future__ import annotations

from dml_fast import closed_form
from dml_fast.errors import UserError
from dml_fast.loss_problem import Backend, Problem

BACKENDS: dict[str, Backend] = {"closed_form": closed_form}


def check(name: str) -> None:
    """Raise a `UserError` for a name that is no backend."""
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: use 'auto' or one of {sorted(BACKENDS)}")


def find(name: str, problem: Problem) -> Backend:
    """The backend of that name, or for "auto" the fastest that can solve the problem."""
    check(name)
    return closed_form if name == "auto" else BACKENDS[name]
