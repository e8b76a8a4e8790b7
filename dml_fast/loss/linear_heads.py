"""The students' last layers, checked: the hidden states, weights and biases of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dml_fast.errors import brief
from dml_fast.loss.checks import several
from dml_fast.loss.values import dense, fail

Tensors = Iterable[Tensor] | Tensor  # one tensor is a stack along its first dimension
Biases = Iterable[Tensor | None] | Tensor | None


class Head(NamedTuple):
    """A linear layer and its input: the logits are ``hidden @ weight.T + bias``."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of `torch.nn.functional.linear`'s result here, under autocast too."""
        own = self.hidden.dtype
        if own == torch.float64:  # which autocast leaves alone
            return own
        return _autocast_dtype(self.hidden.device) or own

    def to(self, dtype: torch.dtype) -> Head:
        """Return the head in this dtype; tensors that have it already are not copied."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.hidden.to(dtype), self.weight.to(dtype), bias)


def read(
    hidden: Tensors | None, weight: Tensors | None, bias: Biases, prefix: str = ""
) -> tuple[list[Head], list[Tensor]]:
    """Return the heads with their batch dimensions flattened, and placeholders for their logits.

    A placeholder has the shape (*batch, C), dtype and device of the logits, but the memory of one
    row.

    Raises:
        UserError: if shapes, devices or dtypes do not match; it names the arguments with
            ``prefix`` before them.
    """
    names = [f"{prefix}{name}" for name in ("hidden", "weight", "bias")]
    inputs = () if hidden is None else several(hidden, names[0])
    weights = () if weight is None else several(weight, names[1])
    biases = (None,) * len(inputs) if bias is None else several(bias, names[2])
    for name, given in zip(names[1:], (weights, biases), strict=True):
        if len(given) != len(inputs):
            fail(
                f"{name} has {len(given)} entries and {names[0]} {len(inputs)}",
                "pass the same number",
            )
    for name, given in zip(names, (inputs, weights, biases), strict=True):
        for k, one in enumerate(given):
            if not (isinstance(one, Tensor) or (one is None and given is biases)):
                fail(f"{name}[{k}] is {brief(one)}", "pass tensors")
            if isinstance(one, Tensor):
                dense(one, f"{name}[{k}]")
    heads, logits = [], []
    for k, (h, w, b) in enumerate(zip(inputs, weights, biases, strict=True)):
        whose = f"{names[0]}[{k}]"
        _check_hidden(h, inputs[0], whose, f"{names[0]}[0]")
        classes = weights[0].shape[0] if weights[0].dim() else 0
        _check(w, (classes, h.shape[-1]), f"{names[1]}[{k}]", "classes x features", h, whose)
        if not classes:
            fail(f"{names[1]}[{k}] has shape {tuple(w.shape)}: no classes", "C must be 1 or more")
        if b is not None:
            _check(b, (classes,), f"{names[2]}[{k}]", "classes", h, whose)
        head = Head(h.reshape(math.prod(h.shape[:-1]), h.shape[-1]), w, b)
        heads.append(head)
        row = torch.empty(classes, dtype=head.dtype, device=h.device)
        logits.append(row.expand(*h.shape[:-1], classes))
    return heads, logits


def _check_hidden(h: Tensor, first: Tensor, name: str, other: str) -> None:
    if not h.is_floating_point() or h.dim() < 1:
        fail(f"{name} is {h.dtype} of shape {tuple(h.shape)}", "pass floating-point (..., D)")
    if h.shape[:-1] != first.shape[:-1]:
        fail(
            f"{name} has shape {tuple(h.shape)} and {other} {tuple(first.shape)}",
            "all must see the same batch: only the last dimension may differ",
        )
    if h.device != first.device:
        fail(f"{name} is on {h.device} and {other} on {first.device}", "move them to one device")


def _check(
    value: Tensor, shape: tuple[int, ...], name: str, meaning: str, hidden: Tensor, other: str
) -> None:
    if value.shape != shape:
        fail(f"{name} has shape {tuple(value.shape)}", f"it must be {shape} ({meaning})")
    if value.device != hidden.device:
        fail(f"{name} is on {value.device} and {other} on {hidden.device}", "move it there")
    double = torch.float64 in (value.dtype, hidden.dtype)
    if value.dtype != hidden.dtype and (double or _autocast_dtype(hidden.device) is None):
        fail(f"{name} is {value.dtype} and {other} {hidden.dtype}", "cast one, or use autocast")


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
