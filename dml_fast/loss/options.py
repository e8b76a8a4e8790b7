"""The options that the loss's modules have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dml_fast.loss import backends
from dml_fast.loss.checks import check_options


class LossOptions(nn.Module):
    """Options as attributes, which may be changed between calls; ``class_weight`` is a buffer."""

    class_weight: Tensor | None

    def __init__(
        self,
        kl_weight: float | Tensor = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        peer_reduction: str = "mean",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        """Check and keep the options."""
        super().__init__()
        check_options(kl_weight, temperature, label_smoothing, peer_reduction, reduction)
        backends.check(backend)
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.peer_reduction = peer_reduction
        self.reduction = reduction
        self.backend = backend

    def options(self) -> dict[str, Any]:
        """Them all, as arguments of a functional form."""
        return {
            "kl_weight": self.kl_weight,
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "class_weight": self.class_weight,
            "ignore_index": self.ignore_index,
            "peer_reduction": self.peer_reduction,
            "reduction": self.reduction,
            "backend": self.backend,
        }

    def extra_repr(self) -> str:
        """The options, for print(); not the class weights."""
        shown = self.options()
        del shown["class_weight"]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
