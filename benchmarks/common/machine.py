"""Where and from what a figure comes: the head of every report."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dml_fast


def provenance(device: torch.device) -> dict[str, Any]:
    """Date, commit, command, machine and versions, ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
        "machine": {
            "device": device_name(device),
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "dml_fast": dml_fast.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: installed(name) for name in ("triton", "liger-kernel", "quack-kernels")},
        },
    }


def command() -> str:
    """Return the command line of this process, ready to be typed in the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = sys.argv[:1] if spec is None else ["-m", spec.name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def commit() -> str | None:
    """What is checked out here, "-dirty" if changed; $DML_FAST_COMMIT where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DML_FAST_COMMIT")
    return found.stdout.strip()


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name for people."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
