"""The kernels for chunks of classes, as `dml_fast.loss.linear_classes` does it in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dml_fast.kernels.autograd import relative
from dml_fast.kernels.launch import launch, launch_gradient
from dml_fast.loss.problem import Problem, Solution


def scratch(distributions: int) -> int:
    """Return how many numbers `overwrite` holds for each row and class, beside the logits."""
    return 0


def unsupported_reason(problem: Problem) -> str | None:
    """As `dml_fast.loss.linear_classes.unsupported_reason`: they compute all divergences so."""
    return None


def summarise(solver: Any, problem: Problem, stats: str) -> tuple[Solution, Tensor]:
    """As `dml_fast.loss.linear_classes.summarise`, with logarithms of base 2."""
    (losses, _, measured), saved = launch(
        relative(problem), with_grad=False, save=True, stats=stats
    )
    assert saved is not None
    return Solution(losses * problem.ce_weight, None, measured), saved


def overwrite(
    problem: Problem,
    saved: Tensor,
    outer: Tensor,
    start: int,
    classes: int,
    learners: Sequence[bool],
) -> None:
    """As `dml_fast.loss.linear_classes.overwrite`."""
    grads = [z if learns else None for z, learns in zip(problem.students, learners, strict=True)]
    if problem.reduction != "none":
        outer = outer.reshape(-1)
    launch_gradient(relative(problem), saved, outer * problem.ce_weight, grads, start, classes)
