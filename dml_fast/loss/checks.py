"""From a user's arguments to a checked `Problem`; every mistake is a `UserError`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dml_fast.errors import brief
from dml_fast.loss.divergences import check as check_divergence
from dml_fast.loss.problem import Problem
from dml_fast.loss.targets import classes_or_probabilities, labels
from dml_fast.loss.values import (
    choice,
    constant,
    dense,
    dtype_name,
    fail,
    finite,
    integer,
    number,
    shaped,
    tensor,
)

Logits = Iterable[Tensor] | Tensor
# Numbers in a list or a numpy array stand for a tensor on the logits' device.
Array = Any


def prepare(
    logits: Logits,
    target: Array,
    *,
    kl_weight: float | Tensor,
    temperature: float,
    label_smoothing: float,
    class_weight: Array | None,
    ignore_index: int,
    peer_reduction: str,
    reduction: str,
    peer_weight: Array | None,
    row_weight: Array | None,
    teacher_logits: Logits | None,
    class_dim: int | None = -1,
    ce_weight: float = 1.0,
    distribution: str = "categorical",
    divergence: str = "forward",
    beta: float = 0.5,
    kl_rows: str = "all",
) -> Problem:
    """Check the arguments of a call and flatten its batch dimensions.

    Raises:
        UserError: if an argument has a wrong shape, device, dtype or value, which the message
            states.
    """
    kl_weight, temperature, label_smoothing = check_options(
        kl_weight, temperature, label_smoothing, peer_reduction, reduction
    )
    ce_weight = check_ce_weight(ce_weight)
    check_distribution(distribution, class_weight)
    beta = check_divergence(divergence, beta, kl_rows, distribution)
    ignore_index = integer(ignore_index, "ignore_index")
    students = distributions(logits, "logits", class_dim)
    _no_transform(students)
    first = students[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    for k, z in enumerate(students):
        if (z.dtype == torch.float64) != (dtype == torch.float64):
            fail(
                f"logits[{k}] is {dtype_name(z.dtype)} and logits[0] is {dtype_name(first.dtype)}",
                "give all students float64 or none",
            )
    teachers: tuple[Tensor, ...] = ()
    if teacher_logits is not None and not isinstance(teacher_logits, Tensor):
        teacher_logits = several(teacher_logits, "teacher_logits") or None
    if teacher_logits is not None and (
        not isinstance(teacher_logits, Tensor) or teacher_logits.shape[:1] != (0,)
    ):
        teachers = distributions(teacher_logits, "teacher_logits", class_dim)
        _alike(teachers[0], first, "teacher_logits[0]", "logits[0]")

    batch_shape, classes = first.shape[:-1], first.shape[-1]
    rows = math.prod(batch_shape)
    target = tensor(target, "target", first.device)
    index: Tensor | None = None
    missing: int | None = None
    soft: Tensor | None
    if distribution == "bernoulli":
        soft = labels(target, first, dtype, label_smoothing, class_dim)
        label_smoothing = 0.0
    else:
        index, missing, soft = classes_or_probabilities(
            target, first, dtype, ignore_index, class_dim
        )
    if peer_weight is not None:
        count = len(students)
        shape = (count, count + len(teachers))
        meaning = "students x (students + teachers)"
        peer_weight = shaped(peer_weight, shape, "peer_weight", meaning, first, dtype)
        peer_weight = peer_weight.clone().fill_diagonal_(0.0)
    if row_weight is not None:
        row_weight = shaped(row_weight, batch_shape, "row_weight", "batch", first, dtype)
        row_weight = row_weight.reshape(rows)
    if class_weight is not None:
        class_weight = shaped(class_weight, (classes,), "class_weight", "classes", first, dtype)
    if isinstance(kl_weight, Tensor):
        constant(kl_weight, "kl_weight")
        if kl_weight.device.type != "cpu" and kl_weight.device != first.device:
            fail(
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
        temperature=temperature,
        label_smoothing=label_smoothing,
        peer_reduction=peer_reduction,
        reduction=reduction,
        ce_weight=ce_weight,
        distribution=distribution,
        divergence=divergence,
        beta=beta,
        kl_rows="all" if missing is None else kl_rows,
    )


def check_distribution(distribution: str, class_weight: Array | None = None) -> None:
    """Refuse an unknown distribution, and class weights where there is none of one class."""
    choice(distribution, "distribution", ("categorical", "bernoulli"))
    if distribution == "bernoulli" and class_weight is not None:
        fail(
            "class_weight weighs rows by their one class, and with distribution='bernoulli' a row "
            "may have several",
            "leave it out",
        )


def check_ce_weight(value: float) -> float:
    """Return the weight of the cross-entropy; refuse all but finite numbers of at least 0."""
    value = number(value, "ce_weight")
    if not 0 <= value < math.inf:
        fail(f"ce_weight is {value}", "pass a finite number, 0 or more")
    return value


def check_options(
    kl_weight: float | Tensor,
    temperature: float,
    label_smoothing: float,
    peer_reduction: str,
    reduction: str,
) -> tuple[float | Tensor, float, float]:
    """Check the options that do not depend on the logits; return the numbers among them."""
    if isinstance(kl_weight, Tensor):
        dense(kl_weight, "kl_weight")
        if kl_weight.dim():
            fail(f"kl_weight has shape {tuple(kl_weight.shape)}", "pass a number or a 0-d tensor")
        if kl_weight.is_complex():
            fail(f"kl_weight is {dtype_name(kl_weight.dtype)}", "pass a real number")
    else:
        kl_weight = number(kl_weight, "kl_weight", "pass a number or a 0-d tensor")
        if not finite(kl_weight):
            fail(f"kl_weight is {kl_weight}", "pass a finite number")
    temperature = check_temperature(temperature)
    label_smoothing = number(label_smoothing, "label_smoothing")
    if not 0 <= label_smoothing <= 1:
        fail(f"label_smoothing is {label_smoothing}", "it must be in [0, 1]")
    choice(peer_reduction, "peer_reduction", ("mean", "sum"))
    choice(reduction, "reduction", ("mean", "sum", "none"))
    return kl_weight, temperature, label_smoothing


def check_grad_scale(scale: Any, problem: Problem) -> float | Tensor | None:
    """Return the scale without its graph: a number, () or (K,), on the logits' device."""
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        if not getattr(scale, "shape", None) and not isinstance(scale, (list, tuple)):
            return number(scale, "grad_scale", "pass a number or a tensor () or (K,)")
        scale = tensor(scale, "grad_scale", problem.device).to(problem.dtype)
    kept: Tensor = dense(scale, "grad_scale")
    students = len(problem.students)
    if scale.shape not in ((), (students,)):
        fail(f"grad_scale has shape {tuple(scale.shape)}", f"it must be () or ({students},)")
    if scale.device != problem.device:
        fail(f"grad_scale is on {scale.device} and the logits on {problem.device}", "move it there")
    return kept.detach()


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
        fail(
            f"{what}, and the mutual loss has only a backward pass",
            "use torch.autograd.grad, or dml_fast.loss.reference.mutual_loss",
        )


