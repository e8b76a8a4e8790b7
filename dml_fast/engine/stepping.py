"""One step of a student's optimizer, left out if a gradient is not finite."""

from __future__ import annotations

import inspect
import logging

import torch
from torch import Tensor, nn

from dml_fast.engine.optim import zero_momentum
from dml_fast.errors import UserError

logger = logging.getLogger(__name__)


class Stepper:
    """Steps an optimizer, or skips a bad step.

    A fused optimizer of torch skips on the device. Of any other nothing is known but its ``step``,
    so the host reads whether to call it. A log line says so on a GPU, where that is a wait.

    Args:
        optimizer: of `torch.optim` or derived from its base class.
        arch: the student's name, for messages.

    Raises:
        UserError: the optimizer cannot be stepped without a closure, or wants sparse gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, arch: str) -> None:
        self.fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._optimizer = optimizer
        kind = type(optimizer)
        if _needs_closure(kind):
            raise UserError(
                f"the optimizer {kind.__name__} of a student ({arch}) computes the loss again in "
                "its step, and a cohort's step computes it once: take another, such as SGD or AdamW"
            )
        if kind is torch.optim.SparseAdam:
            raise UserError(
                f"the optimizer {kind.__name__} of a student ({arch}) takes sparse gradients only, "
                "which a student's are not: take Adam"
            )
        if self.fused and kind is torch.optim.SGD and not optimizer.state:
            zero_momentum(optimizer)
        elif not self.fused and _device(optimizer).type == "cuda":
            logger.info(
                "the optimizer %s of a student (%s) is not fused: each of its steps waits for the "
                "GPU, to be skipped if a gradient is not finite%s",
                kind.__name__,
                arch,
                "; give fused=True" if "fused" in inspect.signature(kind).parameters else "",
            )

    def step(self, scaler: torch.amp.GradScaler, skip: Tensor) -> None:
        """Update the parameters from their gradients, unless ``skip``, a 0-d bool tensor."""
        if self.fused:
            if not scaler.is_enabled():  # the scaler sets these two itself
                self._optimizer.grad_scale = None  # type: ignore[attr-defined]
                self._optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            scaler.step(self._optimizer)
        elif scaler.is_enabled():  # which reads whether to skip too
            scaler.step(self._optimizer)
        elif not bool(skip):
            self._optimizer.step()
        scaler.update()


def mean_and_clip(
    parameters: list[nn.Parameter], norm: Tensor, count: int, limit: float | None, scale: Tensor
) -> None:
    """Divide gradients, in place, by a number of passes, and clip their norm.

    Args:
        parameters: with gradients that are sums over the passes.
        norm: 0-d, of all these gradients together.
        count: of passes.
        limit: the largest norm, as in `torch.nn.utils.clip_grad_norm_`; None: any.
        scale: 0-d, by which the gradients are scaled.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if count > 1 and grads:
        torch._foreach_mul_(grads, 1 / count)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm / (scale * count))


def _needs_closure(kind: type[torch.optim.Optimizer]) -> bool:
    given = inspect.signature(kind.step).parameters.get("closure")
    return given is not None and given.default is inspect.Parameter.empty


def _device(optimizer: torch.optim.Optimizer) -> torch.device:
    device: torch.device = optimizer.param_groups[0]["params"][0].device
    return device
