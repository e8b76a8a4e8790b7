"""From a `Problem` to a kernel's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dml_fast.kernels.choice import (
    divergence_arguments,
    forward_kernel,
    gradient_kernel,
    read_width,
    row_tiles,
    saved_rows,
)
from dml_fast.kernels.count import count
from dml_fast.kernels.finish import FEW, GROUP
from dml_fast.kernels.launch_table import choose, choose_gradient
from dml_fast.kernels.scratch import counters
from dml_fast.loss.problem import MutualStats, Problem, Solution

MOST = 8  # distributions: the kernels have that many pointers
_FEW_ROWS = 1024  # up to here each program counts the labels itself
_STATS = {"none": 0, "cheap": 1, "all": 2}


class Answer(NamedTuple):
    """The results of a forward launch; ``saved`` is None unless wanted."""

    solution: Solution
    saved: Tensor | None


def unsupported_reason(problem: Problem) -> str | None:
    """Return why the kernels cannot take a problem, or None if they can."""
    students, rows, _ = problem.shape
    if problem.dtype == torch.float64:
        return "they compute in float32 and the logits are float64"
    if students + len(problem.teachers) > MOST:
        return f"they take {MOST} students and teachers at most"
    if rows == 0:
        return "the batch is empty"
    if rows >= 2**31:
        return "they take fewer than 2^31 rows"
    if problem.ce_weight == 0:
        return "they weigh the divergence against the cross-entropy, and ce_weight is 0"
    if problem.distribution == "bernoulli":
        return "they have no labels that do not exclude each other (bernoulli)"
    return None


def launch(problem: Problem, *, with_grad: bool, save: bool, stats: str) -> Answer:
    """Compute losses, statistics, and gradients or what the backward pass needs, in one launch.

    Labels that must be counted first take a second, small launch if the batch has over 1,024 rows.
    """
    outputs = launch_forward(problem, with_grad, save, stats)
    return unpack(problem, outputs, with_grad, save, stats)


def launch_forward(
    problem: Problem, with_grad: bool, save: bool, stats: str, *, keep_counters: bool = True
) -> list[Tensor]:
    """Launch, and return the tensors that `unpack` reads; no two of them share memory."""
    other = divergence_arguments(problem)
    if other and stats == "all":  # of which only the first four depend on the divergence
        paper = replace(problem, divergence="forward")
        rest = launch_forward(paper, False, False, stats, keep_counters=keep_counters)
        problem = replace(problem, in_place=False)
        found = launch_forward(problem, with_grad, save, "cheap", keep_counters=keep_counters)
        return found[:4] + rest[4:6] + found[4:]
    students, rows, _ = problem.shape
    wanted = _STATS[stats]
    itemsize = max(z.element_size() for z in problem.students + problem.teachers)
    in_place = problem.in_place and wanted < 2  # all statistics read the logits once more
    config = choose(
        row_tiles(problem, wanted == 2),
        problem.shape[2],
        itemsize,
        bool(other),
        distributions=len(problem.students + problem.teachers),
        width=read_width(problem, itemsize),
        in_place=in_place and with_grad,
    )
    programs = -(-rows // config.rows)
    quantities = (2 * students, 4 * students, 5 * students + 1 + students * students)[wanted]
    by_row = problem.reduction == "none"
    device = problem.device
    common = common_arguments(problem)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    losses = floats(students, rows) if by_row else floats(students)
    measured = floats(2, students)
    correct = torch.empty(students, dtype=torch.int64, device=device)
    finite = torch.empty(students, dtype=torch.uint8, device=device)
    more = information = measured
    if wanted == 2:
        more, information = floats(students + 1 + students * students), floats(rows)
    saved = floats(saved_rows(problem), rows) if save else None
    groups = -(-programs // GROUP.value)
    # Multiples of 16 bytes: Triton would compile again for pointers that are aligned otherwise.
    first, second = (-(-quantities * n // 4) * 4 for n in (programs, groups))
    scratch = floats(first + second + quantities)
    grads = None
    if with_grad:
        grads = problem.students if in_place else tuple(map(empty_like, problem.students))
    kernel, shape = forward_kernel(config, other)
    if not other:
        shape["information"] = information
    _run(
        kernel,
        (programs,),
        device,
        **common,
        **other,
        **pointers("g", grads or problem.students),
        grad_scale=1.0 if problem.grad_scale is None else problem.grad_scale,
        losses=losses,
        stats=measured,
        correct=correct,
        finite=finite,
        more=more,
        saved=measured if saved is None else saved,
        partials=scratch,
        groups=scratch[first:],
        totals=scratch[first + second :],
        counters=counters(device, 1 + groups, keep_counters),
        **shape,
        GRAD=with_grad,
        SAVE=save,
        STATS=wanted,
        SCALE_ON_DEVICE=isinstance(problem.grad_scale, Tensor),
        SCALE_STEP=_step(problem.grad_scale),
        BY_ROW=by_row,
        QUANTITIES=quantities,
        # In two levels, blocks of a cluster would read what others of it have just stored.
        AT_ONCE=programs <= FEW or config.ctas > 1,
        num_warps=config.warps,
    )
    outputs = [losses]
    if wanted:
        outputs += [measured, correct, finite]
    if wanted == 2:
        outputs += [more, information]
    if saved is not None:
        outputs.append(saved)
    return outputs + list(grads or ())


def unpack(
    problem: Problem, outputs: list[Tensor], with_grad: bool, save: bool, stats: str
) -> Answer:
    """Return the tensors of `launch_forward` as a solution, and what was saved."""
    students = len(problem.students)
    left = iter(outputs)
    losses = next(left)
    result = None
    if stats != "none":
        measured, correct, finite = next(left), next(left), next(left)
        further = {}
        if stats == "all":
            more, information = next(left), next(left)
            further = {
                "entropy": more[:students],
                "mutual_information": more[students],
                "pairwise_kl": more[students + 1 :].reshape(students, students),
                "row_mutual_information": information.reshape(problem.batch_shape),
            }
        # not _replace: torch 2.7 does not trace it
        result = MutualStats(measured[0], measured[1], correct, finite.view(torch.bool), **further)
    saved = next(left) if save else None
    grads = tuple(left) if with_grad else None
    return Answer(Solution(losses, grads, result), saved)


def launch_gradient(
    problem: Problem,
    saved: Tensor,
    outer: Tensor,
    grads: Sequence[Tensor | None],
    first: int = 0,
    classes: int | None = None,
) -> None:
    """Write the gradients of ``(losses * outer).sum()`` into the given tensors.

    Args:
        problem: the same as in `launch`.
        saved: what `launch` saved.
        outer: (K,), or (K, N) with reduction "none", any strides.
        grads: K contiguous tensors (N, C), which may be the logits; None for a student without a
            gradient.
        first: the first class of the logits and gradients, if these are not of all classes.
        classes: C in that case; target and weights are of all classes.
    """
    _, rows, width = problem.shape
    config = choose_gradient(row_tiles(problem, False), width)
    shape = (-(-rows // config.rows), -(-width // config.block))
    filled = tuple(z if g is None else g for z, g in zip(problem.students, grads, strict=True))
    kernel, other = gradient_kernel(problem, width if classes is None else classes)
    _run(
        kernel,
        shape,
        problem.device,
        **(common_arguments(problem) | {"C": width if classes is None else classes}),
        **other,
        **pointers("g", filled),
        saved=saved,
        outer=outer,
        outer_student=outer.stride(0),
        outer_row=outer.stride(1) if outer.dim() > 1 else 0,
        first=first,
        WIDTH=width,
        R=config.rows,
        BLOCK=config.block,
        LEARNERS=sum(1 << k for k, g in enumerate(grads) if g is not None),
        num_warps=config.warps,
    )


def _run(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Launch on the tensors' device, as Triton launches on the current one."""
    current = nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
    with current:
        kernel[grid](**arguments, enable_fp_fusion=True)


