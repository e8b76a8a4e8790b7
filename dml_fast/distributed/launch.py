"""How this process was started: by torchrun, or alone. Nothing here imports torch."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from dml_fast.errors import UserError


@dataclass(frozen=True)
class Launch:
    """How this process was started, from the environment.

    Attributes:
        rank: number of this process, 0..size-1.
        size: number of processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on this machine.
        restarts: how often torchrun has restarted the processes.
        agent_store: whether torchrun itself serves the store at the master's port.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    agent_store: bool = False

    @classmethod
    def from_environment(cls) -> Launch:
        """Read what torchrun sets; without torchrun, return a launch of one process.

        Raises:
            UserError: a variable is missing or is not a number.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        size, rank = _number("WORLD_SIZE"), _number("RANK")
        return cls(
            rank=rank,
            size=size,
            local_rank=_number("LOCAL_RANK", rank),
            local_size=_number("LOCAL_WORLD_SIZE", size),
            restarts=_number("TORCHELASTIC_RESTART_COUNT", 0),
            agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    @property
    def main(self) -> bool:
        """Whether this process is rank 0, which alone writes files and prints."""
        return self.rank == 0


def silence() -> None:
    """Discard all output of this process; rank 0 prints for all."""
    sys.stdout = sys.stderr = open(os.devnull, "w", errors="replace")  # noqa: SIM115


def end(code: int) -> NoReturn:
    """End this process; one of several ranks ends as `multiprocessing` ends its children.

    Functions registered with `atexit` run, then the process exits without finalising Python. With
    finalisation, gloo's threads would abort the process: they release tensors shortly after a
    collective is over, and need the interpreter for that
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """End this process without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader is gone, or the stream is closed
            stream.flush()
    os._exit(code)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UserError(
            f"the environment has {name}={text!r}: start the processes with torchrun, "
            "which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from None
