"""A loop of rounds that is killed, in rounds and between them, ends as an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed_cases import finish
from kill_cases import newest
from processes import Forked

pytestmark = [pytest.mark.processes, pytest.mark.slow]

OPTIONS = (
    "--simulate --start 20 --acquire 10 --rounds 2 --arch resnet8,resnet8 --batch-size 16 "
    "--epochs 3 --epoch-steps 12 --save-every 3 --train-fraction 0.2 --device cpu --seed 1"
)


def start(folder: Path) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return Forked("dml_fast.select", *OPTIONS.split(), "--out", folder, **pipes)


def wait(process: subprocess.Popen[str], ready: Callable[[], object]) -> None:
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)


def finished(folder: Path) -> int:
    lines = folder / "rounds.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def test_killed_in_rounds_and_between_them(tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "rounds"
    undisturbed = start(straight)

    process = start(folder)
    wait(process, lambda: newest(folder / "round-00"))
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on with this round" in finish(process, 128 + signal.SIGTERM)
    assert finished(folder) == 0

    process = start(folder)
    wait(process, lambda: finished(folder) == 1)  # round 1 has not begun
    process.kill()
    finish(process, -signal.SIGKILL)
    assert not newest(folder / "round-01")

    process = start(folder)
    for _ in range(3):  # its third checkpoint is within the first epoch
        seen = newest(folder / "round-01")
        wait(process, lambda seen=seen: newest(folder / "round-01") != seen)  # type: ignore[misc]
    process.kill()
    finish(process, -signal.SIGKILL)
    assert finished(folder) == 1

    output = finish(start(folder))
    assert "continuing" in output
    assert "round 0/2" not in output
    finish(undisturbed)
    assert finished(straight) == 3
    for name in ("rounds.jsonl", "labels-02.tsv", "round-02/student_0.safetensors"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    assert (folder / "rounds.png").exists()
