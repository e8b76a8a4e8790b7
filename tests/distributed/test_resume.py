"""A run continues with other processes than it was saved with, and ends as if undisturbed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from distributed_cases import content, differences, farthest, finish, start, stop_at
from PIL import Image

from dml_fast.cli import run as run_command
from dml_fast.errors import UserError
from dml_fast.evaluate import main as evaluate
from dml_fast.predict import main as predict
from dml_fast.runs import checkpoint
from dml_fast.train import main as train

pytestmark = pytest.mark.processes

STEPS = 12  # per epoch: 4 * 12 in all
OPTIONS = (
    "--arch", "resnet8", "--cohort", "4", "--amp", "--executor", "sequential", "--seed", "3",
    "--train-fraction", "0.7", "--epochs", "4", "--save-every", "4", "--kl-warmup", "2.5",
)  # fmt: skip
GROUP_NORM = ("--arch", "group_norm_net:build", "--cohort", "2", "--no-amp", "--lr", "0.02")


def straight(folder: Path, *options: str) -> dict[str, Any]:
    finish(start(0, *OPTIONS, *options, "--out", str(folder)))
    return content(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return straight(tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.slow
def test_saved_on_four_resumed_on_two_and_on_one(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    output = stop_at(start(4, *OPTIONS, "--out", str(folder)), folder, 9)
    assert output.count(f"continue with --resume {folder}") == 1
    output = stop_at(start(2, "--resume", str(folder)), folder, 22)
    assert "saved on a mesh of 4x1 and continues on 2x1" in output
    assert (folder / "last.pt").is_symlink()
    finish(start(0, "--resume", str(folder)))
    assert not (folder / "last.pt").is_symlink()
    assert not differences(content(folder), undisturbed)
    kept = {os.readlink(p) for p in folder.glob("*.pt") if p.is_symlink()}
    assert {path.name for path in folder.glob("checkpoint_*")} == kept


@pytest.mark.slow
def test_saved_on_one_resumed_on_four(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    alone = start(0, *OPTIONS, "--out", str(folder))
    while not (folder / "previous.pt").exists():
        assert alone.poll() is None, alone.communicate()[0]
    alone.send_signal(signal.SIGTERM)
    finish(alone, 143)
    finish(start(4, "--resume", str(folder)))
    assert not differences(content(folder), undisturbed)


# Rows without a label, in float64. In fp32, 102 steps on 1x1 and on 1x2 end with weights 1e-4 to
# 2e-3 apart for seeds 3, 6, 8 and 9 of 0..9, and at most 4e-7 for the others. That is rounding: in
# float64 seeds 0..4, 6, 8 and 9 end less than 1e-15 apart, and in fp32 with GELU for ReLU these
# four less than 5e-7. Weights were compared after each step, and activations where they first jump
# (steps 53, 81, 49 and 51 of the four): one of them, less than 5e-7 from 0, has another sign.
UNLABELLED = ("--labels-per-class", "12", "--unlabelled-share", "0.625")
PARTS = ("--accumulate", "2", "--clip-norm", "0.5", "--no-decay", "norm,bias")
DOUBLE = ("--arch", "group_norm_net:build_double", *GROUP_NORM[2:])
AVERAGES = ("--ema", "0.9", "--teach-with", "ema", "--weights", "ema")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "rows", "sharded", "tolerance"),
    [
        (DOUBLE, UNLABELLED, (), 1e-12),
        (DOUBLE, (*PARTS, *AVERAGES), ("--fsdp",), 1e-12),
    ],
    ids=["ddp, rows without a label, float64", "fsdp, parts, averages, float64"],
)
def test_another_mesh_with_columns(
    tmp_path: Path,
    network: tuple[str, ...],
    rows: tuple[str, ...],
    sharded: tuple[str, ...],
    tolerance: float,
) -> None:
    expected = straight(tmp_path / "straight", *network, *rows)
    folder = tmp_path / "run"
    first = (*OPTIONS, *network, *rows, *sharded, "--out", str(folder), "--mesh", "2x2")
    stop_at(start(4, *first), folder, 9)
    again = ("--resume", str(folder), *network[:2])  # a run's own code must be named again
    stop_at(start(2, *again, "--mesh", "1x2", *sharded), folder, 22)
    output = stop_at(start(2, *again, "--mesh", "2x1"), folder, 34)
    seen = "32 images in place of 16" if PARTS[0] in rows else "64 images in place of 32"
    assert f"(BatchNorm, triplets, mixup) sees {seen}" in output
    finish(start(0, *again))
    found = content(folder)
    assert differences(found, expected)  # roundings
    assert farthest(found, expected) < tolerance


@pytest.mark.slow
def test_columns_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """With BatchNorm: the statistics are the first column's, and the checkpoint has all of them."""
    mesh = ("--mesh", "1x2", "--cohort", "2")
    finish(start(2, *OPTIONS, *mesh, "--out", str(tmp_path / "straight")))
    folder = tmp_path / "run"
    stop_at(start(2, *OPTIONS, *mesh, "--out", str(folder)), folder, 9)
    output = finish(start(2, "--resume", str(folder)))  # on the run's own mesh, not on 2x1
    assert "mesh 1x2" in output and "in place of" not in output
    assert not differences(content(folder), content(tmp_path / "straight"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of two processes."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    short = ("--epochs", "1", "--cohort", "2")
    finish(start(2, *OPTIONS, *short, "--out", str(folder)))
    return folder


def test_commands_read_what_several_processes_wrote(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate([str(saved)]) == 0
    assert "ensemble" in capsys.readouterr().out
    Image.new("L", (8, 8)).save(saved / "black.png")
    for student in ("0", "1", "ensemble"):
        assert predict([str(saved), str(saved / "black.png"), "--student", student, "--out=-"]) == 0
        assert "black.png," in capsys.readouterr().out
    assert train(["--resume", str(saved / "last.pt")]) == 0  # it is complete


@pytest.mark.parametrize("part", [".metadata", "__1_0.distcp"])
@pytest.mark.parametrize("damage", ["removed", "cut", "garbled", "one bit"])
def test_a_damaged_checkpoint_is_refused(
    part: str, damage: str, saved: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(saved), str(run)], check=True)
    path = run / "last.pt" / part
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        damaged = {"cut": data[: len(data) // 2], "garbled": b"\0" * len(data), "one bit": flipped}
        path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"last\.pt (is damaged|was not loaded)"):
        checkpoint.load(run / "last.pt")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/dml_fast_bomb",))


def test_an_index_that_could_run_code_is_not_run(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(saved), str(run)], check=True)
    (run / "last.pt" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="objects that could run code"):
        checkpoint.load(run / "last.pt", verify=False)
    assert not Path("/tmp/dml_fast_bomb").exists()


def test_a_mesh_that_does_not_fit_is_refused(
    saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(train, ["--resume", str(saved), "--mesh", "2x1"]) == 2
    assert "needs 2 processes" in capfd.readouterr().err
