"""Which dimension has the classes: the last, torch's second, or whichever is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import FusedMutualLoss, mutual_loss, mutual_loss_and_grad, reference

pytestmark = pytest.mark.usefixtures("way")


def cohort(*shape: int) -> list[Tensor]:
    return list(torch.randn((3, *shape), generator=torch.Generator().manual_seed(len(shape))))


@pytest.mark.parametrize("shape", [(2, 5, 5), (1, 4, 4, 4)], ids=str)
def test_a_target_that_fits_both_orders_is_refused(shape: tuple[int, ...]) -> None:
    logits = cohort(*shape)
    target = torch.randint(shape[-1], shape[:-1])
    for call in (mutual_loss, mutual_loss_and_grad, FusedMutualLoss()):
        with pytest.raises(UserError, match=r"both .*class_dim=1 .*class_dim=-1"):
            call(logits, target)
    last = mutual_loss(logits, target, class_dim=-1)
    torch.testing.assert_close(last, reference.mutual_loss(logits, target))
    second = mutual_loss(logits, target, class_dim=1)
    moved = [z.movedim(1, -1) for z in logits]
    torch.testing.assert_close(second, reference.mutual_loss(moved, target))
    assert not torch.allclose(last, second)
    assert torch.equal(FusedMutualLoss(class_dim=1)(logits, target), second)


def test_a_target_in_torchs_order_is_told_how() -> None:
    logits, target = cohort(2, 5, 7), torch.randint(5, (2, 7))
    with pytest.raises(UserError, match=r"only with the classes in dimension 1: pass class_dim=1"):
        mutual_loss(logits, target)
    soft = cohort(2, 5, 7)[0].softmax(1)
    with pytest.raises(UserError, match=r"sums to 1 over dimension 1.* class_dim=1"):
        mutual_loss(logits, soft)
    mutual_loss(logits, soft, class_dim=-1)
    mutual_loss(logits, cohort(2, 5, 7)[0].softmax(-1))
    mutual_loss(logits, torch.rand(2, 5, 7))  # torch asks for no sum, and nor do we


# each dimension with both kinds of target, once by each of its names
@pytest.mark.parametrize("class_dim", [1, -2, 0, -3, 2, -1])
def test_any_dimension_gives_the_loss_and_gradients_of_the_last(class_dim: int) -> None:
    last = cohort(2, 7, 5)
    target = torch.randint(5, (2, 7))
    options: dict[str, Any] = {"class_dim": class_dim, "teacher_logits": None}
    moved_target = target
    if class_dim in (-2, 0, -1):
        target = cohort(2, 7, 5)[1].softmax(-1)
        moved_target = target.movedim(-1, class_dim)
    losses, grads, _ = mutual_loss_and_grad(last, target, teacher_logits=last[:1])
    logits = [z.movedim(-1, class_dim).clone().requires_grad_() for z in last]
    options["teacher_logits"] = [logits[0].detach()]
    found, moved, _ = mutual_loss_and_grad(logits, moved_target, **options)
    torch.testing.assert_close(found, losses)
    mutual_loss(logits, moved_target, **options).sum().backward()
    stack = torch.stack([z.detach() for z in logits]).requires_grad_()
    mutual_loss(stack, moved_target, **options).sum().backward()
    assert stack.grad is not None
    for z, g, m, s in zip(logits, grads, moved, stack.grad, strict=True):
        assert m.shape == z.shape
        torch.testing.assert_close(m, g.movedim(-1, class_dim))
        torch.testing.assert_close(z.grad, m)
        torch.testing.assert_close(s, m)
    rows = mutual_loss(logits, moved_target, reduction="none", **options)
    assert rows.shape == (3, 2, 7)


def test_two_dimensions_and_one_class_are_never_ambiguous() -> None:
    mutual_loss(cohort(5, 5), torch.randint(5, (5,)))
    mutual_loss(cohort(2, 1, 1), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("class_dim", [2, -3])
def test_a_dimension_that_is_not_there_is_named(class_dim: int) -> None:
    with pytest.raises(
        UserError, match=rf"class_dim is {class_dim} and logits have shape \(4, 3\)"
    ):
        mutual_loss(cohort(4, 3), torch.zeros(4, dtype=torch.int64), class_dim=class_dim)