def check_temperature(temperature: float) -> float:
    """Return the temperature; raise a `UserError` unless it is positive and finite."""
    temperature = number(temperature, "temperature")
    if not 0 < temperature < math.inf:
        fail(f"temperature is {temperature}", "it must be above 0; the paper has 1")
    return temperature


def distributions(logits: Logits, name: str, class_dim: int | None = None) -> tuple[Tensor, ...]:
    """Return the tensors (*batch, C) of an iterable or a stack: one shape, one device."""
    if isinstance(logits, Tensor):
        dense(logits, name)
        if logits.dim() < 2:
            fail(
                f"{name} is one tensor of shape {tuple(logits.shape)}",
                "stack the students as (K, ..., C) or pass a list of K tensors (..., C)",
            )
        tensors: tuple[Tensor, ...] = logits.unbind(0)
    else:
        tensors = several(logits, name)
    if not tensors:
        fail(f"{name} is empty", "pass the logits of at least one student")
    first = tensors[0]
    if not (_plain(first) and first.dim()):
        _check_one(first, first, f"{name}[0]", f"{name}[0]")
    size, device = first.shape, first.device
    for k, z in enumerate(tensors):
        if k and not (_plain(z) and z.shape == size and z.device == device):
            _check_one(z, first, f"{name}[{k}]", f"{name}[0]")
    if class_dim is not None and class_dim != -1:
        shape = tuple(tensors[0].shape)
        if not -len(shape) <= class_dim < len(shape):
            fail(f"class_dim is {class_dim} and {name} have shape {shape}", "name one of these")
        tensors = tuple(z.movedim(class_dim, -1) for z in tensors)
    if tensors[0].shape[-1] == 0:
        fail(f"{name} has shape {tuple(tensors[0].shape)}: no classes", "pass (..., C), C >= 1")
    return tensors


def _check_one(z: Any, first: Tensor, name: str, other: str) -> None:
    if not isinstance(z, Tensor):
        fail(f"{name} is {brief(z)}", _tensor_of(z))
    dense(z, name)
    if not z.is_floating_point() or z.dim() < 1:
        kind = f"{dtype_name(z.dtype)} of shape {tuple(z.shape)}"
        fail(f"{name} is {kind}", "pass floating-point tensors (..., C)")
    _alike(z, first, name, other)


def _plain(z: Any) -> bool:
    """Return whether `_check_one` has nothing to say of a value alone, which is quicker to ask."""
    return (
        isinstance(z, Tensor)
        and z.layout is torch.strided
        and not z.is_nested
        and z.is_floating_point()
    )


def several(logits: Any, name: str) -> tuple[Any, ...]:
    """Return the entries of a stack, list, tuple or generator: one for each student."""
    if isinstance(logits, Tensor) and (logits.dim() == 0 or dense(logits, name) is not logits):
        fail(f"{name} is {brief(logits)}", "pass one tensor for each student")
    if isinstance(logits, (list, tuple)):
        return tuple(logits)
    if isinstance(logits, Mapping):
        fail(f"{name} is {brief(logits)}", f"pass a list of K tensors, {_FROM_OUTPUTS}")
    try:
        return tuple(logits)
    except TypeError:
        fail(f"{name} is {brief(logits)}", "pass a list of K tensors (..., C)")


_FROM_OUTPUTS = "such as [output.logits for output in outputs]"


def _tensor_of(output: Any) -> str:
    """Return the advice for a network's output that is no tensor."""
    if hasattr(output, "logits") or isinstance(output, Mapping):
        return f"pass tensors, {_FROM_OUTPUTS}"
    return "pass floating-point tensors (..., C)"


def _flat(tensors: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    if not tensors or tensors[0].dim() == 2:
        return tensors
    return tuple(z.reshape(rows, z.shape[-1]) for z in tensors)


def _alike(z: Tensor, first: Tensor, name: str, other: str) -> None:
    if z.shape != first.shape:
        fail(
            f"{name} has shape {tuple(z.shape)} and {other} {tuple(first.shape)}",
            "all must see the same batch and classes",
        )
    if z.device != first.device:
        fail(f"{name} is on {z.device} and {other} on {first.device}", "move them to one device")
