"""The closed form, compiled by torch.compile: for a CPU with a C++ compiler.

There is one program for each number of students and classes, dtype and set of options; it serves
every number of rows, and compiling it takes seconds. Inside a caller's torch.compile the closed
form is traced into the caller's program instead. A single row goes to the closed form, since
torch.compile would make a separate program for it.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from dml_fast.errors import UserError, first_line
from dml_fast.loss import bernoulli, closed_form
from dml_fast.loss.autograd import tie, tie_each
from dml_fast.loss.problem import Losses, MutualStats, Problem, Solution

SCRATCH, IN_PLACE = 0, False  # see `dml_fast.loss.problem.Backend`

_Function = Callable[[Problem, bool, str], Any]
_Program = Callable[..., Any]
_FIELDS = tuple(field.name for field in dataclasses.fields(Problem))
_programs: dict[tuple[Any, ...], _Program] = {}


def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
    """As `dml_fast.loss.problem.Backend.solve`."""
    with torch.no_grad():
        return Solution(*_run(_form(problem).solve, problem, with_grad, stats))


def differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
) -> tuple[Losses, MutualStats | None]:
    """As `dml_fast.loss.problem.Backend.differentiable`."""
    with torch.no_grad():
        losses, grads, measured = _run(_form(problem).compute, problem, True, stats)
    return (tie_each if separate else tie)(losses, grads, logits), measured


def _form(problem: Problem) -> Any:
    """Return the module whose functions are compiled."""
    return bernoulli if problem.distribution == "bernoulli" else closed_form


def _run(function: _Function, problem: Problem, with_grad: bool, stats: str) -> Any:
    """Return ``function(problem, with_grad, stats)``, computed by its program.

    Raises:
        UserError: if torch.compile cannot work here.
    """
    if torch.compiler.is_compiling() or problem.shape[1] < 2:
        return function(problem, with_grad, stats)
    kind = _kind(function, problem, with_grad, stats)
    values = _values(problem, first=kind not in _programs)
    if kind not in _programs:
        _programs[kind] = _make(function, with_grad, stats, name=_name(kind))
    try:
        losses, grads, measured = _programs[kind](*values)
    except torch._dynamo.exc.TorchDynamoException as error:  # no C++ compiler, for one
        raise _cannot(error) from error
    if measured is not None and measured.row_mutual_information is not None:
        by_row = measured.row_mutual_information.reshape(problem.batch_shape)
        measured = measured._replace(row_mutual_information=by_row)
    return losses, grads, measured


def _make(function: _Function, with_grad: bool, stats: str, name: str) -> _Program:
    """Return a program of the fields of a `Problem`, which take torch less time to check."""

    def program(*values: Any) -> Any:
        return function(Problem(*values), with_grad, stats)

    # torch.compile identifies a function by its code and name. Of one function it keeps at most
    # eight programs, and makes dynamic what has changed between calls, even the number of classes.
    # So each program is a function with a name of its own.
    code = program.__code__.replace(co_name=name)
    own = FunctionType(code, program.__globals__, name, None, program.__closure__)
    try:
        return torch.compile(own, fullgraph=True)
    except RuntimeError as error:  # this Python is too new, for one
        raise _cannot(error) from error


def _cannot(error: Exception) -> UserError:
    return UserError(
        f"backend='compiled' cannot compile here ({first_line(error)}): use backend='closed_form'"
    )


def _values(problem: Problem, first: bool) -> tuple[Any, ...]:
    """Return the fields of the problem without what would make torch.compile compile again.

    Tensors are contiguous and require no gradient; numbers that may change from step to step are
    tensors. Marking the number of rows as dynamic is needed the ``first`` time only.
    """

    def alias(x: Tensor) -> Tensor:
        x = x.contiguous().detach()
        if first:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return x

    scale = problem.grad_scale
    changed = {
        "students": tuple(alias(z) for z in problem.students),
        "teachers": tuple(alias(z) for z in problem.teachers),
        "batch_shape": torch.Size([-1]),
        "index": None if problem.index is None else alias(problem.index),
        "soft": None if problem.soft is None else alias(problem.soft),
        "row_weight": None if problem.row_weight is None else alias(problem.row_weight),
        "kl_weight": _tensor(problem.kl_weight, problem.dtype)
        if _counts_divergence(problem)
        else 0.0,
        "grad_scale": None if scale is None else _tensor(scale, problem.dtype),
    }
    return tuple(changed[name] if name in changed else getattr(problem, name) for name in _FIELDS)


def _tensor(number: float | Tensor, dtype: torch.dtype) -> Tensor:
    return number if isinstance(number, Tensor) else _constant(number, dtype)


@lru_cache(8)
def _constant(number: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(number, dtype=dtype)


def _counts_divergence(problem: Problem) -> bool:
    """Return whether the divergence counts: with weight 0, not even an infinite one does."""
    return isinstance(problem.kl_weight, Tensor) or problem.kl_weight != 0


def _kind(function: _Function, problem: Problem, with_grad: bool, stats: str) -> tuple[Any, ...]:
    """Return what differs between programs; torch.compile's guards catch anything left out."""
    scale = problem.grad_scale
    return (
        function.__name__,
        problem.distribution,
        problem.divergence,
        problem.beta,
        problem.kl_rows,
        with_grad,
        stats,
        problem.students[0].shape[1],
        problem.device,
        tuple(z.dtype for z in problem.students),
        tuple(z.dtype for z in problem.teachers),
        None if problem.index is None else problem.index.dtype,
        problem.ignore_index is None,
        problem.class_weight is None,
        problem.row_weight is None,
        problem.peer_weight is None,
        _counts_divergence(problem),
        problem.ce_weight == 1.0,
        problem.temperature == 1.0,
        problem.label_smoothing == 0.0,
        problem.peer_reduction,
        problem.reduction,
        problem.whole is None,
        None if scale is None else isinstance(scale, Tensor) and scale.dim(),
    )


def _name(kind: tuple[Any, ...]) -> str:
    """Return the same name in every process: torch.compile's cache on disk may depend on it."""
    return f"mutual_loss_{zlib.crc32(repr(kind).encode()):08x}"
