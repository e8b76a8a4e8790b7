"""SIGINT and SIGTERM ask the training to stop after its step; a second one ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Which signal has asked to stop, if any; a context that takes SIGINT and SIGTERM over."""

    def __init__(self) -> None:
        self.signal: int = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 if nobody asked."""
        return 128 + self.signal if self.signal else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
