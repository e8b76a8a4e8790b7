"""Which code computes the mutual loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

from dml_fast.errors import UserError
from dml_fast.loss_problem import Backend, Problem

logger = logging.getLogger("dml_fast")

# Imported at first use: Triton takes a second, and is not everywhere.
_MODULES = {"closed_form": "dml_fast.closed_form", "triton": "dml_fast.kernels.autograd"}


def check(name: str) -> None:
    """Raise a `UserError` for a name that is no backend."""
    if name != "auto" and name not in _MODULES:
        raise UserError(f"unknown backend {name!r}: use 'auto' or one of {sorted(_MODULES)}")


def find(name: str, problem: Problem) -> Backend:
    """The backend of that name, or for "auto" the fastest that the device has.

    What the kernels do not take goes to the closed form, which says so in one log line.
    """
    check(name)
    if name == "auto":
        name = "triton" if problem.device.type in ("cuda", "xpu") else "closed_form"
    if name == "triton" and (reason := _no_kernel(problem)):
        _say(reason)
        name = "closed_form"
    return _load(name)


@cache
def _load(name: str) -> Backend:
    backend: Backend = import_module(_MODULES[name])
    return backend


def _no_kernel(problem: Problem) -> str | None:
    return _no_triton(problem.device) or _unsupported()(problem)


@cache
def _no_triton(device: torch.device) -> str | None:
    from dml_fast.kernels.availability import unavailable_reason

    return unavailable_reason(device)


@cache
def _unsupported() -> Callable[[Problem], str | None]:
    from dml_fast.kernels.launch import unsupported_reason

    return unsupported_reason


@cache  # once for each reason, not once a step
def _say(reason: str) -> None:
    logger.warning("mutual loss: the closed form in place of the Triton kernels: %s", reason)
