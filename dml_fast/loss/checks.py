"""From a user's arguments to a checked `Problem`; every mistake is a `UserError`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dml_fast.errors import brief
from dml_fast.loss.divergences import check as check_divergence
from dml_fast.loss.problem import Problem
from dml_fast.loss.values import (
    choice,
    constant,
    dense,
    dtype_name,
    fail,
    finite,
    integer,
    number,
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
    for k, z in enumerate(students[1:], 1):
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
    count = len(students)
    target = tensor(target, "target", first.device)
    index: Tensor | None = None
    missing: int | None = None
    soft: Tensor | None
    if distribution == "bernoulli":
        soft = _labels(target, first, dtype, label_smoothing, class_dim)
        label_smoothing = 0.0
    else:
        index, missing, soft = _target(target, first, dtype, ignore_index, class_dim)
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
    for k, z in enumerate(tensors):
        if not isinstance(z, Tensor):
            fail(f"{name}[{k}] is {brief(z)}", _tensor_of(z))
        dense(z, f"{name}[{k}]")
        if not z.is_floating_point() or z.dim() < 1:
            kind = f"{dtype_name(z.dtype)} of shape {tuple(z.shape)}"
            fail(f"{name}[{k}] is {kind}", "pass floating-point tensors (..., C)")
        _alike(z, tensors[0], f"{name}[{k}]", f"{name}[0]")
    if class_dim is not None and class_dim != -1:
        shape = tuple(tensors[0].shape)
        if not -len(shape) <= class_dim < len(shape):
            fail(f"class_dim is {class_dim} and {name} have shape {shape}", "name one of these")
        tensors = tuple(z.movedim(class_dim, -1) for z in tensors)
    if tensors[0].shape[-1] == 0:
        fail(f"{name} has shape {tuple(tensors[0].shape)}: no classes", "pass (..., C), C >= 1")
    return tensors


def several(logits: Any, name: str) -> tuple[Any, ...]:
    """Return the entries of a stack, list, tuple or generator: one for each student."""
    if isinstance(logits, Tensor) and (logits.dim() == 0 or dense(logits, name) is not logits):
        fail(f"{name} is {brief(logits)}", "pass one tensor for each student")
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
    return tuple(z if z.dim() == 2 else z.reshape(rows, z.shape[-1]) for z in tensors)


def _alike(z: Tensor, first: Tensor, name: str, other: str) -> None:
    if z.shape != first.shape:
        fail(
            f"{name} has shape {tuple(z.shape)} and {other} {tuple(first.shape)}",
            "all must see the same batch and classes",
        )
    if z.device != first.device:
        fail(f"{name} is on {z.device} and {other} on {first.device}", "move them to one device")


def _tensor(
    value: Array,
    shape: Sequence[int],
    name: str,
    meaning: str,
    first: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    given = tensor(value, name, first.device)
    if given.is_complex():
        fail(f"{name} is {dtype_name(given.dtype)}", "pass real numbers")
    # Comparing a torch.Size would fix its numbers in torch.export.
    if tuple(given.shape) != tuple(shape):
        fail(f"{name} has shape {tuple(given.shape)}", f"it must be {tuple(shape)} ({meaning})")
    if given.device != first.device:
        fail(f"{name} is on {given.device} and the logits on {first.device}", "move it there")
    constant(given, name)
    return given if given.dtype == dtype else given.to(dtype)


def _target(
    target: Tensor, first: Tensor, dtype: torch.dtype, ignore_index: int, class_dim: int | None
) -> tuple[Tensor | None, int | None, Tensor | None]:
    """Return the fields ``(index, ignore_index, soft)`` of `Problem`."""
    batch_shape, classes = first.shape[:-1], first.shape[-1]
    if class_dim is None:
        _one_order(target, first)
    if target.is_floating_point():
        if class_dim is not None and target.dim() == first.dim():
            target = target.movedim(class_dim, -1)
        soft = _tensor(target, first.shape, "target of probabilities", "(..., C)", first, dtype)
        return None, None, soft.reshape(-1, classes)
    if target.dtype == torch.bool or target.is_complex():
        fail(f"target is {dtype_name(target.dtype)}", "pass integer classes or probabilities")
    index = _tensor(target, batch_shape, "target of classes", "batch", first, target.dtype)
    index = index if index.dim() == 1 else index.reshape(-1)
    if index.dtype in _UNSIGNED:  # for which torch lacks most operations
        index = index.to(torch.int64)
        if target.dtype == torch.uint64:  # 2^64 - 100 must not become -100
            index = index.masked_fill(index < 0, torch.iinfo(torch.int64).max)
    if may_look(index.device) and index.numel():
        # Elsewhere a wrong class fails torch's own assertion, or makes its row NaN.
        bounds = index.aminmax()
        low, high = int(bounds[0]), int(bounds[1])
        if low >= 0 and high < classes and not low <= ignore_index <= high:
            return index, None, None
        _in_range(index, classes, ignore_index)
    return index, ignore_index, None


def _labels(
    target: Tensor, first: Tensor, dtype: torch.dtype, smoothing: float, class_dim: int | None
) -> Tensor:
    """Return the probabilities of labels (N, C) that do not exclude each other, smoothed."""
    if class_dim is not None and target.dim() == first.dim():
        target = target.movedim(class_dim, -1)
    soft = _tensor(target, first.shape, "target of labels", "(..., C)", first, dtype)
    soft = soft.reshape(-1, first.shape[-1])
    if may_look(soft.device) and soft.numel() and not ((soft >= 0) & (soft <= 1)).all():
        wrong = soft[~((soft >= 0) & (soft <= 1))][0]
        fail(f"target of labels has {wrong.item():g}", "pass 0 or 1, or probabilities")
    return soft * (1 - smoothing) + smoothing / 2 if smoothing else soft


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _one_order(target: Tensor, first: Tensor) -> None:
    """Refuse what fits, or only fits, torch's order of dimensions: classes in dimension 1."""
    shape, ours = tuple(first.shape), tuple(first.shape[:-1])
    if len(shape) < 3 or shape[1:] == shape[-1:] * (len(shape) - 1) == (1,) * (len(shape) - 1):
        return
    if torch.compiler.is_compiling():  # it would fix the numbers in the shape
        return
    torchs = (shape[0], *shape[2:])
    advice = "pass class_dim=1 if that has the classes, class_dim=-1 if the last dimension has them"
    if target.is_floating_point():
        if tuple(target.shape) == shape and may_look(target.device):
            whole = [bool(((target.sum(d) - 1).abs() < 0.01).all()) for d in (1, -1)]
            if whole == [True, False]:
                fail(
                    "target of probabilities sums to 1 over dimension 1, not over the last", advice
                )
    elif tuple(target.shape) == torchs:
        both = " both with the classes in dimension 1 and in the last" if ours == torchs else ""
        only = "" if both else " only with the classes in dimension 1"
        fail(f"target of classes {torchs} fits logits {shape}{both}{only}", advice)


def _in_range(index: Tensor, classes: int, ignore_index: int) -> None:
    index = index.long()  # a label of 156 in uint8 is equal to -100
    wrong = ((index < 0) | (index >= classes)) & (index != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        fail(
            f"target {int(index[row])} in row {row} is not a class",
            f"with C = {classes} classes use 0 to {classes - 1}, or ignore_index ({ignore_index})",
        )
