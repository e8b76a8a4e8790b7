"""Runs of several real processes, for the tests: started, stopped, killed and compared."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

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


def start(
    processes: int, *arguments: str, module: str = "dml_fast.train", torchrun: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """A job under torchrun, or alone for 0 processes."""
    command = [sys.executable, "-m"]
    if processes:
        command += ["torch.distributed.run", "--nproc-per-node", str(processes)]
        command += [f"--master-port={free_port()}", *torchrun, "-m"]
    return subprocess.Popen(
        [*command, module, *arguments],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Its output, if it ends as it should."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def by_hand(
    count: int,
    *arguments: str,
    each: dict[int, list[str]] | None = None,
    module: str = "dml_fast.train",
) -> list[Any]:
    """(exit code, output) of ranks that are started without torchrun, as a cluster would."""
    port = free_port()
    ranks = []
    for rank in range(count):
        variables = {"RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "LOCAL_RANK": rank}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments, *(each or {}).get(rank, [])],
                env={
                    **os.environ,
                    **ONE_THREAD,
                    "MASTER_ADDR": "127.0.0.1",
                    **{name: str(value) for name, value in variables.items()},
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
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


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    while saved_step(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def ranks_of(folder: Path) -> dict[int, int]:
    """Process ids by rank, of the job that trains in a folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [v[5:] for v in variables if v.startswith(b"RANK=")]
        if str(folder).encode() in command and b"torch.distributed.run" not in command and rank:
            found[int(rank[0])] = int(entry.name)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def stop_at(process: subprocess.Popen[str], folder: Path, step: int) -> str:
    """SIGTERM to torchrun, which always ends with 1 then."""
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
