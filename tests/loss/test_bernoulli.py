"""Labels that do not exclude each other: the loss against float64, torch's own, and two classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, Case, assert_exact, by_autograd
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import (
    FusedMutualLoss,
    linear_mutual_loss,
    mutual_loss,
    mutual_loss_and_grad,
    reference,
)
from dml_fast.loss.bernoulli import two_classes

BACKENDS = ["closed_form", "native"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost far more than such small tensors, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def label_cases(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Case:
    """K in 1..4 students, up to two batch dimensions, and any combination of the options."""
    students, classes = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 33, 70]))
    batch = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=2)))
    dtype = draw(st.sampled_from(dtypes))
    spread = draw(st.sampled_from([0.1, 1.0, 30.0]))
    shift = draw(st.sampled_from([0.0, -8.0]))  # most labels are not there
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal() -> Tensor:
        z = torch.randn((*batch, classes), generator=g, dtype=torch.float64)
        return (shift + spread * z).to(dtype)

    def positive(*shape: int) -> Tensor:
        return (0.1 + torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)

    options: dict[str, Any] = {
        "distribution": "bernoulli",
        "kl_weight": draw(st.sampled_from([0.0, 0.3, 1.0, torch.tensor(2.5)])),
        "ce_weight": draw(st.sampled_from([1.0, 0.4, 0.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 3.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "peer_reduction": draw(st.sampled_from(["mean", "sum"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    teachers = draw(st.integers(0, 2))
    if teachers:
        options["teacher_logits"] = [normal() for _ in range(teachers)]
    if draw(st.booleans()):
        options["row_weight"] = positive(*batch)
    if draw(st.booleans()):
        options["peer_weight"] = positive(students, students + teachers)
    target = torch.rand((*batch, classes), generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        target = target.round()
    return Case([normal() for _ in range(students)], target.to(dtype), options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(case=label_cases())
def test_values_and_gradients_are_the_definition(backend: str, case: Case) -> None:
    assert_exact(case, answer=partial(by_autograd, partial(mutual_loss, backend=backend)))


@settings(max_examples=30, deadline=None)
@given(case=label_cases([torch.float32, torch.bfloat16]))
def test_both_doors_give_the_definition(case: Case) -> None:
    assert_exact(case, answer=partial(by_autograd, mutual_loss))
    losses, grads = by_autograd(mutual_loss, case)
    direct, direct_grads, _ = mutual_loss_and_grad(case.logits, case.target, **case.options)
    assert torch.equal(losses, direct)
    if case.logits[0].dtype == torch.float32:  # else the native loop rounds to bf16 itself
        for g, other in zip(grads, direct_grads, strict=True):
            assert torch.equal(g, other)


def cohort(students: int = 3, rows: int = 6, classes: int = 7) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    logits = [2 * torch.randn(rows, classes) - 1 for _ in range(students)]
    return logits, (torch.rand(rows, classes) < 0.3).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_one_student_alone_has_torchs_binary_cross_entropy(backend: str, dtype: Any) -> None:
    (z,), target = cohort(students=1)
    found = mutual_loss([z], target.to(dtype), distribution="bernoulli", backend=backend)[0]
    assert float(found) == pytest.approx(float(F.binary_cross_entropy_with_logits(z, target)))


def test_a_label_is_a_distribution_of_two_classes() -> None:
    logits, target = cohort()
    logits = [z.double() for z in logits]
    pairs = [two_classes(z).reshape(-1, 2) for z in logits]
    both = torch.stack([target, 1 - target], -1).reshape(-1, 2).double()
    options: dict[str, Any] = {"temperature": 2.0, "label_smoothing": 0.1, "return_stats": True}
    losses, grads, stats = mutual_loss_and_grad(
        logits, target, distribution="bernoulli", backend="closed_form", **options
    )
    pair_losses, pair_grads, pair_stats = mutual_loss_and_grad(pairs, both, **options)
    torch.testing.assert_close(losses, pair_losses)
    for g, pair in zip(grads, pair_grads, strict=True):
        torch.testing.assert_close(g, pair[:, 0].reshape(g.shape))
    for name in ("ce", "kl", "pairwise_kl", "entropy", "mutual_information"):
        torch.testing.assert_close(getattr(stats, name), getattr(pair_stats, name))
    by_row, by_pair = stats.row_mutual_information, pair_stats.row_mutual_information
    assert by_row is not None
    assert by_pair is not None
    torch.testing.assert_close(by_row, by_pair.reshape(len(by_row), -1).mean(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_right_if_all_its_labels_are(backend: str) -> None:
    target = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    logits = torch.tensor([[2.0, -1.0], [2.0, -0.1], [-1.0, 0.0], [0.3, 0.2]])
    stats = mutual_loss_and_grad([logits], target, distribution="bernoulli", backend=backend)[2]
    assert stats.correct.tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_of_a_student_does_not_reach_its_peers(backend: str, bad: float) -> None:
    logits, target = cohort()
    logits[1][2, 3] = bad
    options: dict[str, Any] = {"distribution": "bernoulli", "backend": backend}
    losses, grads, stats = mutual_loss_and_grad(logits, target, reduction="none", **options)
    assert stats.finite.tolist() == [True, False, True]
    assert losses[1].isnan().tolist() == [row == 2 for row in range(len(target))]
    assert grads[1][2].isnan().all()
    assert not grads[1][[0, 1, 3, 4, 5]].isnan().any()
    without, without_grads, _ = mutual_loss_and_grad(
        [logits[0], logits[2]], target, reduction="none", **options
    )
    torch.testing.assert_close(losses[[0, 2], 2], without[:, 2])
    torch.testing.assert_close(grads[2][2], without_grads[1][2])
    alone = mutual_loss_and_grad(logits[:2], target, reduction="none", **options)[0]
    expected = F.binary_cross_entropy_with_logits(logits[0], target, reduction="none").mean(1)
    torch.testing.assert_close(alone[0, 2], expected[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_separate_losses_and_any_order_of_dimensions(backend: str) -> None:
    logits, target = cohort()
    loss = FusedMutualLoss(distribution="bernoulli", backend=backend, class_dim=1)
    assert "distribution='bernoulli'" in repr(loss)
    images = [z.reshape(2, 3, 7).movedim(-1, 1).clone().requires_grad_() for z in logits]
    labels = target.reshape(2, 3, 7).movedim(-1, 1)
    found = loss(images, labels, separate=True)
    found[2].backward()
    assert images[0].grad is None
    whole, grads = by_autograd(
        mutual_loss, Case(logits, target, {"distribution": "bernoulli", "backend": backend})
    )
    torch.testing.assert_close(torch.stack(found).detach(), whole)
    assert images[2].grad is not None
    torch.testing.assert_close(images[2].grad.movedim(1, -1).reshape(6, 7), grads[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.randint(7, (6,))}, r"target of labels has shape \(6,\): it must be"),
        ({"target": torch.full((6, 7), -100)}, "target of labels has -100: pass 0 or 1"),
        ({"class_weight": torch.ones(7)}, "class_weight weighs rows by their one class"),
        ({"distribution": "normal"}, "distribution is 'normal'"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    logits, target = cohort()
    given = {"target": target, "distribution": "bernoulli", **change}
    with pytest.raises(UserError, match=message):
        mutual_loss(logits, given.pop("target"), **given)
    if "distribution" in change or "class_weight" in change:
        with pytest.raises(UserError, match=message):
            FusedMutualLoss(**given)
    with pytest.raises(TypeError):
        linear_mutual_loss(logits, logits, target, distribution="bernoulli")  # type: ignore[call-arg]


def test_the_reference_is_torchs_own_divergence() -> None:
    (z, peer), _ = cohort(students=2)
    one, other = (torch.distributions.Bernoulli(logits=x) for x in (peer, z))
    expected = torch.distributions.kl_divergence(one, other).mean(-1)
    torch.testing.assert_close(reference.bernoulli_kl_rows(peer, z), expected)
