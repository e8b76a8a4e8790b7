"""The statistics against plain torch, pair by pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import mutual_loss, mutual_loss_and_grad, peer_divergence

pytestmark = pytest.mark.usefixtures("way")


def cohort(classes: int = 9) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(classes)
    logits = list(2 * torch.randn((4, 8, classes), generator=g))
    return logits, torch.randint(classes, (8,), generator=g)


def entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_pairwise_divergences_and_disagreement(temperature: float) -> None:
    logits, target = cohort()
    stats = mutual_loss_and_grad(logits, target, temperature=temperature, return_stats=True)[2]
    log_p = (torch.stack(logits) / temperature).log_softmax(-1)
    p = log_p.exp()
    for i in range(4):
        for j in range(4):
            pair = F.kl_div(log_p[j], p[i], reduction="batchmean")
            torch.testing.assert_close(stats.pairwise_kl[i, j], pair, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.entropy, entropy(p).mean(-1))
    rows = entropy(p.mean(0)) - entropy(p).mean(0)
    torch.testing.assert_close(stats.row_mutual_information, rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.mutual_information, rows.mean())
    incoming = stats.pairwise_kl.sum(0) / 3  # what teaches student j
    torch.testing.assert_close(stats.kl, temperature**2 * incoming)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_its_parts(reduction: str) -> None:
    logits, target = cohort()
    target = target.index_fill(0, torch.tensor([1, 2]), -100)
    options = {"kl_weight": 0.7, "temperature": 2.0, "row_weight": torch.rand(8)}
    mean = mutual_loss(logits, target, **options)
    stats = mutual_loss_and_grad(logits, target, reduction=reduction, **options)[2]
    torch.testing.assert_close(mean, stats.ce + 0.7 * stats.kl)  # whatever the reduction


def test_correct_answers_are_counted_over_labelled_rows() -> None:
    logits, target = cohort()
    answers = torch.stack(logits).argmax(-1)
    target[:4] = answers[0, :4]
    stats = mutual_loss_and_grad(logits, target)[2]
    assert stats.correct.tolist() == (answers == target).sum(1).tolist()
    assert stats.correct[0] >= 4
    target[:2] = -100
    stats = mutual_loss_and_grad(logits, target)[2]
    assert stats.correct.tolist() == (answers == target).sum(1).tolist()
    soft = F.one_hot(target.clamp(min=0), 9) * 0.8 + 0.2 / 9
    stats = mutual_loss_and_grad(logits, soft)[2]
    assert stats.correct.tolist() == (answers == target.clamp(min=0)).sum(1).tolist()


def test_ties_go_to_the_first_class() -> None:
    """Or a head that starts at zero would seem to know everything."""
    logits = [torch.zeros(10, 10), torch.ones(10, 10)]
    assert mutual_loss_and_grad(logits, torch.arange(10))[2].correct.tolist() == [1, 1]


def test_only_the_cheap_ones_come_unasked() -> None:
    logits, target = cohort()
    losses, _, stats = mutual_loss_and_grad(logits, target)
    assert stats.pairwise_kl is stats.entropy is stats.mutual_information is None
    assert stats.finite.all()
    assert isinstance(mutual_loss(logits, target), Tensor)
    asked, full = mutual_loss(logits, target, return_stats=True)
    assert torch.equal(asked, losses)
    for name in ("ce", "kl", "correct", "finite"):
        assert torch.equal(getattr(full, name), getattr(stats, name))
    assert all(value is not None and not value.requires_grad for value in full)


def test_agreement_has_no_information_and_certain_disagreement_log_k() -> None:
    same = [torch.randn(3, 4)] * 3
    target = torch.zeros(3, dtype=torch.int64)
    stats = mutual_loss(same, target, return_stats=True)[1]
    torch.testing.assert_close(stats.mutual_information, torch.tensor(0.0), rtol=0, atol=1e-6)
    sure = list(100.0 * torch.eye(4).unsqueeze(1).expand(4, 3, 4))
    stats = mutual_loss(sure, target, return_stats=True)[1]
    torch.testing.assert_close(stats.mutual_information, torch.tensor(4.0).log())
    torch.testing.assert_close(peer_divergence(sure), torch.full((4,), 3.0).log())


def test_peer_divergence_by_definition() -> None:
    logits, _ = cohort()
    p = (torch.stack(logits) / 2).softmax(-1)
    expected = []
    for k in range(4):
        peers = p[[j for j in range(4) if j != k]]
        expected.append((entropy(peers.mean(0)) - entropy(peers).mean(0)).mean())
    torch.testing.assert_close(peer_divergence(logits, 2.0), torch.stack(expected))
    torch.testing.assert_close(peer_divergence(torch.stack(logits), 2.0), torch.stack(expected))
    assert peer_divergence([z.double() for z in logits]).dtype == torch.float64
    folded = [z.reshape(4, 2, 9) for z in logits]
    torch.testing.assert_close(peer_divergence(folded, 2.0), torch.stack(expected))
    pair = peer_divergence(logits[:2])  # a single peer does not differ from itself
    torch.testing.assert_close(pair, torch.zeros(2), rtol=0, atol=1e-6)


def test_peer_divergence_needs_peers() -> None:
    with pytest.raises(UserError, match="one student has no peers"):
        peer_divergence([torch.randn(3, 4)])
    with pytest.raises(UserError, match="temperature is 0"):
        peer_divergence([torch.randn(3, 4)] * 2, 0)
