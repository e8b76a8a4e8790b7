"""Separate losses: one forward pass, and a backward pass for each student.

Loops step student by student with them; where such a loop has the joint losses, these say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dml_fast import FusedLinearMutualLoss, FusedMutualLoss
from dml_fast.errors import UserError
from dml_fast.loss import mutual_loss

BACKENDS = ["closed_form", "native", "triton"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 3.0, "label_smoothing": 0.1, "kl_weight": 0.3},
    "rows": {"reduction": "none"},
    "weighted": {"ce_weight": 0.25, "kl_weight": torch.tensor(2.0)},
    "taught": {"teacher_logits": [torch.linspace(-1, 1, 60).reshape(12, 5)]},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    answered: Any = nullcontext()
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
        from kernel_cases import answer_with

        answered = answer_with("one_pass")
    with answered:
        yield request.param


def cohort(dtype: torch.dtype = torch.float32, rows: int = 12) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(rows)
    logits = [(2 * torch.randn(rows, 5, generator=g)).to(dtype) for _ in range(3)]
    return [z.requires_grad_() for z in logits], torch.randint(5, (rows,), generator=g)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, name) for name in OPTIONS]
    + [
        (dtype, name)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
        for name in ("hot", "rows")
    ],
)
def test_each_loss_and_gradient_is_the_joint_one(
    dtype: torch.dtype, name: str, backend: str
) -> None:
    options = OPTIONS[name]
    logits, target = cohort(dtype)
    joint = mutual_loss(logits, target, backend=backend, **options)
    assert isinstance(joint, Tensor)
    factors = torch.linspace(0.3, 70.0, joint.numel(), dtype=joint.dtype).reshape(joint.shape)
    (joint * factors).sum().backward()
    wanted = [z.grad for z in logits]
    for z in logits:
        z.grad = None
    losses = mutual_loss(logits, target, backend=backend, separate=True, **options)
    assert isinstance(losses, tuple)
    assert len(losses) == 3
    for k in (2, 0, 1):
        assert torch.equal(losses[k].detach(), joint[k].detach())
        (losses[k] * factors[k]).sum().backward()
        assert torch.equal(logits[k].grad, wanted[k])  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_compiled_backend_too() -> None:
    test_each_loss_and_gradient_is_the_joint_one(torch.float32, "plain", "compiled")


def test_a_student_whose_loss_is_not_used_keeps_its_gradient(backend: str) -> None:
    logits, target = cohort()
    losses = mutual_loss(logits, target, backend=backend, separate=True)
    losses[1].backward()
    assert logits[1].grad is not None
    assert logits[0].grad is None
    assert logits[2].grad is None


def test_a_frozen_peer_has_a_loss_without_a_graph(backend: str) -> None:
    logits, target = cohort()
    logits[0] = logits[0].detach()
    losses = mutual_loss(logits, target, backend=backend, separate=True)
    assert [loss.requires_grad for loss in losses] == [False, True, True]
    losses[2].backward()


def test_without_autograd_and_with_statistics(backend: str) -> None:
    logits, target = cohort()
    with torch.no_grad():
        losses, stats = mutual_loss(
            logits, target, backend=backend, separate=True, return_stats=True
        )
    assert isinstance(losses, tuple)
    assert torch.allclose(torch.stack(losses), stats.ce + stats.kl)  # type: ignore[union-attr]


def test_other_dimensions_of_the_batch_and_of_the_classes() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(2)]
    target = torch.randint(5, (2, 3, 4))
    losses = FusedMutualLoss(class_dim=1, reduction="none")(logits, target, separate=True)
    assert [loss.shape for loss in losses] == [(2, 3, 4), (2, 3, 4)]
    losses[1].sum().backward()
    assert logits[1].grad is not None
    assert logits[1].grad.shape == (2, 5, 3, 4)


def test_linear_heads_have_separate_losses_too() -> None:
    torch.manual_seed(0)
    heads = [nn.Linear(4, 5) for _ in range(3)]
    hidden = [torch.randn(12, 4, requires_grad=True) for _ in heads]
    target = torch.randint(5, (12,))
    given = (hidden, [h.weight for h in heads], target, [h.bias for h in heads])
    criterion = FusedLinearMutualLoss(ce_weight=0.5)
    joint = criterion(*given)
    wanted = torch.autograd.grad(joint.sum(), given[1])  # type: ignore[union-attr, call-overload]
    losses = criterion(*given, separate=True)
    for k in (2, 0, 1):
        assert torch.equal(losses[k].detach(), joint[k].detach())  # type: ignore[union-attr]
        losses[k].backward()  # type: ignore[union-attr]
        assert torch.equal(heads[k].weight.grad, wanted[k])  # type: ignore[arg-type]
        assert (hidden[1].grad is None) == (k != 1)
    joint = criterion(*given)
    joint[0].backward()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="separate=True"):
        joint[1].backward()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="reduction"):
        FusedLinearMutualLoss(reduction="none")(*given, separate=True)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), "1", None])
def test_a_wrong_weight_of_the_cross_entropy(wrong: Any) -> None:
    with pytest.raises(UserError, match="ce_weight"):
        FusedMutualLoss(ce_weight=wrong)


def test_one_tensor_of_all_logits_is_refused() -> None:
    stacked = torch.randn(3, 4, 5, requires_grad=True)
    with pytest.raises(UserError, match="pass a list"):
        mutual_loss(stacked, torch.zeros(4, dtype=torch.int64), separate=True)


def test_second_derivatives_are_refused(backend: str) -> None:
    logits, target = cohort()
    loss = mutual_loss(logits, target, backend=backend, separate=True)[0]
    (grad,) = torch.autograd.grad(loss, logits[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_the_joint_losses_name_the_remedy(backend: str) -> None:
    logits, target = cohort()
    losses = mutual_loss(logits, target, backend=backend)
    losses[0].backward()
    with pytest.raises(RuntimeError, match="separate=True"):
        losses[1].backward()


@pytest.mark.slow
@pytest.mark.compat
def test_compiled_students_and_a_compiled_loss() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    nets = [nn.Linear(6, 5) for _ in range(3)]
    x, target = torch.randn(12, 6), torch.randint(5, (12,))
    for loss in mutual_loss([net(x) for net in nets], target, separate=True):
        loss.backward()  # type: ignore[union-attr]
    wanted = [net.weight.grad.clone() for net in nets]  # type: ignore[union-attr]

    nn.ModuleList(nets).zero_grad()
    students = [torch.compile(net, backend="aot_eager") for net in nets]
    losses = mutual_loss([student(x) for student in students], target, separate=True)
    for k in (1, 0, 2):
        losses[k].backward()  # type: ignore[union-attr]
        assert torch.allclose(nets[k].weight.grad, wanted[k], atol=1e-7)  # type: ignore[arg-type]

    nn.ModuleList(nets).zero_grad()
    compiled = torch.compile(
        lambda z, y: mutual_loss(z, y, separate=True), fullgraph=True, backend="aot_eager"
    )
    sum(compiled([net(x) for net in nets], target)).backward()  # its one backward pass
    for net, grad in zip(nets, wanted, strict=True):
        assert torch.allclose(net.weight.grad, grad, atol=1e-7)  # type: ignore[arg-type]
    torch.compiler.reset()


# The loops that trainers of mutual learning have, in their shape.


def plain(outputs: list[Tensor], target: Tensor) -> list[Tensor]:
    """Zhang et al. 2018, equations 5 and 6, pair by pair."""
    losses = []
    for k, z in enumerate(outputs):
        loss = F.cross_entropy(z.float(), target)
        for one in (peer for i, peer in enumerate(outputs) if i != k):
            p = one.detach().float().softmax(1)
            loss += F.kl_div(z.float().log_softmax(1), p, reduction="batchmean") / (
                len(outputs) - 1
            )
        losses.append(loss)
    return losses


def ours(outputs: list[Tensor], target: Tensor) -> list[Tensor]:
    return list(FusedMutualLoss()(outputs, target, separate=True))


Losses = Callable[[list[Tensor], Tensor], list[Tensor]]
Loop = Callable[[list[nn.Module], list[torch.optim.Optimizer], Tensor, Tensor, Losses], None]


def one_by_one(nets: Any, optimizers: Any, x: Tensor, y: Tensor, losses_of: Losses) -> None:
    """All outputs first, then backward and step student by student."""
    outputs = [net(x) for net in nets]
    losses = losses_of(outputs, y)
    for loss, optimizer in zip(losses, optimizers, strict=True):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_autocast(nets: Any, optimizers: Any, x: Tensor, y: Tensor, losses_of: Losses) -> None:
    """Autocast, and gradients of two halves of the batch added up."""
    for half in (slice(0, 8), slice(8, 16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = [net(x[half]) for net in nets]
        for loss in reversed(losses_of(outputs, y[half])):
            (loss / 2).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def alternating(nets: Any, optimizers: Any, x: Tensor, y: Tensor, losses_of: Losses) -> None:
    """Algorithm 1 of the paper: all predict anew before each update."""
    for k, optimizer in enumerate(optimizers):
        outputs = [net(x) for net in nets]
        loss = losses_of(outputs, y)[k]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def clipped(nets: Any, optimizers: Any, x: Tensor, y: Tensor, losses_of: Losses) -> None:
    """Gradients clipped between backward and step."""
    outputs = [net(x) for net in nets]
    for net, loss, optimizer in zip(nets, losses_of(outputs, y), optimizers, strict=True):
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()


@pytest.mark.parametrize("loop", [one_by_one, with_autocast, alternating, clipped])
def test_a_loop_learns_as_with_its_own_loss(loop: Loop) -> None:
    torch.manual_seed(0)
    mine = [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)) for _ in range(3)]
    theirs = deepcopy(mine)
    for nets, losses_of in ((mine, ours), (theirs, plain)):
        g = torch.Generator().manual_seed(1)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
        for _ in range(25):
            x = torch.randn(16, 6, generator=g)
            loop(nets, optimizers, x, torch.randint(5, (16,), generator=g), losses_of)
    # bf16 rounds gradients of either loss to 1/256 of themselves
    allowed = 2e-2 if loop is with_autocast else 1e-5
    for one, other in zip(mine, theirs, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, atol=allowed)
