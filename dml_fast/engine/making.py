"""Students from networks and optimizers that are a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student
from dml_fast.errors import UserError, brief, check_choice

Optimizers: TypeAlias = (
    Callable[[nn.Module], torch.optim.Optimizer] | Iterable[torch.optim.Optimizer]
)


def students_of(
    given: Sequence[Any], optimizers: Optimizers | None, precision: str
) -> list[Student]:
    """Return students as they are, or those made of networks.

    Args:
        given: all of them students, or all of them networks on their devices.
        optimizers: of networks: one for each, or a function that makes one for a network.
        precision: of networks: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        UserError: one is neither, optimizers are missing or too few, or the precision is unknown or
            not for this device.
    """
    check_choice("precision", precision, ("fp32", "bf16", "fp16"))
    for k, one in enumerate(given):
        if not isinstance(one, Student if isinstance(given[0], Student) else nn.Module):
            raise UserError(
                f"student {k} of a cohort is {brief(one)}: give networks and optimizers=..., or "
                "give Student(model, optimizer, precision) for each"
            )
    if not given or isinstance(given[0], Student):
        if optimizers is not None or precision != "fp32":
            raise UserError(
                "optimizers and precision are for a cohort of networks, and these are students, "
                "which have their own: leave them out"
            )
        return list(given)
    if optimizers is None:
        raise UserError(
            "a cohort of networks has no optimizers: give optimizers=[...], one for each, or a "
            "function such as lambda net: torch.optim.AdamW(net.parameters(), fused=True)"
        )
    for k, net in enumerate(given):
        if next(net.parameters(), None) is None:
            raise UserError(f"network {k} of a cohort has no parameters: give one that can learn")
    made = [optimizers(net) for net in given] if callable(optimizers) else list(optimizers)
    if len(made) != len(given):
        raise UserError(
            f"a cohort of {len(given)} networks has {len(made)} optimizers: give one for each"
        )
    return [_student(*pair, precision) for pair in zip(given, made, strict=True)]


def _student(net: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> Student:
    device = next(net.parameters()).device
    how = Precision.choose(precision != "fp32", precision.replace("fp32", "auto"), device)
    return Student(net, optimizer, how)
