"""Labels that do not exclude each other: steps equal a plain loop, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_cases import assert_same, batch, engine_of, networks, sgd
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

from dml_fast.errors import UserError

LABELS = (torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.4).double()


def divergence(z: Tensor, peer: Tensor, temperature: float) -> Tensor:
    one, own = (Bernoulli(logits=x / temperature) for x in (peer.detach(), z))
    return temperature**2 * kl_divergence(one, own).mean()


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (3.0, 0.2)])
def test_a_step_is_that_of_a_plain_loop(temperature: float, smoothing: float) -> None:
    mine = networks(3)
    theirs = copy.deepcopy(mine)
    engine = engine_of(
        mine,
        distribution="bernoulli",
        temperature=temperature,
        label_smoothing=smoothing,
        kl_weight=0.5,
    )
    optimizers = [sgd(model) for model in theirs]
    entropy = nn.BCEWithLogitsLoss()
    for seed in range(3):
        x, _ = batch(seed)
        result = engine.step(x, LABELS)
        logits = [model(x) for model in theirs]
        for k, (z, optimizer) in enumerate(zip(logits, optimizers, strict=True)):
            peers = [divergence(z, p, temperature) for j, p in enumerate(logits) if j != k]
            ce = entropy(z, LABELS * (1 - smoothing) + smoothing / 2)
            loss = ce + 0.5 * torch.stack(peers).mean()
            torch.testing.assert_close(result.losses[k], loss.detach())
            right = ((z > 0) == (LABELS > 0)).all(1).sum()
            assert result.correct[k] == right
            optimizer.zero_grad()
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert result.labelled.tolist() == [6, 6, 6]
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b, 1e-9)


def test_parts_of_a_batch_and_labels_as_whole_numbers_give_the_same() -> None:
    whole, parts = networks(2), networks(2)
    for model in [*whole, *parts]:  # no batch statistics, which differ by part
        model.eval()
    x, _ = batch(0)
    a = engine_of(whole, distribution="bernoulli").step(x, LABELS)
    b = engine_of(parts, distribution="bernoulli", parts=3).step(x, LABELS.long())
    torch.testing.assert_close(b.losses, a.losses)
    assert b.labelled.tolist() == [6, 6]
    assert torch.equal(a.correct, b.correct)
    for one, other in zip(whole, parts, strict=True):
        assert_same(one, other, 1e-6)


def test_dml_e_reports_the_divergence_from_the_mean_of_the_peers() -> None:
    mine = networks(3)
    x, _ = batch(0)
    with torch.no_grad():
        logits = [m(x) for m in copy.deepcopy(mine)]
    found = engine_of(mine, method="dml_e", distribution="bernoulli").step(x, LABELS)
    for k, own in enumerate(logits):
        peers = torch.stack([z.sigmoid() for j, z in enumerate(logits) if j != k]).mean(0)
        expected = kl_divergence(Bernoulli(peers), Bernoulli(logits=own)).mean()
        torch.testing.assert_close(found.kl[k], expected)


def test_a_teacher_alone_teaches_when_distilling() -> None:
    mine = networks(3)
    x, _ = batch(0)
    taught = copy.deepcopy(mine)
    engine = engine_of(mine, method="distill", distribution="bernoulli")
    found = engine.step(x, LABELS, learners=(1, 2), teacher=0)
    teacher = taught[0].eval()(x)
    expected = divergence(taught[1](x), teacher, 1.0)
    torch.testing.assert_close(found.kl[0], expected.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "multilabel"}, "distribution is 'multilabel'"),
        ({"prior": torch.zeros(5)}, "prior is for rows of one class"),
        ({"class_weight": torch.ones(5)}, "class_weight is for rows of one class"),
        ({"small_loss": 0.2}, "small_loss is for rows of one class"),
    ],
)
def test_what_needs_one_class_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(networks(2), **({"distribution": "bernoulli"} | options))
    with pytest.raises(UserError, match=r"target of labels has shape \(6,\)"):
        engine_of(networks(2), distribution="bernoulli").step(*batch(0))
