"""Logit adjustment: the prior enters every loss, and no evaluation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, assert_same, batch, engine_of, networks, sgd, student
from torch import Tensor, nn

from dml_fast.engine import Engine
from dml_fast.engine.cohort import Cohort
from dml_fast.engine.precision import Precision
from dml_fast.engine.prior import log_prior
from dml_fast.errors import UserError

PRIOR = log_prior([50, 30, 10, 9, 1])


class Adjusted(nn.Module):
    """A network whose logits have the prior in them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x) + PRIOR
        return out


def test_the_prior_is_the_logarithm_of_shares_and_never_infinite() -> None:
    shares = log_prior([6, 2, 0]).exp()
    torch.testing.assert_close(shares, torch.tensor([6 / 9, 2 / 9, 1 / 9]))


def test_gradients_are_those_of_autograd_through_the_adjusted_logits() -> None:
    mine = networks(2)
    theirs = copy.deepcopy(mine)
    engine = engine_of(mine, prior=PRIOR, kl_weight=0.7, temperature=2.0)
    x, y = batch(0)
    result = engine.step(x, y)
    logits = [m(x) + PRIOR.double() for m in theirs]
    for k, model in enumerate(theirs):
        own, peer = logits[k], logits[1 - k].detach()
        kl = 4 * F.kl_div((own / 2).log_softmax(1), (peer / 2).softmax(1), reduction="batchmean")
        loss = F.cross_entropy(own, y) + 0.7 * kl
        torch.testing.assert_close(result.losses[k], loss.detach())
        optimizer = sgd(model)
        loss.backward()
        optimizer.step()
        assert_same(mine[k], model, 1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"update": "alternating"}, {"small_loss": 0.34}, {"method": "independent"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_is_that_of_networks_with_adjusted_logits(
    options: dict[str, Any], dtype: torch.dtype | None
) -> None:
    mine = networks(3, torch.float32)
    theirs = copy.deepcopy(mine)
    precision = Precision(CPU, dtype)
    adjusted = Engine(Cohort([student(Adjusted(m), precision) for m in theirs]), **options)
    engine = Engine(Cohort([student(m, precision) for m in mine]), prior=PRIOR, **options)
    for seed in range(3):
        x, y = batch(seed, torch.float32)
        a, b = engine.step(x, y), adjusted.step(x, y)
        assert torch.equal(a.losses, b.losses)
    for one, other in zip(mine, theirs, strict=True):
        assert_same(one, other)


def test_the_teacher_is_adjusted_too() -> None:
    mine = networks(2)
    theirs = copy.deepcopy(mine)
    roles = {"learners": (1,), "teacher": 0}
    a = engine_of(mine, method="distill", prior=PRIOR).step(*batch(0), **roles)
    wrapped = [Adjusted(m) for m in theirs]
    b = engine_of(wrapped, method="distill").step(*batch(0), **roles)
    torch.testing.assert_close(a.losses, b.losses)
    assert_same(mine[1], theirs[1], 1e-9)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5], r"prior is a list|prior is \[0\.5"),
        (torch.zeros(2, 5), "prior is a Tensor of shape"),
        (torch.tensor([0.0, -math.inf]), "not finite"),
    ],
)
def test_what_is_no_prior_is_refused(prior: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(networks(2), prior=prior)


def test_a_prior_of_other_classes_is_refused() -> None:
    engine = engine_of(networks(2), prior=torch.zeros(4))
    with pytest.raises(UserError, match="prior has 4 classes and the logits 5"):
        engine.step(*batch(0))
