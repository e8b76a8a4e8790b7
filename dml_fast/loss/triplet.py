"""The batch-hard triplet loss (Hermans, Beyer, Leibe, arXiv 1703.07737, equation 5)."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12  # below the root, whose slope at 0 is infinite


def triplet_loss(features: Tensor, target: Tensor, margin: float) -> Tensor:
    """Mean over images of relu(margin + farthest of its identity - nearest of another).

    Args:
        features: (N, D) of any floating type; computed in float32 at least.
        target: (N,) identities. An image without another of its identity is at distance 0 from
            its farthest; one without an image of another identity counts 0.
        margin: in units of the Euclidean distance.

    Returns:
        0-d, float32 at least.
    """
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        norms = x.square().sum(1)
        squares = norms[:, None] + norms[None] - 2 * (x @ x.T)
    distances = squares.clamp_min(_TINY).sqrt()
    same = target[:, None] == target[None]
    farthest = distances.masked_fill(~same, 0.0).amax(1)
    nearest = distances.masked_fill(same, torch.inf).amin(1)
    return torch.relu(margin + farthest - nearest).mean()
