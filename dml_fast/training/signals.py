"""SIGINT, SIGTERM and a time limit ask the training to stop after its step.

A second signal ends it at once.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_log = logging.getLogger("dml_fast")
_TWICE_S = 3.0  # a signal that soon after the first one is a copy of it


class StopRequest:
    """Handles SIGINT and SIGTERM while inside, and keeps the first one as a request to stop.

    Python leaves signals to the main thread: elsewhere nothing is handled, and one line says so.

    Args:
        twice: whether a signal may come twice, as torchrun passes on what the terminal has already
            sent to all processes.
        seconds: after which `overdue` is true.

    Attributes:
        signal: the number of the first signal; 0 before it.
    """

    def __init__(self, *, twice: bool = False, seconds: float = math.inf) -> None:
        self.signal: int = 0
        self._seconds, self._begun = seconds, time.monotonic()
        self._twice, self._at = twice, 0.0
        self._before: dict[int, Any] = {}
        self._waits = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            _log.warning("this is not the main thread: Ctrl-C and SIGTERM do not stop the run")
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While inside, the first signal ends what is done: nothing is trained yet.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for SIGTERM.
        """
        self._waits = False
        try:
            if self.signal:
                self._end()
            yield
        finally:
            self._waits = True

    def _end(self) -> None:
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(self.exit_code)

    @property
    def overdue(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self._begun >= self._seconds

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, else 0."""
        return 128 + self.signal if self.signal else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and not (self._twice and time.monotonic() - self._at < _TWICE_S):
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._at = number, time.monotonic()
            if not self._waits:
                self._end()
