"""Accuracy on a validation set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dml_fast.data.loaders.assemble import Batch
from dml_fast.engine.precision import Precision
from dml_fast.eval.classification import evaluate


class Fixed(nn.Module):
    """Answers with given logits for the image whose pixel is the row's number."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.logits[x[:, 0].long()]  # type: ignore[index]


def test_accuracy_counts_every_image_once_and_averages_probabilities() -> None:
    # image 0: both right; image 1: each unsure, together right; image 2: one right, one very wrong
    a = Fixed([[9, 0, 0], [1, 1.1, 0], [0, 2, 1]])
    b = Fixed([[9, 0, 0], [0, 1.1, 1.2], [9, 0, 0]])
    target = torch.tensor([0, 1, 1])
    batches = [
        Batch(torch.tensor([[0.0], [1.0]]), target[:2], torch.arange(2)),
        Batch(torch.tensor([[2.0]]), target[2:], torch.tensor([2])),
    ]
    a.train()
    b.eval()
    accuracy = evaluate([a, b], batches, Precision(torch.device("cpu")))
    assert accuracy.students == pytest.approx((1.0, 1 / 3))
    assert accuracy.ensemble == pytest.approx(2 / 3)
    assert accuracy.images == 3
    assert a.training
    assert not b.training
