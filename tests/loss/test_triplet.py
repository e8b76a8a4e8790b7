"""The triplet loss against loops, and in the engine's step against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import engine_of, sgd
from torch import Tensor, nn
from torch.nn import functional as F

from dml_fast.errors import UserError
from dml_fast.loss.reference import mutual_loss as reference
from dml_fast.loss.triplet import TripletLoss, triplet_loss
from dml_fast.models.embedding import EmbeddingNet


def by_loops(features: Tensor, target: Tensor, margin: float) -> Tensor:
    """Equation 5 of Hermans et al. (2017), an image at a time."""
    terms = []
    for i, anchor in enumerate(features):
        distances = [(anchor - other).norm() for other in features]
        same = [d for j, d in enumerate(distances) if target[j] == target[i] and j != i]
        others = [d for j, d in enumerate(distances) if target[j] != target[i]]
        farthest = max(same) if same else torch.zeros((), dtype=features.dtype)
        terms.append(torch.relu(margin + farthest - min(others)) if others else 0 * anchor.sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("margin", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2], [3] * 6])
def test_loss_and_gradient_are_those_of_loops(labels: list[int], margin: float) -> None:
    g = torch.Generator().manual_seed(len(set(labels)))
    features = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.tensor(labels)
    expected = by_loops(features, target, margin)
    got = triplet_loss(features, target, margin)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(loss, features)[0] for loss in (got, expected)]
    torch.testing.assert_close(*grads)


def test_equal_features_have_a_finite_gradient() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    loss = triplet_loss(features, torch.tensor([0, 0, 1, 1]), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3)
    assert features.grad is not None and torch.isfinite(features.grad).all()


def test_low_precision_is_widened() -> None:
    features = 100 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = triplet_loss(features, target, 0.3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, triplet_loss(features.float(), target, 0.3))


@pytest.mark.parametrize("margin", [-1, float("nan"), float("inf"), "1", None])
def test_a_margin_out_of_range_is_refused_at_once(margin: Any) -> None:
    with pytest.raises(UserError, match="margin is "):
        TripletLoss(margin)


def embedding_nets() -> list[EmbeddingNet]:
    torch.manual_seed(3)
    nets = []
    for _ in range(2):
        body = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU())
        net = EmbeddingNet(body, 6, 4).double()
        nn.init.normal_(net.classifier.weight)
        nets.append(net)
    return nets


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_step_is_that_of_plain_autograd(weight: float) -> None:
    ours, plain = embedding_nets(), embedding_nets()
    extra = {"feature_loss": TripletLoss(1.0), "feature_weight": weight} if weight else {}
    engine = engine_of([*ours], kl_weight=0.7, **extra)
    optimizers = [sgd(net) for net in plain]
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(8, 1, 3, 3, generator=g, dtype=torch.float64)
        y = torch.arange(8) // 2
        result = engine.step(x, y)
        outputs = [net.features_and_logits(x) for net in plain]
        losses = reference([z for _, z in outputs], y, kl_weight=0.7)
        triplets = torch.stack([by_loops(f, y, 1.0) for f, _ in outputs])
        totals = losses + weight * triplets
        torch.testing.assert_close(result.losses, totals.detach(), check_dtype=False)
        if weight:
            torch.testing.assert_close(result.extra, triplets.detach(), check_dtype=False)
        totals.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(ours, plain, strict=True):
        for (name, a), b in zip(
            mine.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)


def test_alternating_updates_carry_it_too() -> None:
    engine = engine_of(
        [*embedding_nets()], update="alternating", feature_loss=TripletLoss(), feature_weight=1.0
    )
    x = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(8) // 2
    with torch.no_grad():
        fresh = embedding_nets()
        expected = [triplet_loss(net.features_and_logits(x)[0], y, 0.3) for net in fresh]
        ce = [F.cross_entropy(net(x), y) for net in fresh]
    result = engine.step(x, y)
    torch.testing.assert_close(result.extra, torch.stack(expected), check_dtype=False)
    torch.testing.assert_close(result.ce[0], ce[0], check_dtype=False)
    assert not result.skipped.any()
