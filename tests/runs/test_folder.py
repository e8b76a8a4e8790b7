"""The run folder and its checkpoints: whole files, refused by name when damaged or foreign."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import checkpoint_state, facts_of_three_classes

from dml_fast import rng
from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.runs import checkpoint
from dml_fast.runs.files import atomic_write
from dml_fast.runs.folder import Run, new_folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.prepare(0)
    config = TrainConfig(arch="resnet8", cohort=2)
    run.describe(config, facts_of_three_classes(), [{"arch": "resnet8", "parameters": 1}] * 2)
    return run


def save(run: Run, step: int, best: bool = False) -> None:
    state = checkpoint_state(step)
    state["students"][0]["model"]["bn.weight"] = torch.full((1000,), float(step))
    checkpoint.save(run, state, best=best)


def test_rotation_keeps_last_previous_and_best(run: Run) -> None:
    for step in range(4):
        save(run, step, best=step == 1)
    steps = {
        name: checkpoint.load(run.checkpoint(name))["step"] for name in ("last", "previous", "best")
    }
    assert steps == {"last": 3, "previous": 2, "best": 1}
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "best.pt", "config.json", "last.pt", "previous.pt",
    ]  # fmt: skip


def test_a_failed_write_leaves_the_old_file(run: Run) -> None:
    save(run, 1)
    with pytest.raises(TypeError):
        checkpoint.save(run, {"step": 2, "bad": (x for x in ())}, best=False)
    assert checkpoint.load(run.checkpoint())["step"] == 1
    assert not list(run.folder.glob(".*"))


def test_files_get_the_mode_of_the_umask(run: Run) -> None:
    old = os.umask(0o027)
    try:
        save(run, 1)
    finally:
        os.umask(old)
    assert run.checkpoint().stat().st_mode & 0o777 == 0o640


def test_a_checkpoints_mark_stays_where_modules_move() -> None:
    """It is in files that exist: with another mark they are refused."""
    assert checkpoint.FORMAT == "dml_fast.checkpoint"


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_offered(run: Run, damage: str) -> None:
    save(run, 1)
    save(run, 2)
    path = run.checkpoint()
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content.clear()
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[content.index(np.float32(2.0).tobytes() * 8) + 3] ^= 1
    else:
        content[:] = b"not a checkpoint"
    path.unlink()  # not through the hard link that previous.pt may be
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert f"{path} is damaged" in str(error.value)
    assert f"use {run.checkpoint('previous')} instead" in str(error.value)
    assert checkpoint.load(run.checkpoint("previous"))["step"] == 1


def test_foreign_files_are_refused(run: Run, tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign\.pt is not a checkpoint of dml_fast"):
        checkpoint.load(tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"nothing\.pt does not exist: restore it"):
        checkpoint.load(tmp_path / "nothing.pt")
    newer = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1}
    torch.save(newer, tmp_path / "newer.pt")
    with pytest.raises(UserError, match="upgrade dml_fast"):
        checkpoint.load(tmp_path / "newer.pt")


def test_checkpoints_of_before_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"  # the format is not the name of a module, which may move
    torch.save(checkpoint_state(7) | {"format": "dml_fast.checkpoint", "version": 2}, path)
    assert checkpoint.load(path)["step"] == 7


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "bomb": Bomb(tmp_path / "mark")}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="could run code"):
        checkpoint.load(tmp_path / "bomb.pt")
    assert not (tmp_path / "mark").exists()
    with pytest.raises(FileNotFoundError):  # the bomb is live
        pickle.loads(pickle.dumps(Bomb(tmp_path / "no" / "mark")))


def test_all_generators_come_back() -> None:
    def draw() -> tuple[object, ...]:
        return torch.rand(3).tolist(), random.random(), np.random.rand(), np.random.randn()

    np.random.randn()  # leaves a cached gaussian
    state = rng.state()
    first = draw()
    assert draw() != first
    rng.set_state(state)
    assert draw() == first


def test_a_taken_folder_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"holds a run already.*--resume"):
        run.prepare(0)


def test_not_a_run(tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match=r"is not a run folder, it has no config\.json"):
        Run.open(tmp_path)
    run.config_file.write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        _ = Run.open(run.folder).config


def test_a_file_in_the_folder_finds_the_run(run: Run) -> None:
    save(run, 1)
    assert Run.open(run.checkpoint()).folder == run.folder


def test_a_full_disk_is_found_before_training(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.prepare(0)
    with pytest.raises(UserError, match=r"needs about \d+ MiB .* MiB free: make room"):
        run.check_writable(shutil.disk_usage(tmp_path).free + 2**30)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=False)
    if done.returncode:
        pytest.skip("a full disk needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tiny_disk: Path) -> None:
    run = Run(tiny_disk / "run")
    run.prepare(0)
    save(run, 1)
    with pytest.raises(OSError, match="No space left"), atomic_write(run.checkpoint()) as file:
        file.write(b"\0" * 2**23)
    assert checkpoint.load(run.checkpoint())["step"] == 1
    assert not list(run.folder.glob(".*"))
    with pytest.raises(UserError, match="make room"):
        run.check_writable(2**23)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\).*--out"):
        Run(tmp_path / "file" / "run").prepare(0)


def test_stale_temporaries_are_swept(run: Run) -> None:
    (run.folder / ".last.pt.x1.tmp").write_text("half")
    run.check_writable(0)
    assert not list(run.folder.glob(".*"))


def test_a_checkpoint_that_is_a_link_to_nothing_takes_no_room(run: Run) -> None:
    run.checkpoint("previous").symlink_to("nowhere")
    run.check_writable(0)


def test_new_folders_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = new_folder(TrainConfig())
    first.mkdir(parents=True)
    second = new_folder(TrainConfig())
    assert second != first
    assert new_folder(TrainConfig(out="x/y")) == Path("x/y")
