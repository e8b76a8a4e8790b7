"""Predictions as text: what is read back is what was written."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

from dml_fast.errors import UserError
from dml_fast.eval.prediction_files import Row, csv_header, csv_lines, json_lines, prediction_file

NAMES = ["plain", "", " a b ", 'a,"b"', '"', "x\ry", "x\n", "\r\n", "é", os.fsdecode(b"caf\xe9,")]
ROWS = [Row(name, [name, "cat"], [0.75, 1e-30]) for name in NAMES]


def test_csv_is_read_back() -> None:
    content = (csv_header(2, "path") + csv_lines(ROWS)).decode("utf-8", "surrogateescape")
    assert content.startswith("path,class_1,probability_1,class_2,probability_2\nplain,plain,0.75,")
    found = list(csv.DictReader(io.StringIO(content, newline="")))
    assert [(row["path"], row["class_1"]) for row in found] == [(name, name) for name in NAMES]
    assert {float(row["probability_2"]) for row in found} == {1e-30}


def test_json_is_read_back() -> None:
    found = [json.loads(line) for line in json_lines(ROWS, "path").decode("ascii").splitlines()]
    assert [(row["path"], row["classes"][0]) for row in found] == [(name, name) for name in NAMES]
    assert {tuple(row["probabilities"]) for row in found} == {(0.75, 1e-30)}


def test_half_a_character_in_a_class_is_escaped() -> None:
    """A damaged config.json may hold one; no name of a file does."""
    assert csv_lines([Row("a", ["x\ud800"], [1.0])]) == rb"a,x\ud800,1.0" + b"\n"
    assert json.loads(json_lines([Row("a", ["x\ud800"], [1.0])], "path"))["classes"] == ["x\ud800"]


@pytest.mark.parametrize("out", ["a.csv", "a.jsonl"])
def test_a_file_that_cannot_be_kept_leaves_the_old_one(out: str, tmp_path: Path) -> None:
    (tmp_path / out).write_text("old")
    with (
        pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"),
        prediction_file(str(tmp_path / out), 2, "path") as write,
    ):
        write(ROWS)
        raise OSError(28, "No space left on device")
    assert [*tmp_path.iterdir()] == [tmp_path / out]
    assert (tmp_path / out).read_text() == "old"
