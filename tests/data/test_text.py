"""Rows of tab-separated files, and what is said of files that cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from text_pairs import PARTS, RELATIONS, text_pairs

from dml_fast.data.features import RowSet
from dml_fast.data.readers.text import check_text, read_rows, read_text
from dml_fast.data.sets import RawData
from dml_fast.errors import UserError

SMALL = "split\tlabel\ttext\ntrain\tb\tone two\ntrain\ta\tone\ntrain\t\ttwo one\nval\tb\ttwo\n"


def read(*texts: str | bytes, folder: Path, **options: object) -> RawData:
    files = []
    for number, text in enumerate(texts):
        files.append(folder / f"f{number}.tsv")
        files[-1].write_bytes(text if isinstance(text, bytes) else text.encode())
    usual = {"levels": None, "classes": (), "dim": 10}
    return read_text(",".join(map(str, files)), **(usual | options))  # type: ignore[arg-type]


def texts_of(rows: object) -> list[str]:
    assert isinstance(rows, RowSet)
    return list(rows.columns["text"])


def test_rows_have_texts_labels_parts_and_names(tmp_path: Path) -> None:
    raw = read(SMALL, folder=tmp_path)
    assert raw.classes == ("a", "b") and raw.name == "f0" and raw.test is None
    assert texts_of(raw.train) == ["one two", "one", "two one"]
    assert raw.train.labels.tolist() == [1, 0, -1]
    assert list(raw.train.names) == ["0", "1", "2"]
    assert raw.val is not None
    assert texts_of(raw.val) == ["two"] and list(raw.val.names) == ["3"]


def test_the_generated_pairs_are_read_in_their_parts(tmp_path: Path) -> None:
    raw = read_text(str(text_pairs(tmp_path / "p.tsv")), levels=(), classes=(), dim=5)
    assert raw.classes == RELATIONS
    assert raw.val is not None and raw.test is not None
    assert (len(raw.train), len(raw.val), len(raw.test)) == tuple(PARTS.values())
    assert list(raw.train.columns) == ["arg1", "arg2"]
    assert raw.test.names[0] == "pair 330"


def test_quotes_spaces_and_windows_line_ends_are_text(tmp_path: Path) -> None:
    raw = read('\ufefftext\tlabel\r\n"a\ta\r\n b "" \tb\r\n'.encode(), folder=tmp_path)
    assert texts_of(raw.train) == ['"a', ' b "" ']
    assert raw.classes == ("a", "b")


def test_dev_is_val_and_other_parts_are_left_out_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "label\tsplit\ttext\na\ttrain\tx\nb\tdev\ty\nc\ttest2\tz\na\ttest2\tz\na\ttest\tx\n"
    with caplog.at_level(logging.WARNING):
        raw = read(text, folder=tmp_path)
    assert raw.val is not None and texts_of(raw.val) == ["y"]
    assert raw.test is not None and raw.test.names == ("4",)
    assert raw.classes == ("a", "b")  # c is a label of a row that is left out
    [line] = caplog.messages
    assert "2 rows are left out" in line and "'test2' (2)" in line


def test_several_files_are_one(tmp_path: Path) -> None:
    other = "text\tmore\tlabel\nx\t\tc\ny\t\t\n"  # no split: rows to learn from
    raw = read(SMALL, other, folder=tmp_path)
    assert texts_of(raw.train) == ["one two", "one", "two one", "x", "y"]
    assert raw.classes == ("a", "b", "c")
    assert list(raw.train.names) == ["0", "1", "2", "4", "5"]


def test_a_file_whose_name_has_a_comma_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a,b.tsv"
    path.write_text(SMALL)
    assert len(read_rows([path]).names) == 4
    check_text(str(path))


def test_declared_classes_have_their_order(tmp_path: Path) -> None:
    raw = read(SMALL, folder=tmp_path, classes=("c", "b", "a"))
    assert raw.classes == ("c", "b", "a")
    assert raw.train.labels.tolist() == [1, 2, -1]
    raw = read("text\nx\ny\n", folder=tmp_path, classes=("c", "b"))
    assert raw.train.labels.tolist() == [-1, -1]


def test_ids_are_names(tmp_path: Path) -> None:
    raw = read("id\ttext\tlabel\nT-1\tx\ta\nT-2\ty\tb\n", folder=tmp_path)
    assert raw.train.names == ("T-1", "T-2")


HEADER = "split\tlabel\ttext\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "has the columns '': give UTF-8 with tabs"),
        ("label\tsentence\na\tx\n", "has the columns 'label', 'sentence': give UTF-8"),
        ("label\targ1\na\tx\n", "a header line with text, or arg1 and arg2"),
        ("text\ttext\na\tx\n", "has the column 'text' twice"),
        (HEADER, "has a header and no rows"),
        (HEADER + "train\ta\tx\ntrain\ta\n", "line 3, has 2 fields and the header 3"),
        (HEADER + "train\ta\tx\ty\n", "line 2, has 4 fields and the header 3"),
        (HEADER + "train\ta\tx\n\ntrain\ta\tx\n", "line 3, has 1 fields"),
        (HEADER + "train\ta\t \n", "line 2, has nothing in the column text"),
        (HEADER.encode() + b"train\ta\tx\ntrain\ta\tcaf\xe9\n", "line 3, is no UTF-8 (byte 0xe9)"),
        (HEADER + "val\ta\tx\n", "has no row whose split is train"),
        (HEADER + "train\t\tx\n", "has no labels, so its classes are not known: give --classes"),
        ("id\ttext\n1\tx\n1\ty\n", "line 3, has the id '1', as line 2 of"),
        ("id\ttext\n\tx\n", "line 2, has the id '': give a name"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(UserError) as error:
        read(text, folder=tmp_path)
    assert words in str(error.value) and "f0.tsv" in str(error.value)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="line 2, has the label 'b', which is none of the 2 classes: corr"
    ):
        read(SMALL, folder=tmp_path, classes=("a", "c"))
    with pytest.raises(UserError, match=r"--levels pairs needs .*tsv has text alone.*words,chars"):
        read(SMALL, folder=tmp_path, levels=("pairs",))
    with pytest.raises(UserError, match=r"--levels is 'wrods'.*did you mean words"):
        read(SMALL, folder=tmp_path, levels=("wrods",))
    with pytest.raises(UserError, match=r"f1.tsv has arg1 and arg2, and .*f0.tsv text"):
        read(SMALL, "arg1\targ2\nx\ty\n", folder=tmp_path)
    with pytest.raises(UserError, match=r"cannot be read .*No such file"):
        check_text(str(tmp_path / "none.tsv"))
    with pytest.raises(UserError, match=r"is damaged .it is not a file|cannot be read"):
        check_text(str(tmp_path))


def test_features_are_those_of_the_training_rows(tmp_path: Path) -> None:
    lines = [f"train\ta\tcommon word{i % 3}" for i in range(12)] + ["val\tb\tother other other"] * 3
    raw = read(HEADER + "\n".join(lines) + "\n", folder=tmp_path)
    assert isinstance(raw.train, RowSet) and isinstance(raw.val, RowSet) and raw.fit is not None
    features = raw.fit(raw.train.columns)
    assert features.names == ("words",)
    [seen] = features.transform(raw.val.columns)
    assert seen.dtype == np.float32 and not seen.any()  # no training row has their words
