"""How far the students are from each other: statistics, never part of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss.checks import Logits, check_temperature, distributions
from dml_fast.loss.problem import MutualStats


def add_disagreement(stats: MutualStats, log_p: Tensor, batch_shape: torch.Size) -> MutualStats:
    """Fill in the fields of `stats` that compare the students; ``log_p`` is (K, N, C)."""
    p = log_p.exp()
    entropy = -_xlogx(p, log_p).sum(-1)  # (K, N), NaN where unusable
    usable = ~entropy.isnan()
    share = usable.to(p.dtype) / usable.sum(0)  # (K, N), NaN where nobody is usable
    mean = p.masked_fill(~usable.unsqueeze(-1), 0.0).mul_(share.unsqueeze(-1)).sum(0)
    mean_entropy = -_xlogx(mean, mean.log()).sum(-1)
    information = mean_entropy - (entropy.masked_fill(~usable, 0.0) * share).sum(0)
    information.clamp_(min=0.0)
    return stats._replace(
        pairwise_kl=pairwise_kl(log_p),
        entropy=entropy.mean(-1),
        mutual_information=information.mean(),
        row_mutual_information=information.reshape(batch_shape),
    )


def pairwise_kl(log_p: Tensor) -> Tensor:
    """(K, K) from log-probabilities (K, N, C): [i, j] is the mean over rows of KL(p_i || p_j).

    In the Bregman form: with d = log p_i - log p_j it sums p_i (d + exp(-d) - 1), whose terms are
    never negative. For students that differ by 1e-4 it keeps four digits in fp32, where the sum
    of p_i d has hardly two.
    """
    p = log_p.exp()
    rows = []
    for p_i, log_p_i in zip(p, log_p, strict=True):
        d = log_p_i - log_p
        near = p_i * (d + torch.expm1(-d))
        far = (p_i * d).masked_fill_(p_i == 0, 0.0) - p_i + p  # exp(-d) might overflow
        rows.append(torch.where(d.abs() < 0.5, near, far).sum(-1).mean(-1))
    return torch.stack(rows).clamp_(min=0.0)


def peer_divergence(logits: Logits, temperature: float = 1.0) -> Tensor:
    """The generalised Jensen-Shannon divergence of each student's peers, averaged over rows.

    H(mean of the peers' p_l) - mean of H(p_l), with p = softmax(z / temperature). It is what the
    value of DML (the mean KL from each peer) exceeds that of DML_e (the KL from the peers' mean;
    Zhang et al., CVPR 2018, on larger cohorts) by, before the factor T². It does not depend on the
    student's own logits, so with the peers held constant both have the same gradient. A peer's
    row that is not finite is left out, as it is from the loss.

    Args:
        logits: K >= 2 tensors (*batch, C), or one (K, *batch, C).
        temperature: T > 0.

    Returns:
        (K,) in fp32 (fp64 for fp64 logits), never negative.

    Raises:
        UserError: for less than two students, logits that do not fit, or a bad temperature.
    """
    students = distributions(logits, "logits")
    check_temperature(temperature)
    if len(students) < 2:
        raise UserError("one student has no peers: pass the logits of at least two")
    dtype = torch.float64 if students[0].dtype == torch.float64 else torch.float32
    with torch.no_grad():
        # Twice, as the first subtracts the maximum: z / T would round a large common offset.
        log_p = torch.stack([torch.log_softmax(z, -1, dtype=dtype) for z in students])
        log_p = torch.log_softmax(
            log_p.reshape(len(students), -1, log_p.shape[-1]) / temperature, -1
        )
        p = log_p.exp()
        entropy = -_xlogx(p, log_p).sum(-1)
        usable = ~entropy.isnan()
        p.masked_fill_(~usable.unsqueeze(-1), 0.0)
        entropy.masked_fill_(~usable, 0.0)
        rows = []
        for k in range(len(p)):
            count = _sum_without(usable, k).clamp(min=1)
            mean = _sum_without(p, k) / count.unsqueeze(-1)
            rows.append(-_xlogx(mean, mean.log()).sum(-1) - _sum_without(entropy, k) / count)
        return torch.stack(rows).clamp_(min=0.0).mean(-1)


def _sum_without(x: Tensor, k: int) -> Tensor:
    """Sum over the first dimension but for entry k: no list of indices to copy to the device."""
    return x[:k].sum(0) + x[k + 1 :].sum(0)


def _xlogx(p: Tensor, log_p: Tensor) -> Tensor:
    return (p * log_p).masked_fill_(p == 0, 0.0)
