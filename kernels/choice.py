"""Which kernels compute a divergence, and what those of another than the paper's take."""

from __future__ import annotations

import math
from typing import Any

from dml_fast.kernels.divergence_gradient import divergence_gradient
from dml_fast.kernels.divergence_long import divergence_long
from dml_fast.kernels.divergence_short import divergence_short
from dml_fast.kernels.gradient import gradient
from dml_fast.kernels.launch_table import Config
from dml_fast.kernels.one_pass import one_pass
from dml_fast.kernels.two_sweep import two_sweep
from dml_fast.loss.problem import Problem

_KINDS = {"reverse": 0, "symmetric": 1, "jsd": 2}  # as divergence_terms.py has them


def divergence_arguments(problem: Problem) -> dict[str, Any]:
    """Return what the kernels of the other divergences take beside the rest; {} for the paper's.

    One student without a teacher has no divergence: the paper's kernels have that case.
    """
    if problem.divergence == "forward" or len(problem.students + problem.teachers) == 1:
        return {}
    return {"KIND": _KINDS[problem.divergence], "beta": problem.beta}


def forward_kernel(config: Config, other: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the kernel of a configuration, and the arguments that are its own."""
    if config.kernel == "one_pass":
        shape: dict[str, Any] = {"R": config.rows, "BLOCK": config.block}
        return divergence_short if other else one_pass, shape
    threads = 32 * config.warps * config.ctas
    shape = {"THREADS": threads, "EACH": config.block // threads, "SPREAD": config.spread}
    if other:
        if other["KIND"] == _KINDS["jsd"]:
            shape["EACH"] = 2  # with 128 bits ptxas takes 168 to 255 registers, and spills
        return divergence_long, shape
    shape |= {"BATCH": config.batch, "HINTS": config.hints}
    return two_sweep, shape | ({"num_ctas": config.ctas} if config.ctas > 1 else {})


def gradient_kernel(problem: Problem, classes: int) -> tuple[Any, dict[str, Any]]:
    """Return the kernel of the backward pass, and the arguments that are its own."""
    other = divergence_arguments(problem)
    if not other:
        return gradient, {}
    return divergence_gradient, other | {"log_classes": math.log2(classes)}


def saved_rows(problem: Problem) -> int:
    """Return how many numbers are saved for each row of the batch."""
    students = len(problem.students)
    own = 2 * students if divergence_arguments(problem) else students
    return 2 * (students + len(problem.teachers)) + own + 1


def row_tiles(problem: Problem, everything: bool) -> int:
    """Return how many rows of C numbers a program holds for a row of the batch."""
    extras = (
        problem.soft is not None or problem.label_smoothing != 0.0,
        problem.peer_weight is not None,
        problem.temperature != 1.0,
        everything,
    )
    return len(problem.students + problem.teachers) + sum(extras)


def read_width(problem: Problem, itemsize: int) -> int:
    """Return how many adjacent logits of any row a thread may read at once, 128 bits at most."""
    target = () if problem.soft is None else (problem.soft,)
    strides = (x.stride(0) for x in problem.students + problem.teachers + target)
    return math.gcd(problem.shape[2], *strides, 16 // itemsize)
