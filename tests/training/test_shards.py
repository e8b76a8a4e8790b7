"""Training from tar shards by the command line: as from a folder, killed, resumed, evaluated."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_cases import STREAMING
from distributed_cases import finish
from kill_cases import start, wait_for_checkpoints
from resume_cases import digest
from safetensors.torch import load_file
from shard_cases import cifar, shards_of

pytestmark = pytest.mark.processes

OPTIONS = [
    "--cohort", "2", "--arch", "resnet8", "--epochs", "3", "--batch-size", "32", "--seed", "3",
    "--save-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> tuple[Path, Path]:
    """300 training and 300 test images of CIFAR-10 as a folder and as shards."""
    root = tmp_path_factory.mktemp("cifar")
    folder = cifar(shared_data / "cifar10-jpeg.tar.xz", root / "folder", 30)
    return folder, shards_of(folder, root / "shards", 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMING)
def test_killed_and_resumed_it_ends_as_the_folder_does(
    name: str, data: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, shards = data
    straight, of_folder, run = (tmp_path / name for name in ("straight", "folder", "run"))
    finish(start(straight, "--data", f"shards:{shards}", *OPTIONS, "--out", str(straight)))
    finish(start(of_folder, "--data", f"folder:{folder}", *OPTIONS, "--out", str(of_folder)))
    for number in range(2):
        ours, theirs = (
            load_file(r / f"student_{number}.safetensors") for r in (straight, of_folder)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    loader = ["--loader", name]
    process = start(run, "--data", f"shards:{shards}", *OPTIONS, *loader, "--out", str(run))
    for number in (signal.SIGKILL, signal.SIGTERM):
        wait_for_checkpoints(process, run, 2)
        process.send_signal(number)
        finish(process, -number if number == signal.SIGKILL else 128 + number)
        # the shards may be elsewhere by then
        moved = shards.with_name(f"shards-{name}-{number}")
        if not moved.exists():
            moved.symlink_to(shards)
        process = start(run, "--resume", str(run), "--data", f"shards:{moved}")
    output = finish(process)
    assert "continuing" in output and "600 samples in 12 shards" in output
    assert digest(run) == digest(straight)
    command = [sys.executable, "-m", "dml_fast.evaluate", str(run), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown)["images"] == 300


@pytest.mark.slow
def test_damage_ends_a_run_or_is_listed_and_other_data_are_refused(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    """In one sentence, or in corrupt_files.tsv."""
    _, shards = data
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "train-001.tar").write_bytes((copy / "train-001.tar").read_bytes()[:30_000])
    run = tmp_path / "run"
    command = ["--data", f"shards:{copy}", *OPTIONS[:4], "--epochs", "1", "--out", str(run)]
    shown = finish(start(run, *command), 2)
    assert f"shard {copy / 'train-001.tar'} is damaged (truncated" in shown
    assert "Traceback" not in shown and not run.exists()
    shown = finish(start(run, *command, "--skip-corrupt"))
    assert "skipped 1 corrupt files: train-001.tar (truncated" in shown
    listed = (run / "corrupt_files.tsv").read_text()
    assert listed.startswith("train-001.tar\ttruncated") and "samples of it are kept" in listed
    shown = finish(start(run, "--resume", str(run), "--data", f"shards:{shards}"), 2)
    assert "was trained on other images or labels" in shown
