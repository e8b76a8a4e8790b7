"""Optimizers, learning-rate schedules and the ramp of the mutual term, as functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dml_fast.engine.decay import in_groups
from dml_fast.errors import UserError, check_choice, check_number


def make_optimizer(
    parameters: Sequence[nn.Parameter],
    *,
    algorithm: str,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    spared: Sequence[bool] = (),
) -> torch.optim.Optimizer:
    """Make SGD with Nesterov momentum, or AdamW, in torch's fused form.

    The fused form takes ``found_inf`` on the device, by which a bad step is skipped without
    asking the host. The learning rate is a 0-d tensor that the schedule fills in place.

    Args:
        parameters: at least one, already on their device.
        algorithm: ``sgd`` or ``adamw``.
        lr: the learning rate.
        momentum: of SGD.
        weight_decay: on all parameters but those that are spared.
        spared: for each parameter whether it has no weight decay; these are a group of their own.

    Raises:
        UserError: there is no parameter, or an option is out of range.
    """
    check_choice("algorithm", algorithm, ("sgd", "adamw"))
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        check_number(name, value, "a finite number, 0 or more", lambda x: 0 <= x < math.inf)
    if not parameters:
        raise UserError("an optimizer got no parameters: give those of a model that can be trained")
    rate = torch.tensor(lr, device=parameters[0].device)
    decayed, free = in_groups(parameters, spared)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if algorithm == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=rate,
            weight_decay=weight_decay,
            fused=True,
            capturable=rate.is_cuda,  # in a CUDA graph
        )
    optimizer = torch.optim.SGD(
        groups,
        lr=rate,
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=weight_decay,
        fused=True,
    )
    zero_momentum(optimizer)
    return optimizer


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Start momentum buffers at zero, which gives the usual first step bit for bit.

    Otherwise, if the first step is skipped for an overflow, torch 2.13's fused SGD leaves the
    buffer uninitialised, and the next step adds that memory to the weights.
    """
    for group in optimizer.param_groups:
        if group.get("momentum") and not group.get("dampening"):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def lr_factor(schedule: str, epoch: float, epochs: int, warmup: float) -> float:
    """Return the learning rate at a point of training, divided by its peak.

    Args:
        schedule: ``cosine``, ``paper`` (Zhang et al. 2018: divided by 10 every 60 of 200 epochs)
            or ``constant``.
        epoch: epochs done so far, with fractions.
        epochs: number of epochs in all.
        warmup: epochs of linear growth at the start.

    Raises:
        UserError: there is no such schedule.
    """
    check_choice("schedule", schedule, ("cosine", "paper", "constant"))
    if epoch < warmup:
        return epoch / warmup
    if schedule == "cosine":
        return 0.5 * (
            1 + math.cos(math.pi * min(1.0, (epoch - warmup) / max(1e-9, epochs - warmup)))
        )
    if schedule == "paper":
        return 10.0 ** -sum(epoch >= share * epochs for share in (0.3, 0.6, 0.9))
    return 1.0


def ramp(epoch: float, length: float) -> float:
    """Return the factor of the mutual term: from 0 to 1, linear over ``length`` epochs."""
    return min(1.0, epoch / length) if length > 0 else 1.0
