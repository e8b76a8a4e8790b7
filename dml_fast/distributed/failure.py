"""What the other ranks do when one of them dies: print one line that names it, and end in seconds.

A rank that raises an error writes so into the store before it ends. A rank that is killed cannot,
but its connections close. The first rank to notice asks all others to report in the store, and
names those that do not. On every rank a thread watches the store, since the main thread may be
waiting for a rank that will never answer.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from dml_fast.distributed.launch import Launch, end_at_once
from dml_fast.errors import TrainingError, UserError, reason
from dml_fast.foreign import shown

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_PERIOD_S = 0.3  # between two looks at the store
_GRACE_S = 1.5  # in which survivors report
_LAST_S = 2 * _GRACE_S + 2  # in which all surviving ranks have left


class Watch:
    """Watches the store for the end of other ranks.

    Args:
        store: a connection that nothing else uses, as others may be blocked.
        launch: of this rank.

    Attributes:
        where: returns how far the run is and how it can be continued, for the last line.
    """

    def __init__(self, store: Store, launch: Launch) -> None:
        self._store, self._launch = store, launch
        self._stopped = threading.Event()
        self._leaving = threading.Lock()
        self.where: Callable[[], str] = lambda: ""
        self._thread = threading.Thread(target=self._look, name="dml_fast watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, before the ranks end without an error."""
        self._stopped.set()
        self._thread.join()
        self._part()

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank because of its own error, or because another rank is gone.

        Print one line, unless another rank did. Exit with 2 for a user's mistake, otherwise 1.
        """
        self._leaving.acquire()
        if is_lost(error):
            self._leave_after_loss()
        why = shown(reason(error))
        text = f"rank {self._launch.rank}: {why}"
        if not isinstance(error, UserError | TrainingError):
            text = f"rank {self._launch.rank} failed ({type(error).__name__}: {why})"
        if self._store.add("failures", 1) == 1:
            self._say(f"error: {text}{self.where()}")
        self._store.set("failed", text)
        _tell_torchrun(error)
        self._leave(2 if isinstance(error, UserError) else 1)

    def _leave_after_loss(self) -> NoReturn:
        """End this rank because another is gone; the first rank to notice prints which."""
        try:
            if self._store.check(["failed"]):  # it has printed its own error
                self._leave(1)
            first = self._store.add("lost", 1) == 1
            self._store.set(f"seen/{self._launch.rank}", "")
            if not first:
                self._leave(1)
            time.sleep(_GRACE_S)
            if self._store.check(["failed"]):
                self._leave(1)
            ranks = range(self._launch.size)
            gone = [str(rank) for rank in ranks if not self._store.check([f"seen/{rank}"])]
            who = f"rank {', '.join(gone)}" if gone else "the connection to a rank"
            self._say(f"error: {who} is gone, killed or lost from the network{self.where()}")
        except Exception:  # the store went with it
            server = "torchrun's agent" if self._launch.agent_store else "rank 0"
            self._say(f"error: {server}, which serves the store, is gone{self.where()}")
        self._leave(1)

    def _look(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            try:
                over = self._store.check(["failed"]) or self._store.check(["lost"])
                if over:
                    self._store.set(f"seen/{self._launch.rank}", "")
            except Exception:
                over = not self._stopped.wait(_GRACE_S)
            if over:
                time.sleep(_GRACE_S + 1)  # the main thread may find and print the cause
                with self._leaving:
                    self._leave(1)

    def _leave(self, code: int) -> NoReturn:
        self._part()
        end_at_once(code)  # process groups that wait for a lost rank cannot be destroyed

    def _part(self) -> None:
        """Record in the store that this rank leaves; the rank that serves the store leaves last."""
        last = self._launch.main and not self._launch.agent_store
        with suppress(Exception):
            self._store.add("left", 0 if last else 1)
            end = time.monotonic() + _LAST_S
            while last and self._store.add("left", 0) < self._launch.size - 1:
                if time.monotonic() > end:
                    break
                time.sleep(_PERIOD_S / 3)

    def _say(self, line: str) -> None:
        with suppress(OSError):  # its reader is gone
            print(line, file=sys.__stderr__, flush=True)


def is_lost(error: BaseException) -> bool:
    """Return whether an error comes from a collective that has lost another rank."""
    from torch.distributed import DistError

    text = str(error)
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


def _tell_torchrun(error: BaseException) -> None:
    """Write the error into the file from which torchrun's summary takes the root cause."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)


TIMEOUT = timedelta(minutes=30)
"""After this time, a rank that is alive but does not answer counts as lost."""
