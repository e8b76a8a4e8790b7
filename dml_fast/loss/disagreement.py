"""How much the students disagree: statistics, never part of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss.checks import Logits, check_temperature, distributions
from dml_fast.loss.problem import MutualStats


def add_disagreement(stats: MutualStats, log_p: Tensor, batch_shape: torch.Size) -> MutualStats:
    """Return `stats` with the fields that compare the students; ``log_p`` is (K, N, C)."""
    p = log_p.exp()
    entropy = -_xlogx(p, log_p).sum(-1)  # (K, N), NaN where unusable
    usable = ~entropy.isnan()
    share = usable.to(p.dtype) / usable.sum(0)  # (K, N), NaN where no student is usable
    mean = p.masked_fill_(~usable.unsqueeze(-1), 0.0).mul(share.unsqueeze(-1)).sum(0)
    apart = _terms(p, log_p, mean, _log(mean)).sum(-1)  # KL(p_k || mean)
    information = (apart.masked_fill_(~usable, 0.0) * share).sum(0).clamp_(min=0.0)
    return stats._replace(
        pairwise_kl=pairwise_kl(log_p),
        entropy=entropy.mean(-1),
        mutual_information=information.mean(),
        row_mutual_information=information.reshape(batch_shape),
    )


def pairwise_kl(log_p: Tensor) -> Tensor:
    """Return (K, K) from log-probabilities (K, N, C): [i, j] is the row mean of KL(p_i || p_j)."""
    p = log_p.exp()
    rows = [_terms(p_i, i, p, log_p).sum(-1).mean(-1) for p_i, i in zip(p, log_p, strict=True)]
    return torch.stack(rows).clamp_(min=0.0)


def _terms(p: Tensor, log_p: Tensor, r: Tensor, log_r: Tensor) -> Tensor:
    """Return terms, never negative, whose sum over the classes is KL(p || r).

    They are p (d + exp(-d) - 1) with d = log p - log r (the Bregman form). In fp32, for
    distributions that differ by 1e-4, their sum is right to four digits, while that of p d is
    right to less than two.
    """
    d = log_p - log_r
    near = p * (d + torch.expm1(-d))
    far = (p * d).masked_fill_(p == 0, 0.0) - p + r  # exp(-d) might overflow
    return torch.where(d.abs() < 0.5, near, far)


def peer_divergence(logits: Logits, temperature: float = 1.0) -> Tensor:
    """Return the generalised Jensen-Shannon divergence of each student's peers.

    It is H(mean of the peers' p_l) - mean of H(p_l) with p = softmax(z / temperature), averaged
    over rows: the mean KL from p_l to the peers' mean. By this much, before the factor T², the
    divergence of DML (the mean KL from each peer) is larger than that of DML_e (the KL from the
    peers' mean; Zhang et al., CVPR 2018, on larger cohorts). It does not depend on the student's
    own logits, so both have the same gradient as long as peers are constants. Unusable rows of a
    peer are left out, as in the loss.

    Args:
        logits: K >= 2 tensors (*batch, C), or one (K, *batch, C).
        temperature: T > 0.

    Returns:
        (K,) nats in fp32 (fp64 for fp64 logits), never negative.

    Raises:
        UserError: if there are fewer than two students, or an argument has a wrong shape, device,
            dtype or value.
    """
    students = distributions(logits, "logits")
    temperature = check_temperature(temperature)
    if len(students) < 2:
        raise UserError("one student has no peers: pass the logits of at least two")
    dtype = torch.float64 if students[0].dtype == torch.float64 else torch.float32
    with torch.no_grad():
        # The first softmax subtracts the maximum: z / T alone would round a large common offset.
        log_p = torch.stack([torch.log_softmax(z, -1, dtype=dtype) for z in students])
        log_p = torch.log_softmax(
            log_p.reshape(len(students), -1, log_p.shape[-1]) / temperature, -1
        )
        p = log_p.exp()
        usable = ~p[..., 0].isnan()  # an unusable row is NaN in all classes
        p.masked_fill_(~usable.unsqueeze(-1), 0.0)
        rows = []
        for k in range(len(p)):
            count = _sum_without(usable, k).clamp(min=1)
            mean = _sum_without(p, k) / count.unsqueeze(-1)
            apart = _terms(p, log_p, mean, _log(mean)).sum(-1).masked_fill_(~usable, 0.0)
            rows.append(_sum_without(apart, k) / count)
        return torch.stack(rows).clamp_(min=0.0).mean(-1)


def _sum_without(x: Tensor, k: int) -> Tensor:
    """Return the sum over the first dimension without entry k, by slices: nothing to copy."""
    return x[:k].sum(0) + x[k + 1 :].sum(0)


def _log(p: Tensor) -> Tensor:
    """Return log p; finite, as a mean may be 0 where one of its terms is not."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_()


def _xlogx(p: Tensor, log_p: Tensor) -> Tensor:
    return (p * log_p).masked_fill_(p == 0, 0.0)
