"""Small networks, whose weights are saved and loaded."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def small(seed: int, classes: int = 3) -> nn.Sequential:
    """Return a network of a few hundred bytes that ends in a classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 2, 3),
            norm=nn.BatchNorm2d(2),
            flat=nn.Flatten(),
            fc=nn.Linear(2 * 6 * 6, classes),
        )
    )
