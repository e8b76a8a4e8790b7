"""Names are bytes: Latin-1, tabs, newlines, control characters; in folders, shards and lists."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bad_image_cases import jpeg
from data_cases import STREAMING, skipped
from market_cases import make_market
from shard_cases import sample, write_tar

from dml_fast.data import DataSet, open_dataset
from dml_fast.data.__main__ import main as data_command
from dml_fast.data.loaders import evaluation_batches
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run

LATIN = os.fsdecode(b"caf\xe9")
ODD = sorted((LATIN, "tab\there", "line\nbreak", "\x1b[31m", "[red]", "$x^$", "a\\b", "图片"))
PRINTED = sorted((r"caf\xe9", r"tab\there", r"line\nbreak", r"\x1b[31m", "[red]", "$x^$", r"a\b",
                  "图片"))  # fmt: skip


def folder_of_odd_names(root: Path) -> Path:
    for part in ("train", "val"):
        for name in ODD:
            (root / part / name).mkdir(parents=True)
            for file in ODD:
                (root / part / name / f"{file}.jpg").write_bytes(jpeg())
    return root


def shards_of_odd_names(root: Path, format: int) -> Path:
    for part in ("train", "val"):
        files = [f for i, name in enumerate(ODD) for f in sample(f"a/{name}", jpeg(), i)]
        write_tar(root / f"{part}-{LATIN}.tar", files, format)
    return root


def opened(spec: str, loader: str, **options: object) -> DataSet:
    data = open_dataset(spec, loader=loader, **options)  # type: ignore[arg-type]
    normalisation = {"mean": data.mean, "std": data.std, "device": "cpu"}
    assert len(list(evaluation_batches(data.val, batch_size=1, **normalisation))) == len(data.val)
    return data


@pytest.mark.parametrize("loader", ["resident", *STREAMING])
def test_a_folder_of_odd_names_is_read(loader: str, tmp_path: Path) -> None:
    data = opened(f"folder:{folder_of_odd_names(tmp_path / LATIN)}", loader)
    assert list(data.classes) == ODD and (len(data.train), len(data.val)) == (64, 64)


@pytest.mark.parametrize("format", range(3), ids=["ustar", "gnu", "pax"])
def test_shards_of_odd_names_are_read(format: int, tmp_path: Path) -> None:
    root = shards_of_odd_names(tmp_path / LATIN, format)
    data = opened(f"shards:{root}", "fallback")
    files = data.train.images.files  # type: ignore[union-attr]
    assert [files.path(i).name for i in range(8)] == [f"{name}.jpg" for name in ODD]


def test_identities_in_odd_names_are_read_and_numbers_that_do_not_fit_are_refused(
    tmp_path: Path,
) -> None:
    make_market(tmp_path)
    path = min((tmp_path / "query").iterdir())
    path.rename(path.with_name(f"{path.stem}{LATIN}\n.png"))
    data = open_dataset(f"market1501:{tmp_path}", loader="fallback")
    assert data.test is not None and f"{LATIN}\n.png" in data.test.names[0]  # type: ignore[attr-defined]
    for name in (f"{'9' * 20}_c1s1_000001_00.png", f"0002_c{'9' * 20}s1_000001_00.png"):
        (tmp_path / "query" / name).write_bytes(b"")
        with pytest.raises(UserError, match=rf"{name} has no identity and camera: .*18 digits"):
            open_dataset(f"market1501:{tmp_path}")
        (tmp_path / "query" / name).unlink()


def test_lists_of_bad_files_have_one_line_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """Reasons quote names too, such as those of members."""
    root = folder_of_odd_names(tmp_path / "data")
    for name in ODD:
        (root / "train" / ODD[0] / f"{name}.jpg").write_bytes(b"x\ny")
    data = opened(f"folder:{root}", "fallback", skip_corrupt=True)
    assert len(skipped(data)) == 8 and all(r.getMessage().isprintable() for r in caplog.records)
    assert data_command(["scan", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.write_corrupt(dict(zip(skipped(data), ["odd\treason\n"] * 8, strict=True)))
    listed = (run.folder / "corrupt_files.tsv").read_text("utf-8").splitlines()
    for rows in (lines, listed):
        names, reasons = zip(*(row.split("\t") for row in rows), strict=True)
        assert sorted(Path(name).stem for name in names) == PRINTED and all(reasons)
    assert data_command(["scan", str(root), "--json"]) == 1
    bad = json.loads(capsys.readouterr().out)["bad"]
    assert sorted(Path(name).stem for name in bad) == ODD
