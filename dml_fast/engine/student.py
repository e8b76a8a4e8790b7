"""One student: a model, its optimizer and its loss scaler, and one guarded update of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dml_fast.engine.depthwise import keep_in_full_precision
from dml_fast.engine.precision import Precision
from dml_fast.errors import UserError


class Student:
    """A network that learns, with all that is its own.

    Args:
        model: on its device; ``forward(inputs (N, ...)) -> logits (N, C)``. An `EmbeddingNet` also
            gives its features. For bf16 on a CPU its depthwise convolutions are put into fp32.
        optimizer: over the model's parameters, built with ``fused=True``.
        precision: how to run the forward pass.
        arch: the architecture's name, for tables and files.

    Raises:
        UserError: the optimizer is not fused.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        arch: str = "",
    ) -> None:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError(
                f"the optimizer {type(optimizer).__name__} of a student is not fused, so it cannot "
                "skip a bad step on the device: build it with fused=True"
            )
        self.depthwise = keep_in_full_precision(model, precision)  # how many
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.arch = arch or type(model).__name__
        self.scaler = precision.scaler()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms = [
            m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats
        ]
        self.generation = 0  # how often other tensors took the place of the optimizer's
        self.features: Tensor | None = None  # (N, D) of the last forward pass, if asked for
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []
        self._logits: Any = model  # or the same, compiled
        self._features_and_logits: Any = getattr(model, "features_and_logits", None)
        self._one = torch.ones((), device=self.parameters[0].device)

    def forward(self, inputs: Tensor, *, with_features: bool = False) -> Tensor:
        """Logits (N, C) of inputs (N, ...), in the precision's type, with a graph to go back.

        Args:
            inputs: (N, ...).
            with_features: keep an `EmbeddingNet`'s features of this pass in ``features``.
        """
        if self.norms and not self._shares_storage():
            self._statistics = _share_storage(self.norms)
        self._before = [tensor.clone() for tensor in self._statistics]
        logits: Tensor
        with self.precision.autocast():
            if with_features:
                self.features, logits = self._features_and_logits(inputs)
            else:
                logits = self._logits(inputs)
        return logits

    def compile(self) -> None:
        """Compile the passes of training; parameters are inputs, so equal students share the code.

        Evaluation and ``predict`` stay as they are.
        """
        self._logits = torch.compile(self._logits, dynamic=False)
        if self._features_and_logits is not None:
            self._features_and_logits = torch.compile(self._features_and_logits, dynamic=False)

    @property
    def grad_scale(self) -> Tensor:
        """What the gradient of the logits is to be multiplied by: 0-d, 1 unless fp16."""
        scale: Tensor = self.scaler.scale(self._one)
        return scale

    def update(
        self, logits: Tensor, grad: Tensor, extra: Tensor | None = None, extra_weight: float = 1.0
    ) -> Tensor:
        """Go back from the logits and step, unless a gradient is not finite.

        A skipped step leaves no trace in weights, momentum or running statistics. Nothing here
        waits for the device.

        Args:
            logits: (N, C), what ``forward`` gave.
            grad: (N, C), the gradient of the loss with respect to them, times ``grad_scale``.
            extra: 0-d, another loss of the same pass, made by the same thread.
            extra_weight: its weight.

        Returns:
            0-d bool tensor: whether the step was skipped.
        """
        ends, grads = [logits], [grad]
        if extra is not None:
            ends, grads = [logits, extra], [grad, extra_weight * self.grad_scale]
        torch.autograd.backward(ends, grads)
        self.features = None
        skipped = ~torch.isfinite(self._collect_gradients())
        if not self.scaler.is_enabled():  # the scaler sets these two itself
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for now, before in zip(self._statistics, self._before, strict=True):
            now.copy_(torch.where(skipped, before, now))
        return skipped

    def _collect_gradients(self) -> Tensor:
        """The norm of all gradients, 0-d."""
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )

    @torch.no_grad()
    def predict(self, inputs: Tensor, *, training: bool = False) -> Tensor:
        """Logits (N, C) without a graph; running statistics and the mode stay as they are.

        Args:
            inputs: (N, ...).
            training: compute as in training (batch statistics, dropout), else as in evaluation.
        """
        was_training = self.model.training
        self.model.train(training)
        with _frozen(self.norms, training), self.precision.autocast():
            logits: Tensor = self.model(inputs)
        self.model.train(was_training)
        return logits

    def set_lr(self, lr: float) -> None:
        """Fill the learning rate in place."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs: ``arch``, ``model``, ``optimizer`` and ``scaler``.

        Of the optimizer its state by parameter; its options are the run's.
        """
        return {
            "arch": self.arch,
            "model": self.model.state_dict(),
            "optimizer": {"state": self.optimizer.state_dict()["state"]},
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        self.model.load_state_dict(state["model"])
        moments = {
            index: {
                name: _laid_out(value, self.parameters[index]) for name, value in values.items()
            }
            for index, values in state["optimizer"]["state"].items()
        }
        options = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": options})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.generation += 1

    def forget_step(self) -> None:
        """Drop what a step that was broken off has left behind."""
        self.features = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()

    def _shares_storage(self) -> bool:
        """False at first, and again after ``model.to(...)``, which makes new tensors."""
        first = self.norms[0].running_mean
        assert first is not None
        return bool(self._statistics) and first.data_ptr() == self._statistics[0].data_ptr()


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """An optimizer's tensor with its parameter's strides: fused updates go by memory."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


@contextmanager
def _frozen(norms: list[_BatchNorm], training: bool) -> Iterator[None]:
    """While training, statistics that are not tracked are of the batch alone and not kept."""
    for norm in norms:
        norm.track_running_stats = not training
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _share_storage(norms: list[_BatchNorm]) -> list[Tensor]:
    """Move statistics into one tensor and counters into another: a copy keeps or restores all."""
    shared = []
    for names in (("running_mean", "running_var"), ("num_batches_tracked",)):
        owners = [(norm, name) for norm in norms for name in names]
        flat = torch.cat([getattr(norm, name).flatten() for norm, name in owners])
        start = 0
        for norm, name in owners:
            old = getattr(norm, name)
            setattr(norm, name, flat[start : start + old.numel()].view_as(old))
            start += old.numel()
        shared.append(flat)
    return shared
