"""Matrix products that are added to a sum in single precision."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from dml_fast.errors import reason

logger = logging.getLogger(__name__)


def add_product(
    total: Tensor, a: Tensor, b: Tensor, *, terms: float, scale: float, fresh: bool
) -> None:
    """Add a b / scale to the total, or store it.

    Args:
        total: (n, m) fp32, or fp64 for fp64.
        a: (n, r), of that dtype or half precision.
        b: (r, m) likewise.
        terms: about how many large terms may add up to an element of a b.
        scale: by which the product is too large.
        fresh: whether the total holds nothing yet, not even zeros.
    """
    beta = 0 if fresh else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, alpha=1 / scale, out=total)
    elif _adds_in_fp32(total.device):
        _addmm(total, a, b, beta, 1 / scale)
    else:  # a product of half-precision tensors is one too: take the mean, which cannot overflow
        mean = torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=1 / terms)
        if fresh:
            total.copy_(mean).mul_(terms / scale)
        else:
            total.add_(mean, alpha=terms / scale)


@lru_cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Return whether a product of half-precision tensors can be added to an fp32 sum as it is made.

    So the sum is read and written once per product, without a temporary of its size. Torch 2.8 can
    on NVIDIA GPUs of capability 8 or more; a small product shows whether it does.
    """
    if device.type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    part = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        _addmm(total, part, part, 1, 1.0)
    except RuntimeError as error:
        logger.info("products are added to fp32 sums by a pass of their own (%s)", reason(error))
        return False
    return True


def _addmm(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """Make ``total`` beta total + alpha a b."""
    torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, beta=beta, alpha=alpha, out=total)