def empty_like(z: Tensor) -> Tensor:
    """Return an empty tensor like `z`, but contiguous: the kernels write rows of C."""
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def pointers(name: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return eight arguments; those beyond the tensors repeat the first and are not read."""
    filled = tensors + tensors[:1] * (MOST - len(tensors))
    return {f"{name}{i}": tensor for i, tensor in enumerate(filled)}


def common_arguments(problem: Problem) -> dict[str, Any]:
    """Return the arguments of all kernels: logits, target and options."""
    _, rows, classes = problem.shape
    students, student_strides = _alike(problem.students)
    teachers, teacher_strides = _alike(problem.teachers) if problem.teachers else ((), (0, 0))
    first = students[0]
    soft = problem.soft
    labels, given, label_count = _labels(problem)
    ways, per_row, row_count = _rows(problem)
    dense = {
        "index": problem.index,
        "class_weight": problem.class_weight,
        "row_weight": problem.row_weight,
        "peer_weight": problem.peer_weight,
        "label_count": label_count,
        "row_count": row_count,
    }
    kl_weight = problem.kl_weight
    if not isinstance(kl_weight, Tensor) or kl_weight.device != first.device:
        kl_weight = float(kl_weight)  # a tensor on the CPU is read without waiting
    return {
        **pointers("z", students + teachers),
        "soft": first if soft is None else soft,
        **{name: first if x is None else x.contiguous() for name, x in dense.items()},
        "kl_weight": kl_weight,
        "N": rows,
        "ignore_index": -1 if problem.ignore_index is None else problem.ignore_index,
        "temperature": problem.temperature,
        "smoothing": problem.label_smoothing,
        "given_labels": given,
        "per_row": per_row,
        "K": len(students),
        "L": len(students) + len(teachers),
        "C": classes,
        "Z_ROW": student_strides[0],
        "Z_COL": student_strides[1],
        "T_ROW": teacher_strides[0],
        "T_COL": teacher_strides[1],
        "SOFT_ROW": 0 if soft is None else soft.stride(0),
        "SOFT_COL": 0 if soft is None else soft.stride(1),
        "LABELS": labels,
        "SOFT": soft is not None,
        "SMOOTH": problem.label_smoothing != 0.0,
        "IGNORE": problem.ignore_index is not None,
        "LABELLED": _only_labelled(problem),
        "ROWS": ways,
        "CLASS_WEIGHT": problem.class_weight is not None,
        "ROW_WEIGHT": problem.row_weight is not None,
        "PEER_WEIGHT": problem.peer_weight is not None and len(students + teachers) > 1,
        "PEER_MEAN": problem.peer_reduction == "mean",
        "TEMPERED": problem.temperature != 1.0,
        "KL_ON_DEVICE": isinstance(kl_weight, Tensor),
        "MEAN": problem.reduction == "mean",
    }


def _alike(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Return the tensors with common strides, which are constants of the compiled kernels."""
    strides = {(z.stride(0), z.stride(1)) for z in tensors}
    if len(strides) > 1:
        tensors = tuple(z.contiguous() for z in tensors)
    row, col = tensors[0].stride()
    return tensors, (row, col)


def _step(scale: float | Tensor | None) -> int:
    """Return the stride from one student's gradient scale to the next."""
    return scale.stride(0) if isinstance(scale, Tensor) and scale.dim() else 0


def _labels(problem: Problem) -> tuple[int, float, Tensor | None]:
    """Return LABELS, given_labels and label_count of `dml_fast.kernels.rows.label_share`."""
    _, rows, _ = problem.shape
    if problem.whole is not None:
        labels = problem.whole[0]
        if isinstance(labels, Tensor):
            return 1, 0.0, labels
        return 0, 1.0 / labels if labels else 0.0, None
    if problem.index is None or (problem.ignore_index is None and problem.class_weight is None):
        return 0, 1.0 / rows, None
    if rows <= _FEW_ROWS:
        return 2, 0.0, None
    return 1, 0.0, count_labels(problem)


def _only_labelled(problem: Problem) -> bool:
    """Return whether there may be rows that have no divergence."""
    return (
        problem.kl_rows == "labelled"
        and problem.index is not None
        and problem.ignore_index is not None
    )


def _rows(problem: Problem) -> tuple[int, float, Tensor | None]:
    """Return ROWS, per_row and row_count of `dml_fast.kernels.rows.row_share`."""
    _, rows, _ = problem.shape
    if problem.whole is not None:
        counted = problem.whole[1]
        if isinstance(counted, Tensor):
            return 1, 1.0 / rows, counted
        return 0, 1.0 / counted, None
    if not _only_labelled(problem):
        return 0, 1.0 / rows, None
    if problem.class_weight is None:
        return 3, 1.0 / rows, None
    if rows <= _FEW_ROWS:
        return 2, 1.0 / rows, None
    return 1, 1.0 / rows, count_labels(problem, weighted=False)


def count_labels(problem: Problem, weighted: bool = True) -> Tensor:
    """Return the number of labelled rows or the sum of their class weights, () fp32."""
    assert problem.index is not None
    index, weight = problem.index.contiguous(), problem.class_weight
    weight = weight if weighted else None
    total = torch.empty((), dtype=torch.float32, device=index.device)
    _run(
        count,
        (1,),
        index.device,
        index=index,
        class_weight=index if weight is None else weight.contiguous(),
        total=total,
        ignore_index=-1 if problem.ignore_index is None else problem.ignore_index,
        N=index.shape[0],
        C=problem.shape[2],
        BLOCK=8192,
        IGNORE=problem.ignore_index is not None,
        CLASS_WEIGHT=weight is not None,
        num_warps=16,
    )
    return total


def counted(problem: Problem) -> Problem:
    """Return the problem with its labels counted, if that takes a launch.

    So the backward pass need not count them again.
    """
    labels, _, label_count = _labels(problem)
    if labels != 1 or problem.whole is not None or label_count is None:
        return problem
    ways, _, row_count = _rows(problem)
    rows = problem.shape[1] if ways == 0 else label_count if ways == 3 else row_count
    assert rows is not None
    return replace(problem, whole=(label_count, rows))
