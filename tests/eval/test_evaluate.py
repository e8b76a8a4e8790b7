"""``python -m dml_fast.evaluate`` against an evaluation in numpy that shares no code with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import json_of, refusal_of
from run_cases import reconfigure

from dml_fast.data import DataSet, ImageSet, open_dataset
from dml_fast.errors import UserError
from dml_fast.eval.of_run import evaluate_run
from dml_fast.evaluate import main
from dml_fast.runs import trained
from dml_fast.runs.weights import load_student
from dml_fast.train import main as train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed cohort after two short epochs."""
    path = tmp_path_factory.mktemp("evaluate") / "run"
    options = "--arch resnet8,resnet14 --epochs 2 --train-fraction 0.2"
    assert train([*options.split(), "--device", "cpu", "--out", str(path)]) == 0
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same run, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "run"))


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return json_of(main, capsys, *arguments, "--device", "cpu")


refusal = partial(refusal_of, main)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def expected(folder: Path, images: ImageSet) -> list[float]:
    """Accuracies of the final students and their ensemble, from their safetensors files."""
    probabilities = []
    for path in sorted(folder.glob("student_?.safetensors")):
        model, facts = load_student(path)
        mean, std = (np.reshape(facts[key], (1, -1, 1, 1)) for key in ("mean", "std"))
        inputs = torch.from_numpy(((images.images / 255 - mean) / std).astype(np.float32))
        with torch.no_grad():
            logits = model(inputs).numpy().astype(np.float64)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        probabilities.append(powers / powers.sum(1, keepdims=True))
    scores = [*probabilities, np.mean(probabilities, axis=0)]
    return [float(np.mean(s.argmax(1) == images.labels)) for s in scores]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "train"])
def test_accuracies_are_those_of_an_independent_evaluation(
    folder: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_dataset("digits", val_fraction=0.1, train_fraction=0.2, seed=0)
    images: ImageSet = getattr(data, split)
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["val_fraction"], config["seed"]) == (0.1, 0)
    result = as_json(
        capsys, folder, "--split", split, "--checkpoint", "last", "--batch-size", "100"
    )
    found = [s["accuracy"] for s in result["students"]] + [result["ensemble_accuracy"]]
    # one image may fall on the other side of a rounding
    np.testing.assert_allclose(found, expected(folder, images), atol=1.01 / len(images))
    assert result["images"] == len(images) and result["split"] == split
    assert [s["arch"] for s in result["students"]] == ["resnet8", "resnet14"]
    assert [s["parameters"] for s in result["students"]] == [
        sum(p.numel() for p in load_student(folder / f"student_{k}.safetensors")[0].parameters())
        for k in range(2)
    ]


def test_the_best_checkpoint_gives_the_validation_accuracies_of_its_epoch(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = as_json(capsys, folder, "--split", "val")
    line = max(metrics(folder), key=lambda row: sum(s["val_acc"] for s in row["students"]))
    recorded = [s["val_acc"] for s in line["students"]]
    assert result["epoch"] == line["epoch"] and result["checkpoint"] == "best"
    assert [s["accuracy"] for s in result["students"]] == recorded
    assert [s["val_acc"] for s in result["students"]] == recorded
    assert result["ensemble_accuracy"] == line["ensemble_val_acc"]
    assert [s["f1"] for s in result["students"]] == [s["val_f1"] for s in line["students"]]
    assert result["ensemble_f1"] == line["ensemble_val_f1"] > 0
    assert list(result["ensemble_recall"]) == [str(digit) for digit in range(10)]
    assert recorded[result["best_student"]] == max(recorded)


def test_the_table_marks_the_best_student(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = as_json(capsys, folder)
    assert main([str(folder), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for k, student in enumerate(result["students"]):
        [row] = [line for line in lines if student["arch"] in line]
        assert ("*" in row) == (k == result["best_student"])
        assert f"{100 * student['accuracy']:.2f}" in row
        assert f"{100 * student['f1']:.2f}" in row
    [ensemble] = [line for line in lines if "ensemble" in line]
    assert f"{100 * result['ensemble_accuracy']:.2f}" in ensemble
    assert "359 images of the test split of digits" in "\n".join(lines)


Change = Callable[[DataSet], DataSet]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Make the data other than the run's."""

    def put(change: Change) -> None:
        monkeypatch.setattr(
            trained, "open_dataset", lambda spec, **options: change(open_dataset(spec, **options))
        )

    return put


def test_without_a_test_split_another_must_be_named(
    folder: Path, opened: Callable[[Change], None], capsys: pytest.CaptureFixture[str]
) -> None:
    opened(lambda data: replace(data, test=None))
    assert "digits has no test split: give --split val" in refusal(capsys, folder)
    assert as_json(capsys, folder, "--split", "val")["images"] > 0


def _pixels(change: Callable[[Any], Any]) -> Change:
    return lambda data: replace(data, train=ImageSet(change(data.train.images), data.train.labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: replace(data, classes=data.classes[:9]), "has 9 classes .* know 10"),
        (
            lambda data: replace(data, classes=(*data.classes[:9], "ten")),
            "class 9 'ten' and the run calls it '9'",
        ),
        (_pixels(lambda x: np.repeat(x, 3, axis=1)), "3 channels .* take 1"),
        (_pixels(lambda x: np.repeat(x, 2, axis=3)), "8 x 16 pixels .* 8 x 8"),
    ],
)
def test_other_data_must_fit(
    folder: Path,
    opened: Callable[[Change], None],
    change: Change,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    opened(change)
    assert re.search(message, refusal(capsys, folder, "--data", "digits"))


def test_changed_data_is_refused_unless_it_is_meant(
    folder: Path, opened: Callable[[Change], None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = as_json(capsys, folder)
    # other statistics must not matter: the pixels are normalised as in the run
    opened(lambda data: replace(data, fingerprint="other", mean=(0.9,), std=(7.0,)))
    error = refusal(capsys, folder)
    assert "no longer holds the images" in error and "--data digits" in error
    assert as_json(capsys, folder, "--data", "digits") == before


def test_the_runs_precision_is_used_and_a_cpu_goes_without_fp16(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = as_json(capsys, copy)
    assert full["precision"] == "fp32" and full["device"] == "cpu"
    reconfigure(copy, amp=True, amp_dtype="bf16")
    assert as_json(capsys, copy)["precision"] == "bf16"
    reconfigure(copy, amp_dtype="fp16")
    assert as_json(capsys, copy) == full


def test_what_is_missing_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere is not a run folder" in refusal(capsys, "nowhere")
    assert "--batch-size is 0" in refusal(capsys, copy, "--batch-size", "0")
    assert "device is 'tpu'" in refusal(capsys, copy, "--device", "tpu")
    (copy / "best.pt").unlink()
    assert "no checkpoint best.pt: give --checkpoint last" in refusal(capsys, copy)
    for path in copy.glob("*.pt"):
        path.unlink()
    assert "train it for an epoch" in refusal(capsys, copy)


def test_a_damaged_checkpoint_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((copy / "best.pt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (copy / "best.pt").unlink()  # it may be the same file as last.pt
    (copy / "best.pt").write_bytes(content)
    assert "best.pt is damaged" in refusal(capsys, copy)


@pytest.mark.parametrize(("option", "value"), [("split", "tset"), ("checkpoint", "lasst")])
def test_a_program_may_not_misspell_options_either(option: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{option} is '{value}', .* did you mean (test|last)"):
        evaluate_run(Path("no/run"), **{option: value})  # type: ignore[arg-type]
