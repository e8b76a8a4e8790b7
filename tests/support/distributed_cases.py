"""Runs of several real processes, for the tests: started, stopped, killed and compared."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from processes import Forked, running

from dml_fast.runs import checkpoint
from dml_fast.runs.folder import Run

TESTS = Path(__file__).parent
# 10 steps an epoch
SHORT = {
    "arch": "resnet8",
    "epochs": 2,
    "train_fraction": 0.55,
    "executor": "sequential",
    "seed": 5,
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}


class Job:
    """Ranks that are started without torchrun, as a cluster would. Used as a `subprocess.Popen`.

    Their output is in one file; the exit code is 1 if any rank's is not 0, as torchrun's.
    """

    def __init__(self, count: int, module: str, arguments: tuple[str, ...]) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.ranks = start_ranks(count, module, arguments, stdout=self._output)

    @property
    def returncode(self) -> int | None:
        codes = [rank.poll() for rank in self.ranks]
        return None if None in codes else int(any(codes))

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        end = None if timeout is None else time.monotonic() + timeout
        for rank in self.ranks:
            rank.wait(None if end is None else max(0.0, end - time.monotonic()))
        self._output.seek(0)
        return self._output.read(), None


Process = subprocess.Popen[str] | Job


def start(
    processes: int,
    *arguments: str,
    module: str = "dml_fast.train",
    torchrun: tuple[str, ...] | None = None,
) -> Process:
    """A job of several ranks, or one process for 0; with ``torchrun``'s options under torchrun.

    The ranks of torchrun are new interpreters, which cost seconds: for what torchrun does only.
    """
    if processes and torchrun is None:
        return Job(processes, module, arguments)
    if torchrun is not None:
        launcher = ["--nproc-per-node", str(processes), f"--master-port={free_port()}", *torchrun]
        module, arguments = "torch.distributed.run", (*launcher, "-m", module, *arguments)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return Forked(module, *arguments, env={**os.environ, **ONE_THREAD}, **pipes)


def finish(process: Process, code: int = 0) -> str:
    """Its output, if it ends as it should."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def start_ranks(
    count: int,
    module: str,
    arguments: tuple[str, ...],
    each: dict[int, list[str]] | None = None,
    stdout: Any = subprocess.PIPE,
) -> list[Forked]:
    """The ranks of a job, each with arguments of its own where ``each`` has them."""
    port = free_port()
    ranks = []
    for rank in range(count):
        variables = {"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "LOCAL_RANK": rank}
        variables |= {"MASTER_ADDR": "127.0.0.1", **ONE_THREAD}
        ranks.append(
            Forked(
                module,
                *arguments,
                *(each or {}).get(rank, []),
                env={**os.environ, **{name: str(value) for name, value in variables.items()}},
                stdout=stdout,
                stderr=subprocess.STDOUT,
            )
        )
    return ranks


def by_hand(
    count: int,
    *arguments: str,
    each: dict[int, list[str]] | None = None,
    module: str = "dml_fast.train",
) -> list[Any]:
    """(exit code, output) of each rank of a job."""
    ranks = start_ranks(count, module, arguments, each)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def saved_step(folder: Path) -> int:
    """Of the newest checkpoint that several processes wrote; 0 before the first."""
    try:
        return int(os.readlink(folder / "last.pt").split("_")[1].split("-")[0])
    except OSError:
        return 0


def wait_for_step(process: Process, folder: Path, step: int) -> None:
    while saved_step(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def ranks_of(folder: Path) -> dict[int, int]:
    """Process ids by rank, of the job that trains in a folder."""
    found = {}
    for pid, command, variables in [*running(), *executed()]:
        here = str(folder) in command and "torch.distributed.run" not in command
        if here and (rank := variables.get("RANK")):
            found[int(rank)] = pid
    return found


def executed() -> Iterator[tuple[int, list[str], dict[str, str]]]:
    """Process id, arguments and environment of all processes, as they were executed."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
                variables = os.fsdecode((entry / "environ").read_bytes()).split("\0")
            except OSError:
                continue
            yield int(entry.name), command, dict(v.split("=", 1) for v in variables if "=" in v)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def stop_at(process: Process, folder: Path, step: int) -> str:
    """SIGTERM to a job; its exit code is then 1, as torchrun's always is."""
    wait_for_step(process, folder, step)
    process.send_signal(signal.SIGTERM)
    return finish(process, 1)


def content(folder: Path) -> dict[str, Any]:
    """All that training has made, by name: students, optimizers, sums and metrics, times aside."""
    state = checkpoint.load(folder / "last.pt")
    found: dict[str, Any] = {"step": state["step"], "meter": state["meter"].sum(0)}
    for k, student in enumerate(state["students"]):
        for name, tensor in student["model"].items():
            found[f"{k}.model.{name}"] = tensor
        for name, tensor in student.get("average", {}).items():
            found[f"{k}.average.{name}"] = tensor
        for index, values in student["optimizer"]["state"].items():
            found |= {f"{k}.optimizer.{index}.{name}": value for name, value in values.items()}
        found[f"{k}.scaler"] = student["scaler"]
    lines = Run(folder).metrics()
    assert lines == json.loads(state["history"])
    for line in lines:
        kept = {k: v for k, v in line.items() if k not in ("seconds", "images_per_s")}
        found[f"line {line['epoch']}"] = kept
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the last bit."""
    assert a.keys() == b.keys()
    return [
        name
        for name, value in a.items()
        if not (
            torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        )
    ]


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Of all weights together, relative."""
    names = [name for name, value in a.items() if ".model." in name and value.is_floating_point()]
    apart = sum((a[name].double() - b[name].double()).square().sum().item() for name in names)
    return float((apart / sum(a[name].double().square().sum().item() for name in names)) ** 0.5)


def farthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of any weight, buffer or moment."""
    return max(
        (value.double() - b[name].double()).abs().max().item()
        for name, value in a.items()
        if isinstance(value, torch.Tensor) and name != "meter"
    )
