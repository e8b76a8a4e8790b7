"""What the tests of the Triton kernels share: where they run, and which kernel and tile is chosen.

Compiled on a CUDA device where there is one, in Triton's interpreter elsewhere. Tests that were
written for the closed form can run on either, see `answer_with`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_fast.loss import backends, closed_form, mutual_loss, mutual_loss_and_grad
from dml_fast.loss.checks import prepare
from dml_fast.loss.problem import Problem

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

from triton.language import core
from triton.runtime import interpreter

from dml_fast.kernels import launch
from dml_fast.kernels.launch_table import Config

fused = partial(mutual_loss, backend="triton")
fused_and_grad = partial(mutual_loss_and_grad, backend="triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
KERNELS = ("one_pass", "two_sweep")
# numpy speaks of the NaN and infinities that tests put in; a GPU does not.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
STEP = 64  # columns a sweep takes at a time here, so that short rows have several


def small_tiles(kernel: str, classes: int) -> Config:
    """A launch of that kernel for tensors of any size, with tiles that small ones fill."""
    if kernel == "two_sweep":
        return Config("two_sweep", 1, STEP if classes < 256 else 1024, 1, batch=8)
    block = max(16, 1 << (classes - 1).bit_length())
    return Config("one_pass", 4 if block <= 256 else 1, block, 4)


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Every launch is of that kernel, and its gradients have tiles of 2 x 32."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        patch.setattr(launch, "choose", lambda _, c, *__, **___: small_tiles(kernel, c))
        patch.setattr(launch, "choose_gradient", lambda *_: Config("gradient", 2, 32, 1))
        yield


@contextmanager
def answer_with(kernel: str) -> Iterator[None]:
    """Whatever backend is asked for, that kernel answers, with tensors of the CPU too.

    float64 stays with the closed form.
    """
    find = backends.find
    triton = SimpleNamespace(SCRATCH=0, solve=_solve, differentiable=_differentiable)

    def found(_: str, problem: Problem) -> Any:
        reason = launch.unsupported_reason(problem)
        return find("closed_form", problem) if reason else triton

    with forced(kernel), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "find", found)
        yield


def _solve(problem: Problem, with_grad: bool, stats: str) -> Any:
    from dml_fast.kernels import autograd

    return _move(autograd.solve(on_device(problem), with_grad, stats), problem.device)


def _differentiable(
    problem: Problem, logits: tuple[Tensor, ...], stats: str, separate: bool = False
) -> Any:
    from dml_fast.kernels import autograd

    moved = tuple(z.to(DEVICE) for z in logits)
    return _move(
        autograd.differentiable(on_device(problem), moved, stats, separate), problem.device
    )


def on_device(problem: Problem) -> Problem:
    """The same problem on the device of these tests."""
    values = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return replace(problem, **{name: _move(value, DEVICE) for name, value in values.items()})


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_move(one, device) for one in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def cohort(
    students: int = 3, rows: int = 6, classes: int = 10, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(students + rows + classes)
    logits = 3 * torch.randn((students, rows, classes), generator=g)
    target = torch.randint(classes, (rows,), generator=g)
    return [z.to(DEVICE, dtype) for z in logits], target.to(DEVICE)


def assert_same(found: Any, expected: Any, **tolerance: Any) -> None:
    """Of two answers, each whatever the loss returns."""
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, (list, tuple)):
            assert_same(a, b, **tolerance)
        elif a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(
                a, b, equal_nan=True, check_dtype=False, check_device=False, **tolerance
            )


def in_double(problem: Problem) -> Problem:
    """The same numbers, in float64 on the CPU."""

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cast(one) for one in value)
        if isinstance(value, Tensor):
            return value.cpu().double() if value.is_floating_point() else value.cpu()
        return value

    values = {name: cast(getattr(problem, name)) for name in Problem.__slots__}
    return replace(problem, **values | {"dtype": torch.float64})


def assert_solves(
    problem: Problem, stats: str = "all", rtol: float = 1e-5, atol: float = 1e-5
) -> None:
    """Losses, gradients and statistics as of the closed form in float64."""
    found = launch.launch(problem, with_grad=True, save=False, stats=stats).solution
    exact = closed_form.solve(in_double(problem), True, stats)
    assert_same(found, exact, rtol=rtol, atol=atol)


def checked(logits: list[Tensor], target: Tensor, **options: Any) -> Problem:
    """As the loss makes it, with defaults for what is not given."""
    defaults: dict[str, Any] = {
        "kl_weight": 1.0,
        "temperature": 1.0,
        "label_smoothing": 0.0,
        "class_weight": None,
        "ignore_index": -100,
        "peer_reduction": "mean",
        "reduction": "mean",
        "peer_weight": None,
        "row_weight": None,
        "teacher_logits": None,
    }
    return prepare(logits, target, **defaults | options)


def _patch_once_a_launch() -> None:
    """Halve the interpreter's time.

    It patches the language anew at every call of one jitted function by another.
    """
    patched: set[str] = set()
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call


def _remember_types() -> None:
    """Save a fifth of the interpreter's time: it works these out anew for each value."""

    np_dtype, known = interpreter._get_np_dtype, dict[str, Any]()

    def remembered(kind: Any) -> Any:
        if (name := kind.scalar.name) not in known:
            known[name] = np_dtype(kind)
        return known[name]

    @cache
    def shaped(sides: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(n) for n in sides]), core.constexpr(math.prod(sides))

    def of_type(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shaped(kind.shape if kind.is_block() else ())

    core.tensor.__init__ = of_type
    interpreter._get_np_dtype = remembered


if INTERPRETED:
    _patch_once_a_launch()
    _remember_types()
