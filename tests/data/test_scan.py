"""`python -m dml_fast.data scan DIR`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_image_cases import BAD, foreign, rotten
from data_cases import pieces
from shard_cases import sample, write_tar

from dml_fast.data.__main__ import main
from dml_fast.errors import UserError


@pytest.mark.parametrize("options", [[], ["--decode"]])
def test_whole_files_of_all_kinds_pass(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pieces(tmp_path, 4, [(24, 24)])
    foreign(tmp_path / "train" / "china")
    (tmp_path / "train" / "notes.txt").write_text("no image, and not looked at")
    assert main(["scan", str(tmp_path), *options]) == 0
    assert "27 files" in capsys.readouterr().out


def test_bad_files_are_listed_with_reasons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pieces(tmp_path, 4, [(24, 24)])
    for name, content in BAD.items():
        (tmp_path / "train" / "china" / name).write_bytes(content)
    (tmp_path / "train" / "gone.png").symlink_to("nowhere.png")
    assert main(["scan", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    expected = {f"train/china/{name}" for name in BAD if name != "no pixels.png"}
    assert found["bad"].keys() == expected | {"train/gone.png"} and all(found["bad"].values())
    assert found["files"] == 8 + len(BAD) + 1
    assert main(["scan", str(tmp_path), "--decode"]) == 1
    shown = capsys.readouterr().out
    assert all(name in shown for name in BAD) and "text.jpg\tcannot identify image file" in shown


def test_what_a_folder_reads_is_scanned_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Links to folders are followed, as training does."""
    pieces(tmp_path / "data", 4, [(24, 24)])
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "bad.jpg").write_bytes(b"this is no image")
    (tmp_path / "data" / "train" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "train" / "lost").symlink_to("nowhere")
    assert main(["scan", str(tmp_path / "data")]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("train/linked/bad.jpg\t")
    assert "9 files looked at, 1 bad; passed over: 1 links to nothing (train/lost)" in err


def test_images_without_a_label_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pieces(tmp_path / "data", 4, [(24, 24)])
    assert main(["scan", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out == "8 files looked at, 0 bad\n"
    (tmp_path / "data" / "train" / "flower").rename(tmp_path / "data" / "train" / "unlabelled")
    assert main(["scan", str(tmp_path / "data")]) == 0
    expected = "8 files looked at, 0 bad; 4 have a label and 4 have none\n"
    assert capsys.readouterr().out == expected
    image = (tmp_path / "data/train/china/000.jpg").read_bytes()
    write_tar(tmp_path / "shards" / "train-0.tar", sample("a", image, 0))
    write_tar(tmp_path / "shards" / "train-1.tar", [("b.jpg", image), ("c.jpg", image)])
    assert main(["scan", f"shards:{tmp_path / 'shards'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["unlabelled"]) == (3, 2)


def test_nothing_to_scan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no image files"):
        main(["scan", str(tmp_path)])
    with pytest.raises(UserError, match="is not a folder"):
        main(["scan", str(tmp_path / "x")])


def test_from_the_command_line(tmp_path: Path) -> None:
    pieces(tmp_path, 2, [(24, 24)])
    (tmp_path / "train" / "china" / "bad.jpg").write_bytes(rotten()[:100])
    command = [sys.executable, "-m", "dml_fast.data", "scan", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "5 files looked at, 1 bad" in run.stderr
    assert run.stdout.startswith("train/china/bad.jpg\t")
