"""A network's weights in autocast's type: cast in one launch, and their gradients back in one.

Autocast casts each weight where a layer reads it, and its gradient where autograd hands it on: two
launches for each weight. Here all are cast before the pass, and each layer takes its own from
there. It is autocast's cast, at another time: the numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
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
    So are frozen ones, and any that a pass replaces or writes to before the layer is called, as
    networks do that keep an average of themselves. Of a weight that is trained, a pass may do
    anything but write to its ``.data`` in place, which nobody can notice.

    Args:
        model: the network; nothing of it changes between passes.
        precision: of its passes.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self._dtype = precision.dtype
        self._layers: list[_Layer] = []
        copied = any(isinstance(module, nn.DataParallel) for module in model.modules())
        if self._dtype is not None and not copied:
            self._layers = [
                _Layer(module, precision)
                for module in model.modules()
                if type(module) in LAYERS and all(owners[id(p)] == 1 for p in module.parameters())
            ]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, which holds one pass with a graph, each layer takes its weights from here."""
        weights = {one: own for one in self._layers if (own := one.weights())}
        if not weights:
            yield
            return
        cast = iter(_Cast.apply(self._dtype, *(p for own in weights.values() for p in own)))  # type: ignore[no-untyped-call]
        for one, own in weights.items():
            one.give([next(cast) for _ in own])
        try:
            yield
        finally:
            for one in weights:
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
    """A layer that may be given other weights for one call; its ``forward`` then is this object."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        self._module = module
        self._precision = precision
        self._given: list[Tensor] | None = None
        self._of: list[tuple[int, int, int]] = []  # what the given weights were cast from

    def weights(self) -> list[nn.Parameter]:
        """Return the weight, and the bias if there is one; nothing if autocast must see to them."""
        module, held = self._module, self._module._parameters
        weight, own = held.get("weight"), self._held()
        as_made = type(module) in LAYERS and "forward" not in module.__dict__ and len(held) == 2
        if not as_made or weight is None or not weight.requires_grad:
            return []
        fits = all(type(p) is nn.Parameter and p.dtype is torch.float32 for p in own)
        return own if fits else []

    def _held(self) -> list[nn.Parameter]:
        return [p for p in self._module._parameters.values() if p is not None]

    def give(self, weights: list[Tensor]) -> None:
        """Let the layer's next call, if autocast would cast there, have these weights."""
        self._given, self._of = weights, self._state()
        self._module.__dict__["forward"] = self

    def take_back(self) -> None:
        """Leave the layer as it was."""
        self._given = None
        self._module.__dict__.pop("forward", None)

    def __call__(self, input: Tensor) -> Tensor:
        """Return what the layer's own ``forward`` does."""
        given, module = self._given, self._module
        self._given = None
        if given is None or not self._casts() or self._of != self._state():
            return type(module).forward(module, input)  # type: ignore[no-any-return]
        weight, bias = given[0], given[1] if len(given) == 2 else None
        if isinstance(module, nn.Linear):
            return F.linear(input, weight, bias)
        return module._conv_forward(input, weight, bias)  # type: ignore[no-any-return, operator]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the own ``forward`` of the layer's copy, for a pass that copies layers."""
        copied = memo.get(id(self._module), self._module)
        return MethodType(type(self._module).forward, copied)

    def _state(self) -> list[tuple[int, int, int]]:
        """Return what changes where weights are replaced, given other memory, or written to."""
        return [(id(p), p.data_ptr(), p._version) for p in self._held()]

    def _casts(self) -> bool:
        """Return whether autocast is on here, with the type of the cast weights."""
        device = self._precision.device.type
        return (
            torch.is_autocast_enabled(device)
            and torch.get_autocast_dtype(device) is self._precision.dtype
        )
