"""A copy of what training steps change in a cohort, restored in place."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_fast import rng
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.student import Student


class Snapshot:
    """Weights, averages, buffers, optimizers, scalers and random generators when it is made.

    A CUDA graph keeps using the tensors that it was captured with, so ``restore`` writes into the
    existing tensors.

    Args:
        cohort: the students.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._rng = rng.state()
        self._saved = [
            {name: t.detach().clone() for name, t in _tensors(student).items()}
            for student in cohort
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything; optimizer state that did not exist yet becomes zero.

        torch makes such state (SGD's momentum, Adam's moments) at its first step, from zeros.
        """
        for student, saved in zip(self._cohort, self._saved, strict=True):
            for name, tensor in _tensors(student).items():
                if name in saved:
                    tensor.copy_(saved[name])
                else:
                    tensor.zero_()
        rng.set_state(self._rng)


def _tensors(student: Student) -> dict[str, Tensor]:
    """Return all tensors by name: a student's first forward pass replaces those of statistics."""
    optimizer, scaler = student.optimizer, student.scaler
    networks = {"model": student.model}
    if student.average is not None:
        networks["average"] = student.average.model
    found: dict[str, Tensor] = {}
    for part, network in networks.items():
        found |= {f"{part}.{k}": t for k, t in network.named_parameters()}
        found |= {f"{part}.{k}": t for k, t in network.named_buffers()}
    for index, parameter in enumerate(student.parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"optimizer.{index}.{key}"] = value
    if scaler.is_enabled():
        _ = student.grad_scale  # the scaler makes its tensors when first asked
        found["scaler.scale"] = scaler._scale  # type: ignore[assignment]
        found["scaler.growth"] = scaler._growth_tracker  # type: ignore[assignment]
    return found
