"""From a user's arguments to a checked `Problem`; every mistake is a `UserError`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dml_fast.errors import UserError, check_choice, check_number
from dml_fast.loss.problem import Problem

Logits = Sequence[Tensor] | Tensor


def prepare(
    logits: Logits,
    target: Tensor,
    *,
    kl_weight: float | Tensor,
    temperature: float,
    label_smoothing: float,
    class_weight: Tensor | None,
    ignore_index: int,
    peer_reduction: str,
    reduction: str,
    peer_weight: Tensor | None,
    row_weight: Tensor | None,
    teacher_logits: Logits | None,
) -> Problem:
    """Check the arguments of a call and flatten its batch dimensions.

    Raises:
        UserError: if an argument has a wrong shape, device, dtype or value, which the message
            states.
    """
    check_options(kl_weight, temperature, label_smoothing, peer_reduction, reduction, ignore_index)
    students = distributions(logits, "logits")
    _no_transform(students)
    first = students[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    for k, z in enumerate(students[1:], 1):
        if (z.dtype == torch.float64) != (dtype == torch.float64):
            _fail(
                f"logits[{k}] is {_name(z.dtype)} and logits[0] is {_name(first.dtype)}",
                "give all students float64 or none",
            )
    teachers: tuple[Tensor, ...] = ()
    if teacher_logits is not None and len(teacher_logits):
        teachers = distributions(teacher_logits, "teacher_logits")
        _alike(teachers[0], first, "teacher_logits[0]", "logits[0]")

    batch_shape, classes = first.shape[:-1], first.shape[-1]
    rows = math.prod(batch_shape)
    count = len(students)
    index, missing, soft = _target(target, first, dtype, ignore_index)
    if peer_weight is not None:
        shape = (count, count + len(teachers))
        meaning = "students x (students + teachers)"
        peer_weight = _tensor(peer_weight, shape, "peer_weight", meaning, first, dtype)
        peer_weight = peer_weight.clone().fill_diagonal_(0.0)
    if row_weight is not None:
        row_weight = _tensor(row_weight, batch_shape, "row_weight", "batch", first, dtype)
        row_weight = row_weight.reshape(rows)
    if class_weight is not None:
        class_weight = _tensor(class_weight, (classes,), "class_weight", "classes", first, dtype)
    if isinstance(kl_weight, Tensor):
        _constant(kl_weight, "kl_weight")
        if kl_weight.device.type != "cpu" and kl_weight.device != first.device:
            _fail(
                f"kl_weight is on {kl_weight.device} and the logits on {first.device}",
                "move it there",
            )
        kl_weight = kl_weight.to(dtype)
    return Problem(
        students=_flat(students, rows),
        teachers=_flat(teachers, rows),
        dtype=dtype,
        batch_shape=batch_shape,
        index=index,
        ignore_index=missing,
        soft=soft,
        class_weight=class_weight,
        row_weight=row_weight,
        peer_weight=peer_weight,
        kl_weight=kl_weight,
        temperature=float(temperature),
        label_smoothing=float(label_smoothing),
        peer_reduction=peer_reduction,
        reduction=reduction,
    )


def check_options(
    kl_weight: float | Tensor,
    temperature: float,
    label_smoothing: float,
    peer_reduction: str,
    reduction: str,
    ignore_index: int = -100,
) -> None:
    """Check the options that do not depend on the logits."""
    if not torch.compiler.is_compiling():  # which cannot trace the checks of types
        for name, value in (("kl_weight", kl_weight), ("label_smoothing", label_smoothing)):
            _check_number(name, value)
        if type(ignore_index) is not int:
            check_number("ignore_index", ignore_index, "a whole number", _is_whole)
    if isinstance(kl_weight, Tensor):
        if kl_weight.dim():
            _fail(f"kl_weight has shape {tuple(kl_weight.shape)}", "pass a number or a 0-d tensor")
    elif not -math.inf < kl_weight < math.inf:  # torch.compile cannot trace math.isfinite
        _fail(f"kl_weight is {kl_weight}", "pass a finite number")
    check_temperature(temperature)
    if not 0 <= label_smoothing <= 1:
        _fail(f"label_smoothing is {label_smoothing}", "it must be in [0, 1]")
    if peer_reduction not in ("mean", "sum"):
        check_choice("peer_reduction", peer_reduction, ("mean", "sum"))
    if reduction not in ("mean", "sum", "none"):
        check_choice("reduction", reduction, ("mean", "sum", "none"))


def _check_number(name: str, value: object) -> None:
    """Refuse what cannot be compared with a number."""
    if type(value) not in (int, float) and not isinstance(value, Tensor | np.ndarray):
        check_number(name, value, "a number", lambda number: True)


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral)


def check_grad_scale(scale: Tensor, problem: Problem) -> Tensor:
    """Return the scale without its graph; it must be () or (K,), on the logits' device."""
    students = len(problem.students)
    if scale.shape not in ((), (students,)):
        _fail(f"grad_scale has shape {tuple(scale.shape)}", f"it must be () or ({students},)")
    if scale.device != problem.device:
        _fail(
            f"grad_scale is on {scale.device} and the logits on {problem.device}", "move it there"
        )
    return scale.detach()


