"""Runs on rows with several labels: scores, evaluation, predictions, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import json_of, refusal_of
from several_cases import digits_side_by_side
from torch import Tensor, nn

from dml_fast.config import TrainConfig
from dml_fast.data.loaders.assemble import Batch
from dml_fast.engine.precision import Precision
from dml_fast.errors import UserError
from dml_fast.eval.several_labels import average_precisions, evaluate_labels
from dml_fast.evaluate import main as evaluate
from dml_fast.export import main as export_main
from dml_fast.models.ensemble import EnsembleNet
from dml_fast.predict import main as predict
from dml_fast.report import main as report
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.folder import Run
from dml_fast.runs.history import best_epoch
from dml_fast.runs.weights import load_student
from dml_fast.select import main as select_main
from dml_fast.train import main as train

CPU = torch.device("cpu")


def precision_at_each_hit(scores: list[float], labels: list[int]) -> float:
    """The definition: at each threshold, the precision times what the recall rises by."""
    total, before, found = sum(labels), 0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        found += (sum(taken) - before) / total * sum(taken) / len(taken)
        before = sum(taken)
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_the_definition(ties: bool) -> None:
    rng = np.random.default_rng(int(ties))
    scores = rng.normal(size=(40, 6))
    labels = (rng.random((40, 6)) < 0.3).astype(np.int64)
    labels[:, 4] = 0
    if ties:
        scores = scores.round(0)
    found = average_precisions(scores, labels)
    for c in range(6):
        if c == 4:
            assert math.isnan(found[c])
            continue
        expected = precision_at_each_hit(scores[:, c].tolist(), labels[:, c].tolist())
        assert found[c] == pytest.approx(expected)


@pytest.mark.slow
def test_average_precision_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(200, 5)).round(1), rng.random((200, 5)) < 0.2
    expected = metrics.average_precision_score(labels, scores, average=None)
    np.testing.assert_allclose(average_precisions(scores, labels), expected)


class Says(nn.Module):
    """Answers with given logits, by the row that stands in the input."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0].long()]


def test_students_and_the_mean_of_their_probabilities_are_scored() -> None:
    torch.manual_seed(0)
    logits = [40 * torch.randn(10, 3), torch.randn(10, 3)]  # sigmoids of the first are 1 in fp32
    target = (torch.rand(10, 3) < 0.5).float()
    target[:, 2] = 0
    rows = torch.arange(10.0)[:, None]
    batches = [Batch(rows[i : i + 4], target[i : i + 4], rows[i : i + 4, 0]) for i in (0, 4, 8)]
    found = evaluate_labels([Says(z) for z in logits], batches, Precision(CPU), 3)
    mean = torch.stack([z.double().sigmoid() for z in logits]).mean(0)
    for scores, numbers, cut in (
        *zip(found.students, logits, (0, 0), strict=True),
        (found.ensemble, mean, 0.5),
    ):
        expected = [
            precision_at_each_hit(numbers[:, c].tolist(), target[:, c].int().tolist())
            for c in (0, 1)
        ]
        assert scores.ap[:2] == pytest.approx(expected)
        assert scores.ap[2] is None
        assert scores.mAP == pytest.approx(sum(expected) / 2)
        assert scores.exact == ((numbers > cut) == (target > 0)).all(1).double().mean()
    assert found.absent == (2,)
    assert found.images == 10
    logits[1][3, 0] = math.nan
    found = evaluate_labels([Says(z) for z in logits], batches, Precision(CPU), 3)
    assert found.students[0].mAP is not None
    assert found.students[1].mAP is None
    assert found.ensemble.mAP is None


def test_the_exported_ensemble_is_the_mean_of_sigmoids() -> None:
    logits = [torch.randn(4, 3), torch.randn(4, 3)]
    net = EnsembleNet([Says(z) for z in logits], [0, 0], "labels")
    expected = torch.stack([z.sigmoid() for z in logits]).mean(0)
    torch.testing.assert_close(net(torch.arange(4.0)[:, None]), expected)


# ------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_side_by_side(tmp_path_factory.mktemp("labels") / "digits")


OPTIONS = ("--cohort", "2", "--arch", "resnet8", "--batch-size", "32", "--executor", "sequential",
           "--device", "cpu", "--lr", "1")  # fmt: skip


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    assert train(["--data", f"folder:{root}", "--epochs", "3", "--out", str(path), *OPTIONS]) == 0
    return path


