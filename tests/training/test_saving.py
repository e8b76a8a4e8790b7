"""Checkpoints of other runs, damaged ones, older ones; and a disk that is full."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_cases import QUICK, THREE_EPOCHS, train, tree
from PIL import Image

from dml_fast.config.checks_logs import LOGS
from dml_fast.runs import checkpoint
from dml_fast.runs.folder import Run
from dml_fast.train import arguments
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest


def test_resume_refuses_changed_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, folder = tree(tmp_path / "data"), tmp_path / "run"
    options = ["--arch", "resnet8", "--epochs", "1", "--batch-size", "4"]
    assert train(*options, "--data", f"folder:{data}", "--out", str(folder)) == 0
    moved = tmp_path / "moved"
    data.rename(moved)
    assert train("--resume", str(folder), "--data", f"folder:{moved}") == 0
    description = (folder / "config.json").read_text()
    assert f"folder:{moved}" in description
    Image.new("RGB", (8, 8)).save(moved / "train" / "class 0" / "0.png")
    capfd.readouterr()
    assert train("--resume", str(folder), "--data", f"folder:{moved}") == 2
    assert "was trained on other images or labels" in capfd.readouterr().err
    assert (folder / "config.json").read_text() == description


def test_resume_of_a_damaged_checkpoint_offers_the_previous(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(*QUICK, "--save-every", "1", "--out", str(folder)) == 0
    last = folder / "last.pt"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[:-100])
    capfd.readouterr()
    assert train("--resume", str(folder)) == 2
    err = capfd.readouterr().err
    assert f"{last} is damaged" in err
    assert f"use {folder / 'previous.pt'} instead" in err
    assert train("--resume", str(folder / "previous.pt")) == 0
    assert "continuing" in capfd.readouterr().err


@pytest.mark.slow
def test_resume_from_another_checkpoint_keeps_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(*THREE_EPOCHS, "--out", str(folder)) == 0
    steps = steps_of(folder)
    assert train("--resume", str(folder / "previous.pt")) == 0
    assert steps_of(folder) == steps
    (folder / "last.pt").unlink()
    (folder / "last.pt").write_bytes(b"damaged")
    args = arguments(["--resume", str(folder / "previous.pt")])
    trainer = build_trainer(args, Run(folder), folder / "previous.pt", StopRequest())
    assert steps_of(folder)["last"] == steps["previous"]
    assert steps_of(folder)["best"] <= steps["best"]
    trainer.fit()
    assert steps_of(folder) == steps


def steps_of(folder: Path) -> dict[str, int]:
    names = ("last", "previous", "best")
    return {name: checkpoint.load(folder / f"{name}.pt")["step"] for name in names}


def test_a_disk_that_fills_up_ends_the_run_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    saves = 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", full)
    assert train(*THREE_EPOCHS, "--out", str(folder)) == 1
    err = capfd.readouterr().err
    assert "error: " in err
    assert "(No space left on device): make room, then continue from step 3" in err
    monkeypatch.undo()
    assert train("--resume", str(folder)) == 0


@pytest.mark.parametrize(
    ("place", "error", "what"),
    [
        ("draw_curves", MemoryError(), "curves.png"),
        ("draw_curves", ImportError(), "curves.png"),
        ("show_run", OSError(28, "No space left on device"), "the table of results"),
        ("show_run", ValueError("b_"), "the table of results"),
    ],
)
def test_what_fails_at_the_end_is_named_and_the_run_is_finished(
    tmp_path: Path,
    place: str,
    what: str,
    error: Exception,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    folder = tmp_path / "run"
    monkeypatch.setattr(f"dml_fast.training.trainer.{place}", fail)
    assert train(*QUICK, "--out", str(folder)) == 0
    [line] = [line for line in capfd.readouterr().err.splitlines() if "not written" in line]
    assert what in line
    assert line.endswith(f"python -m dml_fast.report {folder} gives it")
    assert (folder / "student_1.safetensors").is_file()


def test_events_of_tensorboard_that_cannot_be_written_are_named_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, folder: str, purge_step: int) -> None:
            if started:
                self.add_scalar()

        def add_scalar(self, *values: Any) -> None:
            raise OSError(28, "No space left on device")

        close = add_scalar

    started: list[bool] = []

    module = SimpleNamespace(SummaryWriter=Full)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("dml_fast.config.checks_logs.LOGS", dict.fromkeys(LOGS, ""))
    assert train(*THREE_EPOCHS, "--log", "tensorboard", "--out", str(tmp_path / "run")) == 0
    said = "--log tensorboard: not written from here on (No space left on device)"
    assert capfd.readouterr().err.count(said) == 1
    started.append(True)
    assert train(*QUICK, "--log", "tensorboard", "--out", str(tmp_path / "other")) == 2
    err = capfd.readouterr().err
    assert "tensorboard cannot be written (No space left on device): make it a folder" in err
    assert not (tmp_path / "other").exists()
