"""What must hold of the loss whatever the numbers: constants, sums, layouts, autograd's manners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.loss import (
    FusedMutualLoss,
    mutual_loss,
    mutual_loss_and_grad,
    peer_divergence,
    reference,
)

pytestmark = pytest.mark.usefixtures("way")


def cohort(
    students: int = 4, rows: int = 6, classes: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(students + rows + classes)
    logits = [3 * torch.randn((rows, classes), generator=g) for _ in range(students)]
    target = torch.randint(classes, (rows,), generator=g)
    return [z.to(dtype).requires_grad_() for z in logits], target


def test_a_loss_has_no_gradient_for_peers() -> None:
    logits, target = cohort()
    losses = mutual_loss(logits, target)
    for k in range(4):
        grads = torch.autograd.grad(losses[k], logits, retain_graph=True)
        for j, g in enumerate(grads):
            assert bool(g.any()) == (j == k)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_gradients_sum_to_zero_over_the_students(temperature: float) -> None:
    logits, target = cohort(dtype=torch.float64)
    ignored = torch.full_like(target, -100)
    losses, grads, stats = mutual_loss_and_grad(logits, ignored, temperature=temperature)
    assert not stats.ce.any()
    torch.testing.assert_close(losses, stats.kl)
    assert torch.stack(grads).abs().max() > 1e-3
    torch.testing.assert_close(sum(grads), torch.zeros_like(grads[0]))


def test_a_batch_without_a_label_teaches_and_has_cross_entropy_zero() -> None:
    logits, target = cohort()
    ignored = torch.full_like(target, -100)
    weight = torch.rand(7)
    losses = mutual_loss(logits, ignored, class_weight=weight, label_smoothing=0.1)
    expected = mutual_loss_and_grad(logits, target)[2].kl
    torch.testing.assert_close(losses, expected)


def test_an_unlabelled_row_keeps_its_divergence() -> None:
    logits, target = cohort()
    all_rows = mutual_loss(logits, target, reduction="none")
    stats = mutual_loss_and_grad(logits, target)[2]
    target = target.index_fill(0, torch.tensor([3]), -100)
    rows = mutual_loss(logits, target, reduction="none")
    ce = F.cross_entropy(logits[0], target, reduction="none")
    assert torch.equal(rows[:, :3], all_rows[:, :3])
    assert ce[3] == 0
    assert (rows[:, 3] > 0).all()
    torch.testing.assert_close((rows[0] - ce).mean(), stats.kl[0])


def test_dml_and_dml_e_have_one_gradient_and_differ_by_the_peers_divergence() -> None:
    """DML_e: the KL from the *mean* of the peers (the paper, on larger cohorts)."""
    temperature = 2.0
    logits, target = cohort(dtype=torch.float64)
    losses, grads, stats = mutual_loss_and_grad(logits, target, temperature=temperature)
    spread = temperature**2 * peer_divergence(logits, temperature)
    p = torch.stack(logits).detach().div(temperature).softmax(-1)
    for k, z in enumerate(logits):
        mean = (p.sum(0) - p[k]) / 3
        log_p = F.log_softmax(z / temperature, -1)
        kl = temperature**2 * F.kl_div(log_p, mean, reduction="batchmean")
        loss = F.cross_entropy(z, target) + kl
        torch.testing.assert_close(stats.kl[k] - spread[k], kl)
        torch.testing.assert_close(losses[k] - spread[k], loss)
        torch.testing.assert_close(grads[k], torch.autograd.grad(loss, z)[0])
    assert (spread > 0.1).all()


def test_a_target_of_averaged_logits_is_another_method() -> None:
    logits, target = cohort(dtype=torch.float64)
    grads = mutual_loss_and_grad(logits, target)[1]
    z = logits[0]
    target_p = ((logits[1] + logits[2] + logits[3]) / 3).detach().softmax(-1)
    loss = F.cross_entropy(z, target) + F.kl_div(z.log_softmax(-1), target_p, reduction="batchmean")
    assert (torch.autograd.grad(loss, z)[0] - grads[0]).abs().max() > 1e-3


def test_a_teacher_is_knowledge_distillation() -> None:
    """One student, one teacher: Hinton et al. 2015, with T² on the soft part."""
    (z, teacher), target = cohort(2)
    loss = mutual_loss([z], target, teacher_logits=[teacher], temperature=4.0)
    soft = F.kl_div(
        (z / 4).log_softmax(-1), (teacher.detach() / 4).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(loss[0], F.cross_entropy(z, target) + 16 * soft)
    loss.sum().backward()
    assert z.grad is not None
    assert teacher.grad is None


def test_zero_peer_weight_does_not_listen_and_the_diagonal_is_ignored() -> None:
    logits, target = cohort(3)
    weight = torch.tensor([[9.0, 0.0, 0.0], [0.5, 9.0, 0.5], [1.0, 0.0, 9.0]])
    kept = weight.clone()
    losses = mutual_loss(logits, target, peer_weight=weight)
    assert torch.equal(weight, kept)
    assert torch.equal(losses, mutual_loss(logits, target, peer_weight=weight.fill_diagonal_(0)))
    alone = F.cross_entropy(logits[0], target)
    torch.testing.assert_close(losses[0], alone)
    torch.testing.assert_close(losses[1], mutual_loss(logits, target)[1])
    pair = mutual_loss([logits[2], logits[0]], target)[0]
    torch.testing.assert_close(losses[2], pair)


def test_row_weights_multiply_rows_and_leave_the_denominators() -> None:
    logits, target = cohort()
    target = target.index_fill(0, torch.tensor([0, 1]), -100)
    mask = torch.ones(6).index_fill_(0, torch.tensor([1, 5]), 0.0)
    found = mutual_loss(logits, target, row_weight=mask)
    ones = mutual_loss(logits, target, row_weight=torch.ones(6))
    torch.testing.assert_close(ones, mutual_loss(logits, target))
    ce = F.cross_entropy(logits[0], target, reduction="none")
    kl = mutual_loss(logits, target, reduction="none")[0] - ce
    torch.testing.assert_close(found[0], (ce * mask).sum() / 4 + (kl * mask).sum() / 6)


def test_uniform_and_absolute_weights_agree() -> None:
    logits, target = cohort(3)
    weight = torch.full((3, 4), 1 / 3)
    teacher = [torch.randn(6, 7)]
    found = mutual_loss(logits, target, peer_weight=weight, teacher_logits=teacher)
    torch.testing.assert_close(found, mutual_loss(logits, target, teacher_logits=teacher))


def test_any_strides_and_leading_dimensions() -> None:
    logits, target = cohort(3, 6, 5)
    losses, grads, stats = mutual_loss_and_grad(logits, target, return_stats=True)
    turned = [z.detach().t().contiguous().t() for z in logits]
    assert not turned[0].is_contiguous()
    found = mutual_loss_and_grad(turned, target)
    assert torch.equal(found[0], losses)
    assert all(torch.equal(a, b) for a, b in zip(found[1], grads, strict=True))

    folded = [z.detach().reshape(2, 3, 5).transpose(0, 1) for z in logits]  # (3, 2, 5)
    labels = target.reshape(2, 3).t()
    found = mutual_loss_and_grad(folded, labels, return_stats=True)
    torch.testing.assert_close(found[0], losses)
    assert found[1][0].shape == (3, 2, 5)
    torch.testing.assert_close(found[1][1].transpose(0, 1).reshape(6, 5), grads[1])
    rows = mutual_loss(folded, labels, reduction="none")
    assert rows.shape == (3, 3, 2)
    torch.testing.assert_close(rows.mean((1, 2)), losses)
    assert found[2].row_mutual_information.shape == (3, 2)
    assert stats.row_mutual_information.shape == (6,)


def test_no_input_is_written_to() -> None:
    logits, target = cohort(3)
    options: dict[str, Any] = {
        "class_weight": torch.rand(7),
        "row_weight": torch.rand(6),
        "peer_weight": torch.rand(3, 4),
        "teacher_logits": [torch.randn(6, 7)],
    }
    inputs = [*logits, target, *options["teacher_logits"]]
    inputs += [value for value in options.values() if isinstance(value, Tensor)]
    copies, versions = [x.clone() for x in inputs], [x._version for x in inputs]
    for temperature in (1.0, 2.0):
        for soft in (target, torch.rand(6, 7)):
            mutual_loss(logits, soft, temperature=temperature, **options).sum().backward()
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_backward_scales_repeats_and_adds_up() -> None:
    logits, target = cohort()
    _, grads, _ = mutual_loss_and_grad(logits, target)
    losses = mutual_loss(logits, target)
    (2 * losses).sum().backward(retain_graph=True)
    for z, g in zip(logits, grads, strict=True):
        torch.testing.assert_close(z.grad, 2 * g)
    losses.sum().backward()
    mutual_loss(logits, target)[2].backward()  # a second loss on the same logits
    for k, (z, g) in enumerate(zip(logits, grads, strict=True)):
        torch.testing.assert_close(z.grad, (4 if k == 2 else 3) * g)


def test_per_row_losses_take_per_row_gradients() -> None:
    logits, target = cohort()
    chosen = torch.arange(6.0)
    rows = mutual_loss(logits, target, reduction="none")
    found = torch.autograd.grad((rows * chosen).sum(), logits)
    expected = mutual_loss_and_grad(logits, target, row_weight=chosen, reduction="sum")[1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_only_those_who_ask_get_a_graph() -> None:
    logits, target = cohort(3)
    frozen = [logits[0], logits[1].detach(), logits[2]]
    mutual_loss(frozen, target).sum().backward()
    assert logits[0].grad is not None
    assert frozen[1].grad is None
    with torch.no_grad():
        assert not mutual_loss(logits, target).requires_grad
    assert not mutual_loss([z.detach() for z in logits], target).requires_grad


def test_a_second_derivative_is_refused_even_where_the_outer_gradient_is_constant() -> None:
    logits, target = cohort()
    grads = torch.autograd.grad(mutual_loss(logits, target).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        sum(g.pow(2).sum() for g in grads).backward()
    exact = torch.autograd.grad(
        reference.mutual_loss(logits, target).sum(), logits, create_graph=True
    )
    sum(g.pow(2).sum() for g in exact).backward()  # the oracle that the message names can
    assert logits[0].grad is not None


def test_grad_scale_comes_before_rounding() -> None:
    """Unscaled, these gradients vanish in fp16."""
    logits, target = cohort(3, 6, 50, torch.float16)
    weight = torch.full((6,), 1e-5)
    plain = mutual_loss_and_grad(logits, target, row_weight=weight)[1]
    exact = mutual_loss_and_grad([z.double() for z in logits], target, row_weight=weight)[1]
    scale = torch.tensor([2.0**16, 2.0**10, 1.0])
    losses, scaled, _ = mutual_loss_and_grad(logits, target, row_weight=weight, grad_scale=scale)
    assert (plain[0] == 0).float().mean() > 0.5
    assert (scaled[0] == 0).float().mean() < 0.01
    torch.testing.assert_close(scaled[0].double(), exact[0] * 2**16, rtol=1e-3, atol=1e-6)
    assert torch.equal(scaled[2], plain[2])
    assert torch.equal(losses, mutual_loss(logits, target, row_weight=weight))
    for one in (8.0, torch.tensor(8.0)):
        again = mutual_loss_and_grad(logits, target, row_weight=weight, grad_scale=one)[1]
        torch.testing.assert_close(again[0].double(), exact[0] * 8, rtol=1e-3, atol=1e-7)


def test_autocast_does_not_touch_the_loss() -> None:
    logits, target = cohort()
    weight = torch.rand(4, 4)
    expected = mutual_loss(logits, target, peer_weight=weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = mutual_loss(logits, target, peer_weight=weight)
    assert torch.equal(found, expected)


def test_students_of_several_precisions() -> None:
    logits, target = cohort(2)
    mixed = [logits[0].detach().bfloat16().requires_grad_(), logits[1]]
    losses, grads, _ = mutual_loss_and_grad(mixed, target)
    expected = mutual_loss_and_grad([mixed[0].float(), logits[1]], target)
    assert torch.equal(losses, expected[0])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    assert torch.equal(grads[1], expected[1][1])


def test_an_infinite_divergence_does_not_count_when_switched_off() -> None:
    z = torch.tensor([[0.0, -torch.inf, 0.0]])
    target = torch.tensor([0])
    assert mutual_loss([z, torch.zeros(1, 3)], target)[0] == torch.inf
    losses = mutual_loss([z, torch.zeros(1, 3)], target, kl_weight=0.0)
    torch.testing.assert_close(losses[0], F.cross_entropy(z, target))


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_losses_and_statistics_share_no_memory(kl_weight: float) -> None:
    logits, target = cohort()
    losses, _, stats = mutual_loss_and_grad(logits, target, kl_weight=kl_weight)
    before = stats.ce.clone()
    losses.zero_()
    assert torch.equal(stats.ce, before)


def test_an_empty_batch_is_zero() -> None:
    logits = [torch.randn(0, 5, requires_grad=True) for _ in range(3)]
    target = torch.empty(0, dtype=torch.int64)
    losses = mutual_loss(logits, target)
    assert torch.equal(losses, torch.zeros(3))
    losses.sum().backward()
    assert logits[0].grad.shape == (0, 5)
    assert mutual_loss(logits, target, reduction="none").shape == (3, 0)
    assert mutual_loss_and_grad(logits, target, reduction="none")[0].shape == (3, 0)


def test_the_module_moves_its_weights_and_can_be_ramped() -> None:
    logits, target = cohort()
    loss = FusedMutualLoss(kl_weight=0.0, class_weight=torch.ones(7)).double()
    assert loss.class_weight.dtype == torch.float64
    start = loss(logits, target)
    loss.kl_weight = 0.5
    stats = mutual_loss_and_grad(logits, target)[2]
    torch.testing.assert_close(loss(logits, target) - start, 0.5 * stats.kl)
