"""Cohorts that end in a linear layer, for the tests of the loss without logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.loss import reference


def cohort(
    students: int = 3, rows: int = 12, classes: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Hidden states (rows, 3 + k), weights (classes, 3 + k), targets; the leaves learn."""
    g = torch.Generator().manual_seed(students + rows + classes)
    widths = range(3, 3 + students)
    hidden = [torch.randn((rows, d), generator=g).to(dtype).requires_grad_() for d in widths]
    weight = [torch.randn((classes, d), generator=g).to(dtype).requires_grad_() for d in widths]
    return hidden, weight, torch.randint(classes, (rows,), generator=g)


def exact(hidden: list[Tensor], weight: list[Tensor], *args: Any, **options: Any) -> Tensor:
    logits = [F.linear(h, w) for h, w in zip(hidden, weight, strict=True)]
    return reference.mutual_loss(logits, *args, **options)
