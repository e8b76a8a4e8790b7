"""Class weights multiply the cross-entropy as torch's do, and nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CPU, assert_same, batch, engine_of, networks, sgd, student
from fake_streams import FakeStreams

from dml_fast.engine import Cohort, Engine, Graph, Sequential, Streams, Threads
from dml_fast.engine.class_weight import balanced_weights
from dml_fast.engine.executor import Executor
from dml_fast.errors import UserError

WEIGHTS = torch.tensor([2.0, 0.0, 0.5, 1.0, 30.0])


def test_balanced_weights_give_all_classes_the_same_sum() -> None:
    counts = [1, 50, 9, 40]
    weights = balanced_weights(counts)
    torch.testing.assert_close(weights * torch.tensor(counts), torch.full((4,), 25.0))
    assert balanced_weights([6, 0])[1] == 3  # as if it had one row


@pytest.mark.parametrize("soft", [False, True])
def test_updates_are_those_of_torchs_weighted_cross_entropy(soft: bool) -> None:
    mine = networks(2)
    theirs = copy.deepcopy(mine)
    engine = engine_of(mine, class_weight=WEIGHTS, kl_weight=0.7)
    x, y = batch(0)
    y[2] = -100
    target = F.one_hot(y.clamp(min=0), 5).double().mul(0.8).add(0.04) if soft else y
    result = engine.step(x, target)
    logits = [model(x) for model in theirs]
    for k, model in enumerate(theirs):
        peer = logits[1 - k].detach().softmax(1)
        ce = F.cross_entropy(logits[k], target, WEIGHTS.double())
        kl = F.kl_div(logits[k].log_softmax(1), peer, reduction="batchmean")
        torch.testing.assert_close(result.ce[k], ce.detach())
        optimizer = sgd(model)
        (ce + 0.7 * kl).backward()
        optimizer.step()
        assert_same(mine[k], model, 1e-9)


@pytest.mark.parametrize("kind", [Threads, Streams, Graph])
def test_every_executor_weighs(kind: type[Executor]) -> None:
    found = []
    for executor in (Sequential, kind):
        made = Cohort([student(model) for model in networks(2, torch.float32)])
        chosen = (
            Threads(2, workers=2, threads_each=1)
            if executor is Threads
            else executor(*() if executor is Sequential else (CPU, FakeStreams(made)))
        )
        engine = Engine(made, class_weight=WEIGHTS, executor=chosen)
        for seed in range(3):
            x, y = batch(seed, torch.float32)
            y[seed] = -100
            result = engine.step(x, y)
        found.append([result.losses, *(t for one in made for t in one.model.state_dict().values())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


def test_weights_of_one_are_none() -> None:
    mine, theirs = networks(2, torch.float32), networks(2, torch.float32)
    a, b = engine_of(mine, class_weight=torch.ones(5)), engine_of(theirs)
    for seed in range(2):
        x, y = batch(seed, torch.float32)
        assert torch.equal(a.step(x, y).losses, b.step(x, y).losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weight": [1.0] * 5}, "class_weight is "),
        ({"class_weight": torch.ones(1, 5)}, "class_weight is a Tensor of shape"),
        ({"class_weight": torch.tensor([1.0, math.inf])}, "not finite"),
        ({"class_weight": torch.tensor([1.0, -1.0])}, "negative"),
        ({"class_weight": torch.zeros(5)}, "zeros alone"),
        ({"class_weight": WEIGHTS, "small_loss": 0.1}, "small_loss is 0.1 and compares losses"),
    ],
)
def test_what_are_no_weights_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(networks(2), **options)


def test_weights_of_other_classes_are_refused() -> None:
    engine = engine_of(networks(2), class_weight=torch.ones(4))
    with pytest.raises(UserError, match=r"class_weight has shape \(4,\): it must be \(5,\)"):
        engine.step(*batch(0))
