"""Accuracy, macro-F1 and recall on a set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dml_fast.data.loaders.assemble import Batch
from dml_fast.distributed.world import World
from dml_fast.engine.precision import Precision
from dml_fast.eval.classification import ClassScores, evaluate


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
    found = evaluate([a, b], batches, Precision(torch.device("cpu")), 3)
    assert [s.accuracy for s in found.students] == pytest.approx((1.0, 1 / 3))
    assert found.ensemble.accuracy == pytest.approx(2 / 3)
    assert found.images == 3
    assert a.training
    assert not b.training


class Columns(World):
    """One process that counts as the sum of two columns, of which the test gives the other's."""

    other: torch.Tensor | None = None

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.other is None:
            self.other = tensor.clone()
            return tensor
        return tensor + self.other


@pytest.mark.parametrize("seed", range(3))
def test_f1_and_recall_are_those_of_scikit_learn(seed: int) -> None:
    """Class 5 never occurs, class 4 is only predicted; some rows have no label."""
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(seed)
    rows, classes = 60, 6
    logits = torch.randn(2, rows, classes, generator=g)
    logits[..., 5] = -9
    target = torch.randint(4, (rows,), generator=g)
    target[torch.randperm(rows, generator=g)[:20]] = -100
    models = [Fixed(z.tolist()) for z in logits]
    ids = torch.arange(rows)
    parts = [slice(0, 0), slice(0, 7), slice(7, 30), slice(30, rows)]
    batches = [Batch(ids[p, None].float(), target[p], ids[p]) for p in parts]
    cpu, world = Precision(torch.device("cpu")), Columns.alone(2)
    evaluate(models, batches[:2], cpu, classes, world)  # the first column
    found = evaluate(models, batches[2:], cpu, classes, world)
    known = target >= 0
    answers = [*logits.argmax(-1), logits.softmax(-1).mean(0).argmax(-1)]
    assert found.images == known.sum() == 40
    for scores, answer in zip([*found.students, found.ensemble], answers, strict=True):
        y, guess = target[known].numpy(), answer[known].numpy()
        assert 4 in guess
        assert scores.accuracy == pytest.approx((y == guess).mean())
        assert scores.f1 == pytest.approx(metrics.f1_score(y, guess, average="macro"))
        expected = metrics.recall_score(y, guess, labels=range(4), average=None)
        assert scores.recall[:4] == pytest.approx(expected)
        assert scores.recall[4:] == (None, None)


def test_a_set_without_labels_has_the_scores_0() -> None:
    batch = Batch(torch.zeros(2, 1), torch.tensor([-100, -100]), torch.arange(2))
    found = evaluate([Fixed([[1.0, 2.0]])], [batch], Precision(torch.device("cpu")), 2)
    assert (found.images, found.ensemble) == (0, ClassScores(0.0, 0.0, (None, None)))


@pytest.mark.parametrize("seed", range(3))
def test_calibration_and_confusions_are_those_of_their_definitions(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(seed)
    rows, classes = 300, 4
    logits = 2 * torch.randn(2, rows, classes, generator=g)
    target = torch.randint(classes, (rows,), generator=g)
    target[:20] = -100
    ids = torch.arange(rows)
    batches = [Batch(ids[p, None].float(), target[p], ids[p]) for p in (ids[:90], ids[90:])]
    models = [Fixed(z.tolist()) for z in logits]
    found = evaluate(models, batches, Precision(torch.device("cpu")), classes, detailed=True)
    known = target >= 0
    y = target[known].numpy()
    shares = [*logits.softmax(-1), logits.softmax(-1).mean(0)]
    for scores, p in zip([*found.students, found.ensemble], shares, strict=True):
        q = p[known].double().numpy()
        q /= q.sum(1, keepdims=True)
        assert scores.calibration is not None
        assert scores.calibration.nll == pytest.approx(metrics.log_loss(y, q), rel=1e-5)
        brier = ((q - np.eye(classes)[y]) ** 2).sum(1).mean()
        assert scores.calibration.brier == pytest.approx(brier, rel=1e-5)
        top, right = q.max(1), q.argmax(1) == y
        ece = 0.0
        for low in range(15):
            here = (top > low / 15) & (top <= (low + 1) / 15)
            if here.any():
                ece += here.mean() * abs(top[here].mean() - right[here].mean())
        assert scores.calibration.ece == pytest.approx(ece, rel=1e-5)
    matrix = metrics.confusion_matrix(y, shares[-1][known].argmax(-1).numpy())
    np.fill_diagonal(matrix, 0)
    worst = found.confusions(3)
    assert [count for *_, count in worst] == sorted(matrix.ravel())[::-1][:3]
    assert all(matrix[one, other] == count for one, other, count in worst)
    assert len(found.confusions(100)) == (matrix > 0).sum()
    assert found.answers is not None
    assert found.answers.shape == (3, rows)


def test_the_ends_of_the_bins_and_a_label_of_probability_0() -> None:
    sure = Fixed([[200.0, 0.0], [0.0, 0.0]])
    batch = Batch(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0]), torch.arange(2))
    cpu = Precision(torch.device("cpu"))
    calibration = evaluate([sure], [batch], cpu, 2, detailed=True).students[0].calibration
    assert calibration is not None
    assert calibration.ece == pytest.approx(0.25)
    wrong = batch._replace(target=torch.tensor([1, 0]))
    worst = evaluate([sure], [wrong], cpu, 2, detailed=True)
    assert worst.students[0].calibration is not None
    assert worst.students[0].calibration.nll == pytest.approx((200 + np.log(2)) / 2, rel=1e-5)
    assert worst.ensemble.calibration is not None
    assert worst.ensemble.calibration.nll == np.inf
