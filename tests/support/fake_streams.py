"""A stream layer without a GPU: it records its calls, and which tensors must still live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dml_fast.engine.cohort import Cohort
from dml_fast.engine.snapshot import Snapshot


@dataclass
class FakeStreams:
    """Runs everything at once, in order, on the CPU.

    Attributes:
        cohort: whose state a capture must not change, as a real one runs nothing.
        events: ("new", s), ("on", s), ("off", s), ("wait", waiter, other), ("capture", s),
            ("captured", s), ("replay", s).
        watched: tensors made on the main stream for the students; none may die before the join.
    """

    cohort: Cohort | None = None
    events: list[tuple[Any, ...]] = field(default_factory=list)
    watched: list[weakref.ref[Tensor]] = field(default_factory=list)
    refuse: bool = False
    _made: int = 0
    _stack: list[int] = field(default_factory=lambda: [0])

    def current(self) -> int:
        return self._stack[-1]

    def new(self) -> int:
        self._made += 1
        self.events.append(("new", self._made))
        return self._made

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        self.events.append(("on", stream))
        self._stack.append(stream)
        try:
            yield
        finally:
            self._stack.pop()
            self.events.append(("off", stream))

    def wait(self, waiter: int, other: int) -> None:
        self.events.append(("wait", waiter, other))

    def capture(self, stream: int, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run in Python what a replay runs on a GPU; a capture undoes what it ran."""
        assert self.cohort is not None
        before = Snapshot(self.cohort)
        self.events.append(("capture", stream))
        with self.on(stream):
            if self.refuse:
                raise RuntimeError("operation not permitted when stream is capturing")
            result = work()
        self.events.append(("captured", stream))
        before.restore()

        def replay() -> Tensor:
            self.events.append(("replay", stream))
            muted, self.events = self.events, []  # the host sees one launch
            try:
                result.copy_(work())
            finally:
                self.events = muted
            return result

        return replay
