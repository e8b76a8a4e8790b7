"""Training with ``--unlabelled-share 0``: rows without a label are as good as not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from resume_cases import digest, train

from dml_fast.config import TrainConfig
from dml_fast.data import open_dataset, opening
from dml_fast.data.readers.digits import read_digits


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
