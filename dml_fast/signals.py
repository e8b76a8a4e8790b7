"""SIGINT and SIGTERM ask the training to stop after its step; a second one ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """Which signal has asked to stop, if any. Install it before the slow imports."""

    def __init__(self) -> None:
        self.signal: int = 0

    def install(self) -> None:
        """Take over SIGINT and SIGTERM for the rest of the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 if nobody asked."""
        return 128 + self.signal if self.signal else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
