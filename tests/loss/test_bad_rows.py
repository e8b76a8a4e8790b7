"""Extreme and broken logits: large, masked, NaN, infinite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.loss import mutual_loss, mutual_loss_and_grad, peer_divergence, reference

pytestmark = pytest.mark.usefixtures("way")

INF, NAN = torch.inf, torch.nan
BROKEN = {
    "nan": lambda z: z.index_fill(-1, torch.tensor([2]), NAN),
    "inf": lambda z: z.index_fill(-1, torch.tensor([2]), INF),
    "all masked": lambda z: torch.full_like(z, -INF),
}


def cohort(students: int = 3, rows: int = 8, classes: int = 6) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(students)
    logits = list(2 * torch.randn((students, rows, classes), generator=g))
    return logits, torch.randint(classes, (rows,), generator=g)


def exact(logits: list[Tensor], target: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    logits = [z.double().requires_grad_() for z in logits]
    losses = reference.mutual_loss(logits, target, **options)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), logits))


def assert_as_exact(logits: list[Tensor], target: Tensor, **options: Any) -> None:
    losses, grads, _ = mutual_loss_and_grad(logits, target, **options)
    expected, expected_grads = exact(logits, target, **options)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    for g, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_common_offset_changes_nothing(offset: float, temperature: float) -> None:
    """Logits that fp32 holds exactly with the offset: the answers must be equal, not close."""
    logits, target = cohort()
    logits = [(z * 64).round() / 64 for z in logits]
    base = mutual_loss_and_grad(logits, target, temperature=temperature)
    moved = mutual_loss_and_grad([z + offset for z in logits], target, temperature=temperature)
    assert torch.equal(base[0], moved[0])
    assert all(torch.equal(a, b) for a, b in zip(base[1], moved[1], strict=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_of_ten_thousand(temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = [1e4 * torch.randn((8, 6), generator=g) for _ in range(3)]
    target = torch.randint(6, (8,), generator=g)
    assert_as_exact(logits, target, temperature=temperature)


def test_confident_disagreement_keeps_its_gradient() -> None:
    """log(q + 1e-8), as others write it, gives -1.4e-3 here for -1."""
    z, peer = torch.tensor([[0.0, 25.0]]), torch.tensor([[25.0, 0.0]])
    ignored = torch.tensor([-100])
    losses, grads, _ = mutual_loss_and_grad([z, peer], ignored)
    torch.testing.assert_close(losses[0], torch.tensor(25.0))
    torch.testing.assert_close(grads[0], torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("peer_reduction", ["mean", "sum"])
def test_classes_masked_in_all_students(temperature: float, peer_reduction: str) -> None:
    logits, target = cohort()
    masked = torch.tensor([0, 4])
    logits = [z.index_fill(-1, masked, -INF) for z in logits]
    options = {"temperature": temperature, "peer_reduction": peer_reduction}
    target = target.masked_fill((target == 0) | (target == 4), 1)
    assert_as_exact(logits, target, **options)
    losses, grads, stats = mutual_loss_and_grad(logits, target, return_stats=True, **options)
    kept = torch.tensor([1, 2, 3, 5])
    labels = torch.searchsorted(kept, target)
    small = mutual_loss([z[:, kept] for z in logits], labels, **options)
    torch.testing.assert_close(losses, small)
    assert stats.finite.all()
    assert stats.pairwise_kl.isfinite().all()
    assert stats.mutual_information.isfinite()
    assert not grads[0][:, masked].any()


def test_classes_masked_in_all_students_with_probabilities_as_target() -> None:
    """Where torch's cross-entropy says NaN, 0 x -inf, a masked class contributes 0."""
    logits, _ = cohort()
    logits = [z.index_fill(-1, torch.tensor([0]), -INF) for z in logits]
    target = torch.rand(8, 6).index_fill_(1, torch.tensor([0]), 0.0)
    losses, grads, _ = mutual_loss_and_grad(logits, target)
    small = mutual_loss_and_grad([z[:, 1:] for z in logits], target[:, 1:])
    torch.testing.assert_close(losses, small[0])
    torch.testing.assert_close(grads[0][:, 1:], small[1][0])


def test_a_class_masked_in_one_student_makes_its_divergence_infinite() -> None:
    logits, target = cohort()
    logits[1] = logits[1].index_fill(-1, torch.tensor([0]), -INF)
    target = target.clamp(min=1)
    assert_as_exact(logits, target)
    losses = mutual_loss(logits, target)
    assert losses[1] == INF
    assert losses[[0, 2]].isfinite().all()
    peers = mutual_loss_and_grad(logits, target)[1]
    assert peers[1].isfinite().all()


