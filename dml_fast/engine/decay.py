"""Which parameters have weight decay: two groups of an optimizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

T = TypeVar("T")

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, getattr(nn, "RMSNorm", nn.LayerNorm))  # torch 2.4


def without_decay(model: nn.Module, kinds: Collection[str]) -> list[bool]:
    """Return, for each parameter that requires a gradient, whether it is of one of these kinds.

    Args:
        model: whose parameters they are, in its order.
        kinds: of ``norm`` (parameters of layers of torch that normalise, and vectors of other
            layers that have ``norm`` in their type's name) and ``bias`` (those whose name ends so).
    """
    norms = {
        id(p)
        for layer in model.modules()
        for p in layer.parameters(recurse=False)
        if isinstance(layer, _NORMS) or ("norm" in type(layer).__name__.lower() and p.dim() <= 1)
    }
    return [
        ("norm" in kinds and id(p) in norms) or ("bias" in kinds and name.endswith("bias"))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def in_groups(items: Sequence[T], spared: Sequence[bool]) -> tuple[list[T], list[T]]:
    """Return those with weight decay, and those without: the order of an optimizer's parameters.

    Args:
        items: one for each parameter.
        spared: of `without_decay`; empty if all have weight decay.
    """
    if not spared:
        return list(items), []
    pairs = list(zip(items, spared, strict=True))
    return [one for one, free in pairs if not free], [one for one, free in pairs if free]
