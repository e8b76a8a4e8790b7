"""Optimizers, the learning-rate schedules and the ramp of the mutual term, all as functions."""

from __future__ import annotations

import math

import torch
from torch import nn

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError


def make_optimizer(
    model: nn.Module, config: TrainConfig, parameters: list[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, in torch's fused form.

    The fused form takes ``found_inf`` on the device, by which a bad step is skipped without
    asking the host. The learning rate is a 0-d tensor that the schedule fills in place.

    Args:
        model: the student, already on its device.
        config: which optimizer, and its numbers.
        parameters: what is optimised in place of the model's parameters.

    Raises:
        UserError: the model has nothing to train.
    """
    parameters = parameters or [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(
            f"a student ({type(model).__name__}) has no parameter that requires a gradient: "
            "give an --arch that can be trained"
        )
    lr = torch.tensor(config.peak_lr, device=parameters[0].device)
    if config.algorithm == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=lr,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=lr.is_cuda,  # in a CUDA graph
        )
    optimizer = torch.optim.SGD(
        parameters,
        lr=lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
    zero_momentum(optimizer)
    return optimizer


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Start momentum buffers at zero, which is bitwise the usual first step.

    Without it, torch 2.13's fused SGD leaves the buffer uninitialised when its first step is
    skipped for an overflow, and the next step adds that memory to the weights.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def lr_factor(schedule: str, epoch: float, epochs: int, warmup: float) -> float:
    """The learning rate at a point of training, over its peak.

    Args:
        schedule: ``cosine``, ``paper`` (Zhang et al. 2018: divided by 10 every 60 of 200 epochs)
            or ``constant``.
        epoch: epochs done, with fractions.
        epochs: epochs in all.
        warmup: epochs of linear growth at the start.
    """
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
    """Linear growth from 0 to 1 over ``length`` epochs."""
    return min(1.0, epoch / length) if length > 0 else 1.0
