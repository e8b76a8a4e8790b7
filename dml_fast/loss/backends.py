"""The choice of the backend that computes the mutual loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dml_fast.errors import check_choice
from dml_fast.loss import bernoulli, closed_form, native
from dml_fast.loss.problem import Backend, Problem

_F = TypeVar("_F", bound=Callable[..., Any])
logger = logging.getLogger("dml_fast")

_NAMES = ("auto", "closed_form", "compiled", "native", "triton")
_reasons: dict[torch.device, str | None] = {}
_said: set[str] = set()


def check(name: str) -> None:
    """Raise a `UserError` unless there is a backend with this name, or it is "auto"."""
    if not isinstance(name, str) or name not in _NAMES:
        check_choice("backend", name, _NAMES)


def find(name: str, problem: Problem) -> Backend:
    """Return the backend with this name, or for "auto" the fastest for the problem's device.

    Where the Triton kernels cannot take a problem the closed form does, after one log line; and so
    where ``"native"`` was asked for.
    """
    check(name)
    if name == "auto":
        if problem.device.type not in ("cuda", "xpu"):
            return _load("closed_form" if native.unsupported_reason(problem) else "native", problem)
        name = "triton"
    if name == "triton" and (reason := _no_kernel(problem)):
        _say("the Triton kernels", reason)
        name = "closed_form"
    elif name == "native" and (reason := native.unsupported_reason(problem)):
        _say("the C++ loop", reason)
        name = "closed_form"
    return _load(name, problem)


def by_class(solver: Backend) -> Any:
    """Return the functions for chunks of classes that go with a backend.

    They are those of `dml_fast.loss.linear_classes`.
    """
    if getattr(solver, "__name__", None) == "dml_fast.kernels.autograd":
        from dml_fast.kernels import classes

        return classes
    from dml_fast.loss import linear_classes

    return linear_classes


def _load(name: str, problem: Problem) -> Backend:
    # torch.compile can trace import statements, but neither import_module nor a cache.
    if name == "triton":
        from dml_fast.kernels import autograd

        return autograd
    if name == "compiled":
        from dml_fast.loss import compiled

        return compiled
    if name == "native":
        return native
    return bernoulli if problem.distribution == "bernoulli" else closed_form


def _no_kernel(problem: Problem) -> str | None:
    reason: str | None = _no_triton(problem.device)
    if reason:
        return reason
    from dml_fast.kernels.launch import unsupported_reason

    return unsupported_reason(problem)


def _constant(function: _F) -> _F:
    """Have torch.compile call a function rather than trace it.

    This is `torch.compiler.assume_constant_result`, which would import torch._dynamo at once: as
    long as importing torch itself takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _no_triton(device: torch.device) -> str | None:
    if device not in _reasons:
        from dml_fast.kernels.availability import unavailable_reason

        _reasons[device] = unavailable_reason(device)
    return _reasons[device]


@_constant
def _say(place: str, reason: str) -> None:
    if reason not in _said:  # once for each reason, not in every step
        _said.add(reason)
        logger.warning("mutual loss: the closed form in place of %s: %s", place, reason)
