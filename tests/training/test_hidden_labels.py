"""Training with ``--unlabelled-share 0``: rows without a label are as good as not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from resume_cases import digest, train

from dml_fast.config import TrainConfig
from dml_fast.data import open_dataset, opening
from dml_fast.data.readers.digits import read_digits
from dml_fast.evaluate import main as evaluate


def test_a_run_without_rows_that_lack_a_label_is_one_where_they_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(arch="resnet8", epochs=1, batch_size=32, seed=5, warmup=0.5)
    hidden = replace(config, labels_per_class=16, unlabelled_share=0.0, label_noise=0.1)
    assert train(tmp_path / "hidden", hidden)
    raw = read_digits()
    found = open_dataset("digits", labels_per_class=16, seed=5)
    known = np.flatnonzero(found.train.labels >= 0)
    assert len(known) == 160 and len(found.train) == 1168
    few = replace(raw, train=raw.train.subset(known))  # type: ignore[arg-type]
    monkeypatch.setattr(opening, "read_digits", lambda: few)
    assert train(tmp_path / "alone", replace(config, label_noise=0.1))
    assert digest(tmp_path / "hidden") == digest(tmp_path / "alone")


@pytest.mark.slow
def test_a_run_keeps_the_labels_that_it_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The user's file may grow, or go."""
    names = list(open_dataset("digits").train.names)
    labels = open_dataset("digits").train.labels.tolist()
    file = tmp_path / "labels.tsv"
    file.write_text("".join(f"{n}\t{c}\n" for n, c in zip(names[:96], labels, strict=False)))
    config = TrainConfig(
        arch="resnet8", epochs=2, batch_size=32, labels=str(file), unlabelled_share=0.0
    )
    assert train(tmp_path / "straight", config)
    assert not train(tmp_path / "run", config, steps=4)
    file.write_text("0\t9\n")
    assert train(tmp_path / "run", config, resume=True)
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")
    file.unlink()
    capsys.readouterr()
    assert evaluate([str(tmp_path / "run"), "--split", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labelled"] == 96


@pytest.mark.slow
def test_evaluation_counts_the_rows_that_have_a_label(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = TrainConfig(arch="resnet8", epochs=1, labels_per_class=9, batch_size=90)
    config = replace(config, unlabelled_share=0.5)
    assert train(tmp_path / "run", config)
    assert evaluate([str(tmp_path / "run"), "--split", "train"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1,168 images of the train split" in out
    assert "1,078 of them have no label and are left out of the shares" in out
    assert evaluate([str(tmp_path / "run"), "--split", "train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[key] for key in ("images", "labelled", "unlabelled")] == [1168, 90, 1078]
    assert [90 * student["accuracy"] % 1 for student in found["students"]] == [0, 0]
    assert evaluate([str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labelled"] == 359
