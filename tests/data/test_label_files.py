"""Files of labels: what is read, and what is refused with its line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mutations import mutations, outcome

from dml_fast.data.label_files import LabelFile
from dml_fast.errors import UserError

CLASSES = ("ant", "Bee", "cat")
ROWS = tuple(f"train/{number}.png" for number in range(6))


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes | str], list[int]]:
    """Return what reads a file's content: the labels of `ROWS`."""

    def labels(content: bytes | str) -> list[int]:
        path = tmp_path / "labels.tsv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        file = LabelFile(path, CLASSES)
        found = file.of(ROWS).tolist()
        file.check((), ROWS[0])
        return found

    return labels


@pytest.mark.parametrize(
    "content",
    [
        "train/1.png\tcat\ntrain/4.png\tant\n",
        "train/1.png\tcat\ntrain/4.png\tant",
        "train/1.png\tcat\r\ntrain/4.png\tant\r\n",
        "\ufefftrain/4.png\tant\ntrain/1.png\tcat\n",
        "name\tclass\ntrain/1.png\tcat\n\n  \n# by Ann\n#\ta\tb\ntrain/4.png\tant\n",
        "\ufeff# first\r\nname\tclass\r\ntrain/1.png\tcat\r\ntrain/4.png\tant\r\n",
        "train/1.png\tcat\ntrain/4.png\tant\ntrain/1.png\tcat\n",
    ],
)
def test_lines_of_a_name_and_a_class(content: str, read: Callable) -> None:
    assert read(content) == [-1, 2, -1, -1, 0, -1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "labels.tsv names no row: write a name, a tab and a class in each line"),
        ("\n# nothing\nname\tclass\n", "names no row"),
        ("train/1.png\tcat\ntrain/9.png\tant", r"line 2 names 'train/9\.png', and no row .*such as "
         r"'train/0\.png'"),
        ("train/1.png\tcat\n\ntrain/2.png\tCat", r"line 3 has the class 'Cat', which is none of "
         r"the data's 3: write one of them \(cat"),
        ("train/1.png\tdog", r"line 1 has the class 'dog', .*\(ant, Bee, cat\)"),
        ("train/1.png\t", "line 1 has the class ''"),
        ("train/1.png\tcat \n", "line 1 has the class 'cat '"),
        ("\tcat", "line 1 has no name"),
        ("train/1.png cat\n", "line 1 has one column and not two"),
        ("# x\ntrain/1.png\t0.5\tcat\t0.9", "line 2 has 4 columns and not two"),
        ("train/1.png\tcat\nname\tclass\n", "line 2 has the class 'class'"),
        ("train/1.png\tcat\ntrain/2.png\tant\ntrain/1.png\tant", r"line 3 gives 'train/1\.png' the "
         "class 'ant', and line 1 gave it another: remove one"),
        (b"train/1.png\tcat\ntrain/\xe9.png\tant\n", "line 2 is not UTF-8: save"),
        (b"\xff\xfet\0r\0", "line 1 is not UTF-8: save"),
        (f"{'x' * 5000}\tcat", r"line 1 names 'x{77}\.\.\.'"),
        ("a\0b\tcat", r"line 1 names 'a\\x00b'"),
    ],
)  # fmt: skip
def test_bad_lines_are_refused_with_their_number(
    content: str, message: str, read: Callable
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(content)
    assert str(caught.value).startswith("--labels ") and str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing.tsv", tmp_path / "pipe"):
        with pytest.raises(UserError, match=rf"{path} .*give --labels a file"):
            LabelFile(path, CLASSES)


def test_odd_names_are_written_as_messages_show_them(tmp_path: Path) -> None:
    rows = ("tab\there", "line\nbreak", "carriage\r", os.fsdecode(b"caf\xe9"), "a b", "图")
    classes = ("two\tparts", "plain")
    path = tmp_path / "labels.tsv"
    path.write_text(
        "tab\\there\tplain\nline\\nbreak\ttwo\\tparts\ncarriage\\r\tplain\r\n"
        "caf\\xe9\tplain\na b\tplain\n图\ttwo\\tparts\n",
        "utf-8",
        newline="",
    )
    file = LabelFile(path, classes)
    assert file.of(rows).tolist() == [1, 0, 1, 1, 1, 0]
    file.check((), rows[0])
    with pytest.raises(UserError, match=r"line 1 names 'tab\\there', and two rows .* rename one"):
        LabelFile(path, classes).of((*rows, "tab\\there"))
    path.write_text("#7\tplain\n8\tplain\n")
    with pytest.raises(UserError, match=r"line 1 is a comment, as it begins with #, and a row"):
        LabelFile(path, classes).of(("#7", "8"))
    assert LabelFile(path, classes).of(("7", "8")).tolist() == [-1, 1]
    with pytest.raises(UserError, match=r"two classes of the data are called 'plain'"):
        LabelFile(path, (*classes, "plain"))


def test_damaged_files_give_labels_or_one_sentence(read: Callable) -> None:
    """Names and classes have no checksum: a mutation may be another valid file."""
    whole = "name\tclass\r\n" + "".join(f"{row}\t{CLASSES[i % 3]}\n" for i, row in enumerate(ROWS))
    found = [outcome(lambda data=data: read(data)) for data in mutations(whole.encode(), 200)]
    labels = np.array([labels for labels in found if labels is not None])
    assert 5 < len(labels) < 195
    assert labels.shape[1] == len(ROWS) and labels.min() >= -1 and labels.max() < len(CLASSES)
