"""Numbers and tensors from what users pass: Python's, numpy's or torch's."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from dml_fast.errors import UserError, brief, check_choice, first_line


def number(value: Any, name: str, remedy: str = "pass a number") -> float:
    """Return a number of Python or numpy, or a 0-d tensor on the CPU, as a float.

    Raises:
        UserError: if it is none of these, or a tensor that requires a gradient.
    """
    if type(value) is float:
        return value
    if isinstance(value, bool):
        fail(f"{name} is {value}", remedy)
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        try:
            return float(value)
        except OverflowError:
            fail(f"{name} is too large", remedy)
    if isinstance(value, Tensor):
        constant(value, name)
        if value.device.type != "cpu":
            fail(f"{name} is a tensor on {value.device}", remedy)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a 0-d array or tensor
        value = value.item()
    if not isinstance(value, numbers.Real):
        fail(f"{name} is {brief(value)}", remedy)
    return float(value)


def integer(value: Any, name: str) -> int:
    """Return an integer of Python, numpy or torch that int64 can hold.

    Raises:
        UserError: if it is no such integer.
    """
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        whole = operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        fail(f"{name} is {brief(value)}", "pass an integer")
    if not -(2**63) <= whole < 2**63:
        fail(f"{name} does not fit in 64 bits", "pass a smaller integer")
    return whole


def tensor(value: Any, name: str, device: torch.device) -> Tensor:
    """Return a tensor as it is, and numbers in a list or an array as a tensor on the device.

    Raises:
        UserError: if it is neither, or a tensor that is not dense.
    """
    if isinstance(value, Tensor):
        return dense(value, name)
    try:
        return torch.tensor(value, device=device)
    except Exception as error:  # of a dozen types, by what stands in a list
        why = first_line(error)[:100]
        fail(f"{name} is {brief(value)} ({why})", "pass a tensor, or numbers in an array or list")


def dense(value: Tensor, name: str) -> Tensor:
    """Return the tensor; raise a `UserError` if it is sparse or nested."""
    if value.is_nested:
        fail(f"{name} is a nested tensor", "pass rows of one length: .to_padded_tensor(...)")
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        fail(f"{name} has the layout {layout}", "pass a dense tensor: .to_dense()")
    return value


def constant(value: Tensor, name: str) -> None:
    """Raise a `UserError` if the tensor requires a gradient."""
    if value.requires_grad and torch.is_grad_enabled():
        fail(f"{name} requires a gradient, and the loss has none for it", "pass its .detach()")


def shaped(
    value: Any,
    shape: Sequence[int],
    name: str,
    meaning: str,
    first: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return a tensor of real numbers of that shape and dtype, on the device of the logits.

    Raises:
        UserError: if it is none, requires a gradient, or has another shape or device.
    """
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


def may_look(device: torch.device) -> bool:
    """Return whether reading a value neither waits for a device nor breaks a graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise a `UserError` unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        check_choice(name, value, choices)  # which torch.compile cannot trace


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def fail(what: str, remedy: str) -> NoReturn:
    """Raise a `UserError` that says what is wrong and what to do."""
    raise UserError(f"{what}: {remedy}")


def finite(value: float) -> bool:
    """Return whether a number is neither infinite nor NaN; torch.compile can trace this."""
    return -math.inf < value < math.inf
