"""Training in a process of its own, to be killed."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from processes import Forked


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return Forked("dml_fast.train", *options, cwd=folder.parent, **pipes)


def newest(folder: Path) -> int:
    """Changes whenever a checkpoint is written."""
    last = folder / "last.pt"
    return last.stat().st_ino if last.exists() else 0


def wait_for_checkpoints(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    seen = newest(folder)
    for _ in range(count):
        while newest(folder) == seen:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        seen = newest(folder)
