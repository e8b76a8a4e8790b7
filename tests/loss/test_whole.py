"""Rows that are a part of a larger batch: their losses and gradients add up to the batch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import mutual_loss_and_grad

MISSING = torch.tensor([0, 3, -100, 1, 2, -100, -100, -100])
WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 0.1, 7.0])
SHARES = torch.linspace(-1, 2, 40).reshape(8, 5).softmax(1)
LABELS = (SHARES > 0.2).float()
CASES: dict[str, tuple[Tensor, Any, dict[str, Any]]] = {
    "rows without a label": (MISSING, torch.tensor(4), {"temperature": 2.0}),
    "as numbers": (MISSING, 4, {"label_smoothing": 0.1}),
    "no label": (torch.full((8,), -100), torch.tensor(0), {}),
    "class weights": (MISSING, WEIGHTS[:4].sum(), {"class_weight": WEIGHTS}),
    "probabilities": (SHARES, 8, {"class_weight": WEIGHTS}),
    "rows that weigh": (MISSING, torch.tensor(4), {"row_weight": torch.arange(8.0)}),
    "several labels": (LABELS, 8, {"distribution": "bernoulli"}),
}


@pytest.fixture(params=["closed_form", "native", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    answered: Any = nullcontext()
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
        from kernel_cases import answer_with

        answered = answer_with("one_pass")
    with answered:
        yield request.param


@pytest.mark.parametrize(("target", "labels", "options"), CASES.values(), ids=CASES.keys())
def test_parts_add_up(target: Tensor, labels: Any, options: dict[str, Any], backend: str) -> None:
    if backend == "triton" and "distribution" in options:
        pytest.skip("the kernels have no Bernoulli divergence")
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(8, 5, generator=g) for _ in range(3)]
    losses, grads, stats = mutual_loss_and_grad(logits, target, backend=backend, **options)
    parts = []
    for rows in (slice(0, 5), slice(5, 8)):
        own = {k: v[rows] if k == "row_weight" else v for k, v in options.items()}
        part = [z[rows] for z in logits]
        parts.append(
            mutual_loss_and_grad(part, target[rows], backend=backend, whole=(labels, 8), **own)
        )
    (first, a, one), (second, b, two) = parts
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(first + second, losses, **close)
    torch.testing.assert_close(one.ce + two.ce, stats.ce, **close)
    torch.testing.assert_close(one.kl + two.kl, stats.kl, **close)
    for upper, lower, whole in zip(a, b, grads, strict=True):
        torch.testing.assert_close(torch.cat([upper, lower]), whole, **close)


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        (4, "whole is 4: pass the labels and the rows of the larger batch"),
        ((4, 2), "whole has 2 rows and the logits 3: it is the larger batch that counts"),
        ((torch.ones(2), 8), r"whole has labels of shape \(2,\): pass a number or a 0-d tensor"),
    ],
)
def test_denominators_that_cannot_be(whole: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        mutual_loss_and_grad([torch.zeros(3, 5)] * 2, torch.zeros(3).long(), whole=whole)
