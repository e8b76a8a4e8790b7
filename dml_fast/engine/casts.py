"""A network's weights in autocast's type: cast in one launch, and their gradients back in one.

Autocast casts each weight where a layer reads it, and its gradient where autograd hands it on: two
launches for each weight. Here all are cast before the pass, and each layer takes its own from
there. It is autocast's cast, at another time: the numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast.engine.precision import Precision

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Whose ``forward`` reads its weights once and gives them to an operator that autocast casts for.

Others, derived ones too, are left to autocast.
"""


class Casts:
    """Casts the weights of a network's convolutions and linear layers together.

    A layer takes its cast weights in its first call of a pass, where autocast would cast them. In
    further calls it has its own again: autocast adds up the gradients of all calls in fp32, and the
    cast weights' would add up in half precision. Weights that several layers have are left to
    autocast for the same reason, and so are those that are not in fp32 or are a tensor subclass.

    Args:
        model: the network; nothing of it changes between passes.
        precision: of its passes.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self._dtype = precision.dtype
        self._layers = [
            _Layer(module, precision)
            for module in model.modules()
            if type(module) in LAYERS and all(owners[id(p)] == 1 for p in module.parameters())
        ]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, which holds one pass with a graph, each layer takes its weights from here."""
        layers = [one for one in self._layers if one.is_plain()] if self._dtype else []
        if not layers:
            yield
            return
        weights = [one.weights() for one in layers]
        cast = iter(_Cast.apply(self._dtype, *(w for pair in weights for w in pair)))  # type: ignore[no-untyped-call]
        for one, pair in zip(layers, weights, strict=True):
            one.give([next(cast) for _ in pair])
        try:
            yield
        finally:
            for one in layers:
                one.take_back()


class _Cast(torch.autograd.Function):
    """Casts fp32 weights to a type, and gradients of that type to fp32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that no layer used has no gradient
        found = _cast(weights, dtype)
        frozen = [new for new, old in zip(found, weights, strict=True) if not old.requires_grad]
        ctx.mark_non_differentiable(*frozen)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled():  # for a second derivative
            back = [grad.float() for grad in found]
        else:
            back = _cast(found, torch.float32)
        ready = iter(back)
        return None, *(None if grad is None else next(ready) for grad in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in another type and with the same strides, as ``to`` does."""
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


class _Layer:
    """A layer that may be given other weights for one call."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self._module = module
        self._own = type(module).forward
        self._precision = precision
        self._given: list[Tensor] | None = None

    def weights(self) -> list[nn.Parameter]:
        """Return the weight, and the bias if there is one."""
        return [p for p in self._module._parameters.values() if p is not None]

    def is_plain(self) -> bool:
        """Whether the layer is still as torch made it: no parametrization, pruning or hand's own.

        Its parameters may be others than before.
        """
        module = self._module
        return (
            type(module) in LAYERS
            and "forward" not in module.__dict__
            and [*module._parameters] == ["weight", "bias"]
            and module._parameters["weight"] is not None
            and all(type(p) is nn.Parameter and p.dtype is torch.float32 for p in self.weights())
        )

    def give(self, weights: list[Tensor]) -> None:
        """Let the layer's next call, if autocast would cast there, have these weights."""
        self._given = weights
        self._module.__dict__["forward"] = self._forward

    def take_back(self) -> None:
        """Leave the layer as it was."""
        self._given = None
        self._module.__dict__.pop("forward", None)

    def _forward(self, input: Tensor) -> Tensor:
        given, module = self._given, self._module
        if given is None or torch.compiler.is_compiling() or not self._casts():
            return self._own(module, input)  # type: ignore[no-any-return]
        self._given = None
        weight, bias = given[0], given[1] if len(given) == 2 else None
        if isinstance(module, nn.Linear):
            return F.linear(input, weight, bias)
        return module._conv_forward(input, weight, bias)  # type: ignore[no-any-return, operator]

    def _casts(self) -> bool:
        """Return whether autocast is on here, with the type of the cast weights."""
        device = self._precision.device.type
        return (
            torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) is self._precision.dtype
        )