def test_a_masked_target_costs_infinity_as_in_torch() -> None:
    (z, *_), target = cohort()
    z = z.index_fill(-1, target[:1], -INF)
    for options in ({}, {"label_smoothing": 0.1}):
        found = mutual_loss([z], target, **options)[0]
        assert found == F.cross_entropy(z, target, **options) == INF


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("peer_reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_student_is_as_if_absent(
    kind: str, peer_reduction: str, temperature: float
) -> None:
    logits, target = cohort(4, 3)
    logits[2] = BROKEN[kind](logits[2])
    options = {"temperature": temperature, "peer_reduction": peer_reduction}
    losses, grads, stats = mutual_loss_and_grad(logits, target, return_stats=True, **options)
    others = [0, 1, 3]
    rest = mutual_loss_and_grad([logits[k] for k in others], target, return_stats=True, **options)
    torch.testing.assert_close(losses[others], rest[0])
    for k, g in zip(others, rest[1], strict=True):
        torch.testing.assert_close(grads[k], g)
    assert losses[2].isnan()
    assert grads[2].isnan().all()
    assert stats.finite.tolist() == [True, True, False, True]
    assert stats.correct[2] == 0
    torch.testing.assert_close(stats.pairwise_kl[others][:, others], rest[2].pairwise_kl)
    assert stats.pairwise_kl[2].isnan().all()
    torch.testing.assert_close(stats.mutual_information, rest[2].mutual_information)
    torch.testing.assert_close(stats.row_mutual_information, rest[2].row_mutual_information)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_left_out_row_by_row(kind: str) -> None:
    logits, target = cohort(4)
    logits[0][1] = BROKEN[kind](logits[0][1])
    logits[3][1] = BROKEN[kind](logits[3][1])
    logits[3][5] = BROKEN[kind](logits[3][5])
    target = target.index_fill(0, torch.tensor([6]), -100)
    assert_as_exact(logits, target)
    assert_as_exact(logits, target, reduction="none", temperature=2.0)
    assert_as_exact(logits, target, peer_reduction="sum", label_smoothing=0.1)
    weight = torch.rand(4, 4)
    assert_as_exact(logits, target, peer_weight=weight)


def test_a_lone_survivor_learns_from_the_label_alone() -> None:
    logits, target = cohort(3)
    logits[0], logits[2] = logits[0] * NAN, logits[2] + INF
    losses, grads, _ = mutual_loss_and_grad(logits, target)
    alone = mutual_loss_and_grad([logits[1]], target)
    # The C++ loop computes such rows in float64.
    torch.testing.assert_close(losses[1], alone[0][0], rtol=2e-7, atol=0)
    torch.testing.assert_close(grads[1], alone[1][0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_of_one_student_has_no_gradient(kind: str, temperature: float) -> None:
    logits, target = cohort(1)
    logits[0][3] = BROKEN[kind](logits[0][3])
    _, (g,), _ = mutual_loss_and_grad(logits, target, temperature=temperature)
    assert g[3].isnan().all()
    assert g[torch.arange(8) != 3].isfinite().all()
    leaf = logits[0].requires_grad_()
    mutual_loss([leaf], target, temperature=temperature).sum().backward()
    torch.testing.assert_close(leaf.grad, g, equal_nan=True)


def test_a_broken_row_without_label_or_peers_is_still_reported() -> None:
    logits, target = cohort(2)
    logits = [z.index_fill(0, torch.tensor([3]), NAN) for z in logits]
    losses = mutual_loss(logits, target.index_fill(0, torch.tensor([3]), -100), reduction="none")
    assert losses[:, 3].isnan().all()
    assert losses[:, :3].isfinite().all()


def test_a_masked_class_costs_an_unlabelled_row_nothing() -> None:
    logits, target = cohort()
    logits = [z.index_fill(-1, torch.tensor([0]), -INF) for z in logits]
    target = target.clamp(min=1).index_fill(0, torch.tensor([2]), -100)
    assert_as_exact(logits, target)
    assert mutual_loss(logits, target).isfinite().all()


def test_a_broken_teacher_is_left_out() -> None:
    logits, target = cohort(2)
    teacher = torch.randn(8, 6)
    both = mutual_loss(logits, target, teacher_logits=[teacher * NAN, teacher])
    torch.testing.assert_close(both, mutual_loss(logits, target, teacher_logits=[teacher]))


def test_absolute_weights_are_not_made_up_for() -> None:
    logits, target = cohort(3)
    weight = torch.full((3, 3), 0.5)
    logits[2] = logits[2] * NAN
    losses = mutual_loss(logits, target, peer_weight=weight)
    pair = mutual_loss(logits[:2], target, kl_weight=0.5)
    torch.testing.assert_close(losses[:2], pair)


def test_the_peers_divergence_leaves_a_broken_row_out_too() -> None:
    logits, target = cohort(4)
    logits[3] = logits[3] * NAN
    ours = peer_divergence(logits)
    torch.testing.assert_close(ours[:3], peer_divergence(logits[:3]))
    torch.testing.assert_close(
        ours[3], mutual_loss(logits[:3], target, return_stats=True)[1].mutual_information
    )


def test_autograd_leaves_the_peers_of_a_broken_student_finite() -> None:
    logits, target = cohort(3)
    logits = [z.requires_grad_() for z in (logits[0], logits[1].detach() * NAN, logits[2])]
    mutual_loss(logits, target).sum().backward()
    assert logits[0].grad.isfinite().all()
    assert logits[1].grad.isnan().all()
    assert logits[2].grad.isfinite().all()


def test_nearly_equal_students_never_have_a_negative_divergence() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn((8, 100), generator=g)
    logits = [z + 1e-4 * torch.randn(z.shape, generator=g) for _ in range(4)]
    target = torch.randint(100, (8,), generator=g)
    stats = mutual_loss_and_grad(logits, target, return_stats=True)[2]
    assert (stats.kl >= 0).all()
    double = [z.double() for z in logits]
    exact = mutual_loss_and_grad(double, target, return_stats=True)[2]
    assert exact.pairwise_kl[0, 1] < 2e-8
    # Sums of p (log p - log q), as in F.kl_div, are 1% off here, and may be negative.
    torch.testing.assert_close(stats.pairwise_kl.double(), exact.pairwise_kl, rtol=1e-3, atol=1e-12)
    twins = mutual_loss_and_grad([z, z, z], target, return_stats=True)[2]
    assert not twins.pairwise_kl.any()
    torch.testing.assert_close(twins.kl, torch.zeros(3), rtol=0, atol=1e-6)
