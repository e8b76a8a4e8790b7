"""MIHash: against its definition by loops, numpy's histograms, and finite differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import CPU, engine_of, optimizer_of, sgd
from torch import Tensor, nn

from dml_fast.engine import Cohort, Engine, Precision, Student
from dml_fast.errors import UserError
from dml_fast.loss import MIHashLoss, mihash_loss
from dml_fast.models.embedding import EmbeddingNet

TARGET = [0, 0, 0, 1, 1, 2, 2, -100, 3, 1, -100, 2]


def entropy(share: Tensor) -> Tensor:
    """Bits of a distribution."""
    share = share[share > 0]
    return -(share * share.log2()).sum()


def by_definition(u: Tensor, target: list[int], bins: int, scale: float) -> Tensor:
    """Minus the mean over anchors of H(h) - π H(h+) - (1 - π) H(h-), an anchor at a time."""
    bits = u.shape[1]
    phi = 2 * torch.sigmoid(scale * u) - 1
    centres = torch.arange(bins + 1, dtype=u.dtype) * bits / bins
    found = []
    for i, own in enumerate(target):
        near, far = [], []
        for j, other in enumerate(target):
            if i != j and own != -100 and other != -100:
                distance = (bits - phi[i] @ phi[j]) / 2
                kernel = (1 - (distance - centres).abs() * bins / bits).clamp(min=0)
                (near if own == other else far).append(kernel)
        if near and far:
            prior = len(near) / (len(near) + len(far))
            plus, minus = torch.stack(near).mean(0), torch.stack(far).mean(0)
            mixed = prior * plus + (1 - prior) * minus
            found.append(entropy(mixed) - prior * entropy(plus) - (1 - prior) * entropy(minus))
    return -torch.stack(found).mean()


def codes(rows: int, bits: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, bits, generator=g, dtype=dtype)


@pytest.mark.parametrize(("bins", "scale"), [(1, 1.0), (5, 1.0), (8, 3.0), (16, 0.5)])
def test_loss_and_gradient_are_those_of_the_definition(bins: int, scale: float) -> None:
    u = codes(12, 8).requires_grad_()
    expected = by_definition(u, TARGET, bins, scale)
    got = mihash_loss(u, TARGET, bins, scale)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss, u)[0] for loss in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    u = codes(12, 8, seed=1).requires_grad_()
    phi = torch.tanh(0.65 * u)
    places = (8 - phi @ phi.T) * 5 / 16
    assert (places - places.round()).abs().fill_diagonal_(1).min() > 1e-4  # away from bins' edges
    assert torch.autograd.gradcheck(lambda x: mihash_loss(x, TARGET, 5, 1.3), u, eps=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_codes_have_the_information_of_numpys_histograms(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    signs = np.sign(rng.standard_normal((90, 16)))
    target = rng.integers(5, size=90)
    found = []
    for i in range(90):
        distance = (signs[i] != signs).sum(1)
        same = target == target[i]
        other = np.arange(90) != i
        pairs, _, _ = np.histogram2d(
            distance[other], same[other], bins=[np.arange(18) - 0.5, np.arange(3) - 0.5]
        )
        joint = pairs / pairs.sum()
        apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        there = joint > 0
        found.append((joint[there] * np.log2(joint[there] / apart[there])).sum())
    u = torch.from_numpy(100 * signs).to(dtype)
    loss = mihash_loss(u, target, bins=16)
    assert loss.dtype == dtype
    assert -loss.item() == pytest.approx(np.mean(found), abs=1e-6)


def test_rows_in_another_order_and_a_flipped_bit_change_nothing() -> None:
    u, target = codes(12, 8), torch.tensor(TARGET)
    expected = mihash_loss(u, target)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    flipped = u * torch.tensor([1, 1, -1, 1, 1, 1, 1, 1])
    for other, labels in ((u[order], target[order]), (flipped, target)):
        torch.testing.assert_close(mihash_loss(other, labels), expected, rtol=1e-12, atol=1e-14)


def test_information_lies_between_0_and_the_entropy_of_the_classes() -> None:
    target = torch.arange(20) // 5
    most = entropy(torch.tensor([4 / 19, 15 / 19], dtype=torch.float64)).item()
    for seed in range(20):
        assert 0 <= -mihash_loss((seed + 1) * codes(20, 8, seed), target).item() <= most
    own = 100.0 * torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, -1, -1]])
    perfect = mihash_loss(own.double()[target], target, bins=4)
    assert -perfect.item() == pytest.approx(most, abs=1e-12)
    assert mihash_loss(torch.zeros(20, 4), target).item() == 0.0  # equal codes say nothing


@pytest.mark.parametrize(
    "target", [[3] * 6, [0, 1, 2, 3, 4, 5], [-100] * 6, [1, 1, -100, 1, -100, 1]]
)
def test_without_anchors_the_loss_and_its_gradient_are_0(target: list[int]) -> None:
    u = codes(6, 8).requires_grad_()
    loss = mihash_loss(u, target)
    loss.backward()
    assert loss.item() == 0.0 and math.copysign(1, loss.item()) == 1.0
    assert u.grad is not None and not u.grad.any()


def test_rows_without_a_label_belong_to_no_class() -> None:
    u, target = codes(12, 8).requires_grad_(), torch.tensor(TARGET)
    labelled = target >= 0
    (grad,) = torch.autograd.grad(mihash_loss(u, target), u)
    alone = mihash_loss(u[labelled], target[labelled])
    torch.testing.assert_close(mihash_loss(u, target), alone, rtol=1e-12, atol=1e-14)
    assert not grad[~labelled].any() and grad[labelled].any()


def test_halves_are_widened_also_inside_autocast() -> None:
    u = codes(40, 16, dtype=torch.float32).bfloat16()
    target = torch.arange(40) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mihash_loss(u, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mihash_loss(u.float(), target))


def test_the_module_keeps_the_last_information() -> None:
    module = MIHashLoss(bins=5, scale=1.3)
    u, target = codes(12, 8).requires_grad_(), torch.tensor(TARGET)
    loss = module(u, target)
    assert torch.equal(loss, mihash_loss(u, target, 5, 1.3)) and loss.requires_grad
    assert torch.equal(module.information, -loss.detach()) and not module.information.requires_grad
    assert str(module) == "MIHashLoss(bins=5, scale=1.3)"
    assert not module.state_dict()


U = codes(3, 8, dtype=torch.float32)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"u": [[0.0]]}, r"u is .*: pass a floating-point tensor \(N, b\)"),
    ({"u": U.long()}, "u is .*: pass a floating-point tensor"),
    ({"u": U[0]}, r"u has shape \(8,\): it must be \(N, b\)"),
    ({"u": U[:, :0]}, r"u has shape \(3, 0\): .* at least one bit"),
    ({"u": U[:0], "target": []}, "u has 0 rows: pass 1 to 2048"),
    ({"u": U[:1].expand(2049, 8), "target": [0] * 2049}, "u has 2049 rows: pass 1 to 2048"),
    ({"target": [0, 1]}, "target is .*: pass 3 whole numbers, the rows' classes"),
    ({"target": torch.ones(3, 4)}, "target is .*: pass 3 whole numbers"),
    ({"target": [0.5, 1, 2]}, "target is .*: pass 3 whole numbers"),
    (
        {"target": torch.zeros(3, dtype=torch.int64, device="meta")},
        "target is on meta and u on cpu",
    ),
    ({"bins": 0}, "bins is 0: pass a whole number of at least 1"),
    ({"bins": 2.5}, "bins is 2.5: pass an integer"),
    ({"scale": 0}, "scale is 0.0: pass a finite number above 0"),
    ({"scale": -1.0}, "scale is -1.0: pass a finite number above 0"),
    ({"scale": math.inf}, "scale is inf: pass a finite number above 0"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_refused_in_a_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mihash_loss(**{"u": U, "target": [0, 0, 1], **wrong})
    if "bins" in wrong or "scale" in wrong:
        with pytest.raises(UserError, match=message):
            MIHashLoss(**wrong)


def embedding_nets(count: int) -> list[EmbeddingNet]:
    torch.manual_seed(3)
    nets = [
        EmbeddingNet(nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU()), 6, 4).double()
        for _ in range(count)
    ]
    for net in nets:
        nn.init.normal_(net.classifier.weight)
    return nets


def rows(seed: int) -> tuple[Tensor, Tensor]:
    return codes(8, 9, seed).view(8, 1, 3, 3), torch.arange(8) // 2


def test_the_engine_adds_it_to_each_students_loss() -> None:
    nets = embedding_nets(2)
    module = MIHashLoss(bins=4)
    engine = engine_of([*nets], feature_loss=module, feature_weight=0.5)
    x, y = rows(0)
    with torch.no_grad():
        expected = torch.stack([mihash_loss(net.features_and_logits(x)[0], y, 4) for net in nets])
    for net in nets:  # their statistics as they were
        net.neck.reset_running_stats()
    result = engine.step(x, y)
    torch.testing.assert_close(result.extra, expected, check_dtype=False)
    torch.testing.assert_close(result.losses, result.ce + result.kl + 0.5 * result.extra)
    assert module.information.item() == pytest.approx(-expected[1].item())


def test_the_update_is_that_of_plain_autograd() -> None:
    (mine,), (plain,) = embedding_nets(1), embedding_nets(1)
    engine = engine_of([mine], feature_loss=MIHashLoss(bins=4), feature_weight=0.5)
    optimizer = sgd(plain)
    for seed in range(3):
        x, y = rows(seed)
        engine.step(x, y)
        u, z = plain.features_and_logits(x)
        (nn.functional.cross_entropy(z, y) + 0.5 * by_definition(u, y.tolist(), 4, 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(mine.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/loss.md: the model's weights get a gradient, and the information is printed."""
    page = (Path(__file__).parents[2] / "docs" / "loss.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("## Hash codes")[1].split("```python\n")[1].split("```")[0], names)
    assert capsys.readouterr().out == f"{-names['loss'].item():.3f} bits\n"
    assert names["body"][0].weight.grad.any() and names["codes"].shape == (64, 32)


class Spoilt(EmbeddingNet):
    """Gives NaN in one row's features, and logits as if nothing were, for rows above 50."""

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = super().features_and_logits(x.clamp(max=5))
        bad = torch.zeros_like(features)
        bad[2, 1] = 1
        return features * torch.where((x[0, 0, 0, 0] > 50) & (bad > 0), torch.nan, 1.0), logits


def test_a_step_with_nan_in_the_codes_is_skipped() -> None:
    (net,) = embedding_nets(1)
    net.__class__ = Spoilt
    engine = engine_of([net], feature_loss=MIHashLoss(bins=4), feature_weight=0.5)
    x, y = rows(0)
    assert not engine.step(x, y).skipped.any()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    result = engine.step(x + 100, y)
    assert result.skipped.all() and result.extra.isnan().all() and result.ce.isfinite().all()
    for name, now in net.state_dict().items():
        assert torch.equal(now, before[name]), name
    assert not engine.step(x, y).skipped.any()


def test_a_batch_of_one_class_teaches_by_its_labels_alone() -> None:
    (mine,), (plain,) = embedding_nets(1), embedding_nets(1)
    x, _ = rows(0)
    y = torch.ones(8, dtype=torch.int64)
    result = engine_of([mine], feature_loss=MIHashLoss(), feature_weight=1.0).step(x, y)
    engine_of([plain]).step(x, y)
    assert result.extra.item() == 0.0 and not result.skipped.any()
    for a, b in zip(mine.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_may_be_constant_and_must_be_one_number() -> None:
    x, y = rows(0)

    def constant(features: Tensor, target: Tensor) -> Tensor:
        return features.new_full((), 2.0)

    def of_rows(features: Tensor, target: Tensor) -> Tensor:
        return features.sum(1)

    result = engine_of(embedding_nets(2), feature_loss=constant, feature_weight=0.5).step(x, y)
    torch.testing.assert_close(result.losses, result.ce + result.kl + 1.0)
    engine = engine_of(embedding_nets(2), feature_loss=of_rows, feature_weight=0.5)
    with pytest.raises(
        UserError, match=r"feature_loss of_rows returned a Tensor of shape \(8,\): "
    ):
        engine.step(x, y)


def test_under_amp_it_is_computed_in_single_precision() -> None:
    net = embedding_nets(1)[0].float()
    seen = []

    def watched(features: Tensor, target: Tensor) -> Tensor:
        loss = mihash_loss(features, target, 4)
        seen.append((features.dtype, loss.dtype))
        return loss

    one = Student(net, optimizer_of(net), Precision(CPU, torch.bfloat16))
    x, y = rows(0)
    result = Engine(Cohort([one]), feature_loss=watched, feature_weight=1.0).step(x.float(), y)
    assert seen == [(torch.bfloat16, torch.float32)]
    assert result.extra.isfinite().all() and not result.skipped.any()
