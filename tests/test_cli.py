"""What becomes of a command whose output cannot be written, or whose names cannot be printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_cases import QUICK, THREE_EPOCHS, tree
from processes import Forked, run

from dml_fast.foreign import shown

pytestmark = [pytest.mark.processes, pytest.mark.slow]

CPU = ("--device", "cpu", "--executor", "sequential", "--cohort", "2")
ODD = os.fsdecode(b"run\xff $b_$ [x]:smile:")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / ODD
    done = run("dml_fast.train", *QUICK, *CPU, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"written to {shown(folder)}\n")
    assert (folder / "curves.png").is_file()
    return folder


COMMANDS = {
    "json": ("evaluate", "--json"),
    "report": ("report",),
    "safetensors": ("export",),
    "pt2": ("export", "--format", "pt2"),
    "resume": ("train", "--resume"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_of_an_odd_name_is_as_good_as_any(odd: Path, command: str) -> None:
    module, *options = COMMANDS[command]
    done = run(f"dml_fast.{module}", *options, odd)
    assert done.returncode == 0, done.stderr
    if command == "json":
        assert json.loads(done.stdout)["run"] == str(odd)
    else:
        assert "\\xff" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["json", "report", "resume"])
def test_a_result_that_nobody_reads_is_no_error(odd: Path, command: str) -> None:
    module, *options = COMMANDS[command]
    with unread_pipe() as pipe:
        done = run(f"dml_fast.{module}", *options, odd, stdout=pipe)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("command", ["json", "report", "resume"])
def test_a_result_that_a_full_disk_loses_is_named(odd: Path, command: str) -> None:
    """Only training goes on: its results are in files."""
    module, *options = COMMANDS[command]
    with open("/dev/full", "w") as full:
        done = run(f"dml_fast.{module}", *options, odd, stdout=full)
    kind, code = ("warning", 0) if module == "train" else ("error", 2)
    assert done.returncode == code
    [line] = [line for line in done.stderr.splitlines() if "stdout" in line]
    assert line.startswith(f"{kind}: stdout cannot be written to (No space left on device)")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("errors", ["pipe", "full"])
def test_a_run_whose_messages_cannot_be_written_goes_on(tmp_path: Path, errors: str) -> None:
    folder = tmp_path / "run"
    options = (*THREE_EPOCHS, *CPU, "--out", folder)
    if errors == "full":
        with open("/dev/full", "w") as full:
            assert run("dml_fast.train", *options, stdout=full, stderr=full).returncode == 0
    else:  # 2>&1 | head -1
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with Forked("dml_fast.train", *options, **both) as process:
            assert process.stdout is not None
            assert "2 students" in process.stdout.readline()
            process.stdout.close()
            assert process.wait(timeout=240) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    names = {path.name for path in folder.iterdir()}
    assert names >= {"student_0.safetensors", "student_1.safetensors", "curves.png"}
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.parametrize("bad", [False, True])
def test_a_scan_keeps_its_exit_code(tmp_path: Path, bad: bool) -> None:
    folder = tree(tmp_path / "images", images=2)
    if bad:
        (folder / "train" / "class 0" / "0.png").write_bytes(b"no image")
    for options in ((), ("--json",)):
        with unread_pipe() as pipe:
            done = run("dml_fast.data", "scan", folder, *options, stdout=pipe, stderr=pipe)
        assert done.returncode == int(bad)


def test_a_command_without_standard_streams(tmp_path: Path) -> None:
    folder = tree(tmp_path / "images", images=2)
    script = f"exec {sys.executable} -m dml_fast.data scan '{folder}' >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0


def test_output_in_an_encoding_that_lacks_characters(odd: Path) -> None:
    done = run("dml_fast.report", odd, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr


@contextmanager
def unread_pipe() -> Iterator[int]:
    """The end of a pipe to write to, whose reader is gone."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)