def may_look(device: torch.device) -> bool:
    """Return whether reading a value neither waits for a device nor breaks a graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _no_transform(students: tuple[Tensor, ...]) -> None:
    """Refuse the transforms that would differentiate the peers too."""
    what = None
    if torch._C._are_functorch_transforms_active():  # as torch.autograd.Function asks
        what = "a transform of torch.func (grad, vmap, jvp, ...) is active"
    elif forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(z).tangent is not None  # type: ignore[no-untyped-call]
        for z in students
    ):
        what = "logits have a tangent of forward-mode differentiation"
    if what:
        _fail(
            f"{what}, and the mutual loss has only a backward pass",
            "use torch.autograd.grad, or dml_fast.loss.reference.mutual_loss",
        )


def check_temperature(temperature: float) -> None:
    """Raise a `UserError` unless the temperature is positive and finite."""
    if not torch.compiler.is_compiling():
        _check_number("temperature", temperature)
    if not 0 < temperature < math.inf:
        _fail(f"temperature is {temperature}", "it must be above 0; the paper has 1")


def distributions(logits: Logits, name: str) -> tuple[Tensor, ...]:
    """Return the tensors (*batch, C) of a sequence or a stack: one shape, one device."""
    if isinstance(logits, Tensor):
        if logits.dim() < 2:
            _fail(
                f"{name} is one tensor of shape {tuple(logits.shape)}",
                "stack the students as (K, ..., C) or pass a list of K tensors (..., C)",
            )
        tensors: tuple[Tensor, ...] = logits.unbind(0)
    else:
        tensors = tuple(logits)
    if not tensors:
        _fail(f"{name} is empty", "pass the logits of at least one student")
    for k, z in enumerate(tensors):
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() < 1:
            kind = f"{_name(z.dtype)} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else z
            _fail(f"{name}[{k}] is {kind}", "pass floating-point tensors (..., C)")
        _alike(z, tensors[0], f"{name}[{k}]", f"{name}[0]")
    if tensors[0].shape[-1] == 0:
        _fail(f"{name} has shape {tuple(tensors[0].shape)}: no classes", "pass (..., C), C >= 1")
    return tensors


def _flat(tensors: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    return tuple(z if z.dim() == 2 else z.reshape(rows, z.shape[-1]) for z in tensors)


def _alike(z: Tensor, first: Tensor, name: str, other: str) -> None:
    if z.shape != first.shape:
        _fail(
            f"{name} has shape {tuple(z.shape)} and {other} {tuple(first.shape)}",
            "all must see the same batch and classes",
        )
    if z.device != first.device:
        _fail(f"{name} is on {z.device} and {other} on {first.device}", "move them to one device")


def _tensor(
    value: Tensor,
    shape: Sequence[int],
    name: str,
    meaning: str,
    first: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    if tuple(value.shape) != tuple(
        shape
    ):  # comparing a torch.Size would fix its numbers in torch.export
        _fail(f"{name} has shape {tuple(value.shape)}", f"it must be {tuple(shape)} ({meaning})")
    if value.device != first.device:
        _fail(f"{name} is on {value.device} and the logits on {first.device}", "move it there")
    _constant(value, name)
    return value if value.dtype == dtype else value.to(dtype)


def _constant(value: Tensor, name: str) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        _fail(f"{name} requires a gradient, and the loss has none for it", "pass its .detach()")


def _target(
    target: Tensor, first: Tensor, dtype: torch.dtype, ignore_index: int
) -> tuple[Tensor | None, int | None, Tensor | None]:
    """Return the fields ``(index, ignore_index, soft)`` of `Problem`."""
    batch_shape, classes = first.shape[:-1], first.shape[-1]
    if target.is_floating_point():
        soft = _tensor(target, first.shape, "target of probabilities", "(..., C)", first, dtype)
        return None, None, soft.reshape(-1, classes)
    if target.dtype == torch.bool or target.is_complex():
        _fail(f"target is {_name(target.dtype)}", "pass integer classes or probabilities")
    index = _tensor(target, batch_shape, "target of classes", "batch", first, target.dtype)
    index = index if index.dim() == 1 else index.reshape(-1)
    if may_look(index.device) and index.numel():
        # Elsewhere a wrong class fails torch's own assertion, or makes its row NaN.
        bounds = index.aminmax()
        low, high = int(bounds[0]), int(bounds[1])
        if low >= 0 and high < classes and not low <= ignore_index <= high:
            return index, None, None
        _in_range(index, classes, ignore_index)
    return index, ignore_index, None


def _in_range(index: Tensor, classes: int, ignore_index: int) -> None:
    wrong = ((index < 0) | (index >= classes)) & (index != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        _fail(
            f"target {int(index[row])} in row {row} is not a class",
            f"with C = {classes} classes use 0 to {classes - 1}, or ignore_index ({ignore_index})",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fail(what: str, remedy: str) -> NoReturn:
    raise UserError(f"{what}: {remedy}")
