"""What is known before training is refused before it, with nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_cases import QUICK, train
from market_cases import make_market

from dml_fast.errors import UserError
from dml_fast.runs.folder import Run
from dml_fast.train import arguments
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest


def test_a_gallery_whose_matches_are_corrupt_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, folder = make_market(tmp_path / "market"), tmp_path / "run"
    for path in (data / "bounding_box_test").glob("*_c2*"):  # the queries are all by camera 1
        path.write_bytes(b"no image")
    options = ["--data", f"market1501:{data}", "--skip-corrupt", "--loader", "resident"]
    searched = ["--val-fraction", "0", "--batch-size", "8", "--num-instances", "2"]
    assert train(*QUICK[:4], *options, *searched, "--out", str(folder)) == 2
    err = capfd.readouterr().err
    assert "no query has a valid match" in err
    assert "--val-protocol all" in err and "camera_rule" not in err
    assert "epoch 1" not in err
    assert not folder.exists()


def test_a_path_that_is_too_long_for_some_file_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder itself can be made, and so can config.json."""
    monkeypatch.chdir(tmp_path)
    most = os.pathconf(".", "PC_PATH_MAX") - 1  # with the final zero
    room = len(".config.json.xxxxxxxx.tmp") + 1
    out = os.path.join(*["x" * 200] * 40)[: most - room - len(os.path.abspath("x"))]
    assert train(*QUICK, "--out", out) == 2
    err = capfd.readouterr().err
    assert "cannot be written (File name too long): give another one with --out" in err


def test_what_a_resumed_run_replaces_counts_as_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    run.prepare(0)
    parts = run.new_parts(step=1)
    (parts / "rank0").write_bytes(b"x" * 2**20)
    (run.folder / "checkpoint_link").symlink_to(parts.name)
    run.checkpoint("last").symlink_to(parts.name)
    run.checkpoint("best").write_bytes(b"x" * 2**20)
    run.checkpoint("previous").hardlink_to(run.checkpoint("best"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    run.check_writable(3 * 2**20)
    with pytest.raises(UserError, match=r"needs about 4 MiB and the disk of .* has 3 MiB free"):
        run.check_writable(3 * 2**20 + 2**19 + 1)


@pytest.mark.slow
def test_the_room_that_a_run_needs_is_that_of_its_files(tmp_path: Path) -> None:
    """What is checked beforehand is no less than what is there at the end, nor twice as much."""
    folder = tmp_path / "run"
    args = arguments([*QUICK[:2], "--epochs", "3", "--cohort", "2", "--out", str(folder)])
    run = Run(folder)
    run.prepare(0)
    trainer = build_trainer(args, run, None, StopRequest())
    needed = trainer.saver.bytes_needed()
    assert trainer.fit()
    trainer.finish()
    taken = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*")}
    assert sum(taken.values()) < needed