@pytest.mark.slow
def test_a_run_is_judged_by_the_mean_average_precision(
    run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Run(run).metrics()
    assert Run(run).facts.several_labels
    means = [np.mean([s["val_mAP"] for s in line["students"]]) for line in lines]
    assert best_epoch(lines) == 1 + int(np.argmax(means))
    assert 0.1 < lines[-1]["ensemble_val_mAP"] < 1
    best = lines[best_epoch(lines) - 1]
    capsys.readouterr()
    found = json_of(evaluate, capsys, run, "--split", "val", "--device", "cpu")
    assert found["ensemble_mAP"] == pytest.approx(best["ensemble_val_mAP"])
    for mine, theirs in zip(found["students"], best["students"], strict=True):
        assert mine["mAP"] == pytest.approx(theirs["val_mAP"])
        assert mine["val_mAP"] == theirs["val_mAP"]
        assert list(mine["average_precision"]) == [f"has {d}" for d in range(10)]
    assert evaluate([str(run), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "all labels right" in table
    assert "60 images of the test split" in table
    assert report([str(run)]) == 0
    assert "Shares are the mAP of classes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("student", ["1", "ensemble"])
def test_predictions_are_all_probabilities_and_give_the_evaluations_score(
    student: str, run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, lines = tmp_path / "p.csv", tmp_path / "p.jsonl"
    for out in (table, lines):
        arguments = [str(run), str(root / "test"), "--student", student, "--device", "cpu"]
        assert predict([*arguments, "--out", str(out)]) == 0
    with table.open() as file:
        header, *rows = csv.reader(file)
    assert header == ["path", *(f"has {d}" for d in range(10))]
    first = json.loads(lines.read_text().splitlines()[0])
    assert first["classes"] == header[1:]
    assert first["probabilities"] == [float(cell) for cell in rows[0][1:]]
    with (root / "labels.csv").open() as file:
        truth = {name: cells for name, *cells in csv.reader(file)}
    labels = np.array([truth[Path(r[0]).relative_to(root).as_posix()] for r in rows]).astype(int)
    scores = np.array([r[1:] for r in rows]).astype(float)
    capsys.readouterr()
    found = json_of(evaluate, capsys, run, "--device", "cpu")
    expected = found["ensemble_mAP"] if student == "ensemble" else found["students"][1]["mAP"]
    assert np.nanmean(average_precisions(scores, labels)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_commands_that_need_one_class_say_so(
    run: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, arguments, words in (
        (predict, (run, root / "test", "--top", "3", "--out", tmp_path / "p.csv"), "--top is 3"),
        (evaluate, (run, "--hamming"), "head of kind linear"),
        (evaluate, (run, "--data", "digits"), "has classes and the run's students learned several"),
        (select_main, (run, "--out", tmp_path / "s.tsv"), "learned several labels for a row"),
    ):
        assert words in refusal_of(main, capsys, *arguments)


@pytest.mark.slow
def test_a_student_and_the_ensemble_are_exported(run: Path, tmp_path: Path) -> None:
    for student in ("0", "ensemble"):
        out = tmp_path / f"{student}.safetensors"
        assert export_main([str(run), "--student", student, "--out", str(out)]) == 0
    model, facts = load_student(tmp_path / "0.safetensors")
    assert facts["task"] == "labels"
    assert model(torch.zeros(1, 3, 8, 16)).shape == (1, 10)


# ------------------------------------------------------------ what is refused at once


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior": "balance"}, "--prior means nothing with"),
        ({"small_loss": 0.2}, "--small-loss means nothing with"),
        ({"label_noise": 0.2}, "--label-noise means nothing with"),
        ({"labels": "some.tsv"}, "--labels means nothing with"),
        ({"labels_per_class": 3}, "--labels-per-class means nothing with"),
        ({"unlabelled_share": 0.5}, "--unlabelled-share means nothing with"),
        ({"class_weights": "auto"}, "--class-weights means nothing with"),
        ({"balance": True}, "--balance means nothing with"),
        ({"head": "hash"}, "--head hash compares rows by their one class"),
        ({"head": "bnneck"}, "--head bnneck compares rows by their one class"),
    ],
)
def test_options_about_one_class_are_refused(
    options: dict[str, Any], words: str, root: Path
) -> None:
    config = TrainConfig(data=f"folder:{root}", arch="resnet8", **options)
    with pytest.raises(UserError, match=words) as error:
        config.check()
    assert "several labels" in str(error.value)
    TrainConfig(data=f"folder:{root}", arch="resnet8", unlabelled_share=0.0).check()


def test_facts_say_that_rows_have_several_labels() -> None:
    facts = {
        "name": "x",
        "num_classes": 2,
        "classes": ["a", "b"],
        "in_channels": 3,
        "image_size": [8, 8],
        "mean": [0.5, 0.5, 0.5],
        "std": [1.0, 1.0, 1.0],
        "fingerprint": "0",
        "task": "labels",
    }
    found = DataFacts.from_json(json.loads(json.dumps(facts)), "it")
    assert (found.several_labels, found.retrieval, found.head.kind) == (True, False, "linear")
    assert DataFacts.from_json(json.loads(json.dumps(found.to_json())), "it") == found
    assert found.answer == "labels"
