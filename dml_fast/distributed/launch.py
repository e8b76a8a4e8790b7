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
    """What the launcher says in the environment.

    Attributes:
        rank: of this process, 0..size-1.
        size: number of processes.
        local_rank: of this process on its machine.
        local_size: processes on this machine.
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
        """As torchrun sets it; alone where it does not.

        Raises:
            UserError: a variable is missing or no number.
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
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def silence() -> None:
    """Take the mouth from a rank whose mistakes rank 0 reports."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def end(code: int) -> NoReturn:
    """End this process; one of several ranks as `multiprocessing` ends its children.

    What was registered with `atexit` runs, then the process is gone: were Python taken down, gloo's
    threads, which let go of tensors a moment after a collective is over and need the interpreter
    for it, would abort the process (https://github.com/pytorch/pytorch/issues/190489).
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """End this process, whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
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
