"""The target of the mutual loss: classes, probabilities, or labels that exclude no other."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_fast import _native
from dml_fast.loss.values import dtype_name, fail, may_look, shaped


def classes_or_probabilities(
    target: Tensor, first: Tensor, dtype: torch.dtype, ignore_index: int, class_dim: int | None
) -> tuple[Tensor | None, int | None, Tensor | None]:
    """Return the fields ``(index, ignore_index, soft)`` of `Problem`."""
    batch_shape, classes = first.shape[:-1], first.shape[-1]
    if (
        target.dtype == torch.int64
        and target.dim() == 1 == first.dim() - 1
        and (target.shape[0] == first.shape[0] and target.device == first.device)
    ):
        return _checked(target, classes, ignore_index)  # as in most calls, and soon
    if class_dim is None:
        _one_order(target, first)
    if target.is_floating_point():
        if class_dim is not None and target.dim() == first.dim():
            target = target.movedim(class_dim, -1)
        soft = shaped(target, first.shape, "target of probabilities", "(..., C)", first, dtype)
        return None, None, soft.reshape(-1, classes)
    if target.dtype == torch.bool or target.is_complex():
        fail(f"target is {dtype_name(target.dtype)}", "pass integer classes or probabilities")
    index = shaped(target, batch_shape, "target of classes", "batch", first, target.dtype)
    index = index if index.dim() == 1 else index.reshape(-1)
    if index.dtype in _UNSIGNED:  # for which torch lacks most operations
        index = index.to(torch.int64)
        if target.dtype == torch.uint64:  # 2^64 - 100 must not become -100
            index = index.masked_fill(index < 0, torch.iinfo(torch.int64).max)
    return _checked(index, classes, ignore_index)


def _checked(index: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, int | None, None]:
    """Return classes (N,) as fields of `Problem`; None where no row can be ignored."""
    if may_look(index.device) and index.numel():
        # Elsewhere a wrong class fails torch's own assertion, or makes its row NaN.
        low, high = _bounds(index)
        if low >= 0 and high < classes and not low <= ignore_index <= high:
            return index, None, None
        _in_range(index, classes, ignore_index)
    return index, ignore_index, None


def _bounds(index: Tensor) -> tuple[int, int]:
    """Return the smallest and the largest of integers on the CPU."""
    if index.dtype == torch.int64 and type(index) is Tensor and index.is_contiguous():
        return _native.smallest_and_largest(index.data_ptr(), len(index))
    low, high = index.aminmax()
    return int(low), int(high)


def labels(
    target: Tensor, first: Tensor, dtype: torch.dtype, smoothing: float, class_dim: int | None
) -> Tensor:
    """Return the probabilities of labels (N, C) that do not exclude each other, smoothed."""
    if class_dim is not None and target.dim() == first.dim():
        target = target.movedim(class_dim, -1)
    soft = shaped(target, first.shape, "target of labels", "(..., C)", first, dtype)
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
