"""Ranks that die: the others end in seconds, one line names the rank, and the run can continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed_cases import (
    by_hand,
    content,
    differences,
    finish,
    is_alive,
    ranks_of,
    saved_step,
    start,
    stop_at,
    wait_for_step,
)

from dml_fast.foreign import shown

pytestmark = pytest.mark.processes

OPTIONS = (
    "--arch", "resnet8", "--cohort", "4", "--executor", "sequential", "--seed", "4",
    "--train-fraction", "0.7", "--epochs", "4", "--save-every", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(start(0, *OPTIONS, "--out", str(folder)))
    return content(folder)


def test_a_killed_rank_ends_the_others(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    job = start(4, *OPTIONS, "--out", str(folder))
    wait_for_step(job, folder, 8)
    ranks = ranks_of(folder)
    assert sorted(ranks) == [0, 1, 2, 3]
    os.kill(ranks[2], signal.SIGKILL)
    killed = time.monotonic()
    while any(map(is_alive, ranks.values())):
        assert time.monotonic() - killed < 30
        time.sleep(0.05)
    output = finish(job, 1)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert lines[0].startswith("error: rank 2 is gone, killed or lost from the network, at step ")
    assert lines[0].endswith(f"--resume {folder}")
    assert not list(folder.glob("*.safetensors"))
    finish(start(4, "--resume", str(folder)))
    assert not differences(content(folder), undisturbed)


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff [x]")  # the store takes names of any bytes
    job = start(2, *OPTIONS, "--out", str(folder), torchrun=("--max-restarts", "2"))
    for victim, step in ((0, 8), (1, 24)):
        wait_for_step(job, folder, step)
        before = ranks_of(folder)
        os.kill(before[victim], signal.SIGKILL)
        while any(map(is_alive, before.values())):
            time.sleep(0.05)
    output = finish(job)
    assert output.count(f"continuing {shown(folder)}/last.pt at step ") == 2
    assert not differences(content(folder), undisturbed)


@pytest.mark.slow
def test_a_job_without_out_finds_its_folder_again(tmp_path: Path) -> None:
    """A run's name contains the time, which differs after a restart."""
    home = os.getcwd()
    os.chdir(tmp_path)
    try:
        job = start(2, *OPTIONS, "--cohort", "2", torchrun=("--max-restarts", "1"))
        while not (found := list(tmp_path.glob("runs/*"))) or saved_step(found[0]) < 8:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        ranks = {
            int(rank): int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and (rank := _rank_in(entry, tmp_path)) is not None
        }
        os.kill(ranks[1], signal.SIGKILL)
        output = finish(job)
    finally:
        os.chdir(home)
    assert list(tmp_path.glob("runs/*")) == found
    assert f"continuing {found[0].relative_to(tmp_path)}/last.pt" in output


def _rank_in(process: Path, folder: Path) -> str | None:
    """Return the rank of a process that works in a folder, None for others."""
    try:
        if (process / "cwd").resolve() != folder:
            return None
        variables = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)


@pytest.mark.compat
def test_sigterm_saves_on_all_ranks_at_the_same_step(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    output = stop_at(start(2, *OPTIONS, "--out", str(folder), torchrun=()), folder, 9)
    step = saved_step(folder)
    assert output.count(f"stopped at step {step}; continue with --resume {folder}") == 1
    finish(start(4, "--resume", str(folder)))
    assert not differences(content(folder), undisturbed)


def test_one_ranks_signal_stops_all(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """A scheduler may send SIGTERM to one machine only."""
    folder = tmp_path / "run"
    job = start(4, *OPTIONS, "--out", str(folder))
    wait_for_step(job, folder, 8)
    os.kill(ranks_of(folder)[2], signal.SIGTERM)
    assert "stopped at step" in finish(job, 1)
    finish(start(4, "--resume", str(folder)))
    assert not differences(content(folder), undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_told_with_its_rank(tmp_path: Path, rank: int) -> None:
    """Here rank 0 serves the store in which the others look for the reason."""
    model = tmp_path / "breaks.py"
    model.write_text(
        "import os\n"
        "from group_norm_net import GroupNormNet\n"
        "class Breaks(GroupNormNet):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += 1\n"
        f"        if os.environ['RANK'] == '{rank}' and self.calls == 9:\n"
        "            raise ValueError('a bug with caf\\udce9')\n"
        "        return super().forward(x)\n"
        "def build(*, num_classes, in_channels, image_size):\n"
        "    return Breaks(num_classes, in_channels, image_size[0])\n"
    )
    home = os.getcwd()
    os.chdir(tmp_path)
    try:
        ends = by_hand(3, *OPTIONS, "--arch", "breaks:build", "--cohort", "3", "--out", "run")
    finally:
        os.chdir(home)
    assert [code for code, _ in ends] == [1, 1, 1]
    said = [line for _, output in ends for line in output.splitlines() if "error: " in line]
    assert len(said) == 1
    reason = f"error: rank {rank} failed (ValueError: a bug with caf\\xe9), at step "
    assert said[0].startswith(reason)


def test_a_student_that_no_longer_learns_ends_all_ranks_alike(tmp_path: Path) -> None:
    ends = by_hand(
        2,
        *("--arch", "resnet8", "--cohort", "2", "--lr", "1e30", "--max-skipped", "3"),
        *("--log-every", "1", "--warmup", "0", "--out", str(tmp_path / "run")),
    )
    assert [code for code, _ in ends] == [1, 1]
    said = [line for _, output in ends for line in output.splitlines() if "error: " in line]
    assert len(said) == 1
    assert "had non-finite gradients in its last 3 steps" in said[0]


def test_a_late_rank_ends_well(tmp_path: Path) -> None:
    options = ("--arch", "resnet8", "--cohort", "2", "--epochs", "1", "--train-fraction", "0.1")
    run = str(tmp_path / "run")
    (code, said), late = by_hand(2, *options, "--out", run, module="distributed_ending_worker")
    assert code == 0 and f"written to {run}" in said
    assert late == (0, "")


def test_exit_functions_run_in_a_rank_too() -> None:
    program = (
        "import atexit, os\n"
        "from dml_fast.distributed.launch import end\n"
        "os.environ['WORLD_SIZE'] = '2'\n"
        "atexit.register(print, 'farewell')\n"
        "end(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "farewell\n", "")


@pytest.mark.slow
def test_one_process_is_restarted_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (*OPTIONS, "--cohort", "2", "--out", str(folder))
    job = start(1, *options, torchrun=("--max-restarts", "1"))
    while not (folder / "previous.pt").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.01)
    os.kill(ranks_of(folder)[0], signal.SIGKILL)
    assert f"continuing {folder}/last.pt" in finish(job)
    finish(start(0, *options[:-1], str(tmp_path / "straight")))
    assert not differences(content(folder), content(tmp_path / "straight"))
