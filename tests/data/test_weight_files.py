"""Files of class weights: what they may hold, and one sentence for all else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dml_fast.data.weight_files import weights_in
from dml_fast.errors import UserError

CLASSES = ("cat", "a\tb", "bird")


def test_weights_come_in_the_order_of_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "w.tsv"
    path.write_bytes(
        b"\xef\xbb\xbfclass\tweight\r\n# rare:\r\nbird\t2e1\r\n\r\na\\tb\t0\ncat\t.5\n"
    )
    assert weights_in(path, CLASSES) == [0.5, 0.0, 20.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat 1\n", "line 1 has one column and not two: write a class, a tab and its weight"),
        ("cat\t1\t2\n", "line 1 has 3 columns and not two"),
        ("cat\t1\ndog\t1\n", "line 2 has the class 'dog', which is none of the data's"),
        ("cat\t1\ncat\t1\n", "line 2 names 'cat' a second time: remove one of the lines"),
        ("cat\t1\nclass\tweight\n", "line 2 has the class 'class'"),
        ("cat\t-1\n", "line 1 has the weight '-1': give a number of 0 or more"),
        ("cat\tinf\n", "line 1 has the weight 'inf'"),
        ("cat\t1e999\n", "line 1 has the weight '1e999'"),
        ("cat\t1\n", r"w.tsv has no weight for 2 of 3 classes, 'a\\tb' first: add a line for each"),
        ("", "has no weight for 3 of 3 classes"),
        ("cat\t0\na\\tb\t0\nbird\t0.0\n", "has zeros alone: give some class more"),
        ("cat\t1\n\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "w.tsv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"--class-weights .*w\.tsv") as error:
        weights_in(path, CLASSES)
    assert message.replace(r"\\", "\\") in str(error.value).replace(r"\\", "\\")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    missing = re.escape(str(tmp_path / "none.tsv"))
    with pytest.raises(UserError, match=missing + ".* give --class-weights a file, or auto"):
        weights_in(tmp_path / "none.tsv", CLASSES)
