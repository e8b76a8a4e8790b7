"""The paper's equations as printed, in plain differentiable torch: the oracle of the tests.

Simple and slow on purpose: O(K²), pair by pair. Computes in the dtype of the logits and has
derivatives of every order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mutual_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    kl_weight: float | Tensor = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    peer_reduction: str = "mean",
    reduction: str = "mean",
    peer_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    teacher_logits: Sequence[Tensor] = (),
    ce_weight: float = 1.0,
    distribution: str = "categorical",
    divergence: str = "forward",
    beta: float = 0.5,
    kl_rows: str = "all",
) -> Tensor:
    """Return (K,) losses, or (K, *batch) with ``reduction="none"``.

    Zhang et al., CVPR 2018, with the options of `dml_fast.loss.mutual_loss`. Arguments are not
    checked.
    """
    peers = [z.detach() for z in (*logits, *teacher_logits)]  # constants
    usable = [z.amax(-1).isfinite() for z in peers]  # neither NaN nor +inf, not all -inf
    kl_of = categorical_kl_rows
    if distribution == "bernoulli":
        usable, kl_of = [z.isfinite().all(-1) for z in peers], bernoulli_kl_rows
        target = target.to(logits[0]) * (1 - label_smoothing) + label_smoothing / 2
    # Unusable rows are left out below, but 0 times the derivative of a NaN would still be NaN.
    peers = [torch.where(u.unsqueeze(-1), z, 0.0) for u, z in zip(usable, peers, strict=True)]
    losses = []
    for k, z in enumerate(logits):
        if distribution == "bernoulli":
            ce = F.binary_cross_entropy_with_logits(z, target, reduction="none").mean(-1)
            ce = torch.where(usable[k], ce, math.nan)
        else:
            ce = cross_entropy_rows(z, target, class_weight, ignore_index, label_smoothing)
        kl = torch.zeros_like(ce)
        others = [j for j in range(len(peers)) if j != k]
        mass, mean = torch.zeros_like(kl), torch.zeros_like(z)  # of the peers, for jsd
        for j in others:
            weight = torch.ones_like(kl)
            if peer_weight is not None:
                weight = peer_weight[k, j]
            elif peer_reduction == "mean":
                weight = 1 / torch.stack([usable[i] for i in others]).sum(0).clamp(min=1).to(z)
            weight = torch.where(usable[j], weight, 0.0)
            peer, own = peers[j] / temperature, z / temperature
            mass, mean = mass + weight, mean + weight.unsqueeze(-1) * peer.softmax(-1)
            if divergence == "jsd":
                continue
            if divergence == "symmetric":
                term = (kl_of(peer, own) + kl_of(own, peer)) / 2
            else:
                term = kl_of(peer, own) if divergence == "forward" else kl_of(own, peer)
            kl = kl + torch.where(usable[j], weight * temperature**2 * term, 0.0)
        if divergence == "jsd":
            mean = mean / torch.where(mass > 0, mass, 1.0).unsqueeze(-1)
            kl = mass * temperature**2 * jsd_rows(mean, (z / temperature).softmax(-1), beta)
        if others:
            kl = torch.where(usable[k], kl, math.nan)
        counted = torch.ones_like(kl, dtype=torch.bool)
        if kl_rows == "labelled" and not target.is_floating_point():
            counted = target != ignore_index
            kl = torch.where(counted, kl, 0.0)
        if row_weight is not None:
            ce, kl = ce * row_weight, kl * row_weight
        if reduction != "none":
            ce, kl = ce.sum(), kl.sum()
        if reduction == "mean":
            ce = ce / label_mass(z, target, class_weight, ignore_index)
            kl = kl / counted.sum().clamp(min=1)
        losses.append(ce_weight * ce + kl_weight * kl)
    return torch.stack(losses)


def categorical_kl_rows(z_p: Tensor, z_q: Tensor) -> Tensor:
    """Return KL(softmax(z_p) || softmax(z_q)) of each row, (*batch), with 0 log 0 = 0."""
    log_p, log_q = torch.log_softmax(z_p, -1), torch.log_softmax(z_q, -1)
    return (log_p.exp() * torch.where(log_p.exp() > 0, log_p - log_q, 0.0)).sum(-1)


def jsd_rows(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Return beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, of each row."""
    m = beta * p + (1 - beta) * q

    def apart(x: Tensor) -> Tensor:
        there = (x > 0) & (m > 0)
        logs = torch.where(there, x, 1.0).log() - torch.where(there, m, 1.0).log()
        return (x * logs).sum(-1)

    return beta * apart(p) + (1 - beta) * apart(q)


def bernoulli_kl_rows(z_p: Tensor, z_q: Tensor) -> Tensor:
    """Return the mean over classes of KL(sigmoid(z_p) || sigmoid(z_q)) of each row, (*batch)."""
    yes = torch.sigmoid(z_p) * (F.logsigmoid(z_p) - F.logsigmoid(z_q))
    no = torch.sigmoid(-z_p) * (F.logsigmoid(-z_p) - F.logsigmoid(-z_q))
    return (yes + no).mean(-1)


def cross_entropy_rows(
    z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor:
    """Return torch's cross-entropy of each row, (*batch)."""
    soft = target.is_floating_point()
    rows = F.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        target.reshape(-1, z.shape[-1]) if soft else target.reshape(-1).long(),
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=smoothing,
    )
    return rows.reshape(z.shape[:-1])


def label_mass(z: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return the denominator of torch's mean cross-entropy, or 1 if no row has a label."""
    if target.is_floating_point():
        return z.new_ones(z.shape[:-1]).sum()
    labelled = target != ignore_index
    mass = labelled.to(z.dtype)
    if weight is not None:
        mass = mass * weight[target.long().where(labelled, 0)]
    return mass.sum() if labelled.any() else z.new_ones(())
