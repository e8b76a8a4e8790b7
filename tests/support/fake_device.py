"""A CUDA device for benchmarks without a GPU: a queue of work, and a host with a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.common.device import Call, Captured

FLUSH_MS = 0.09
LAUNCH_MS = 0.05  # of a graph
NODES = 3  # of a call, a fill among them


@dataclass
class FakeEvent:
    device: FakeDevice
    at: float = -1.0

    def record(self) -> None:
        self.device.said.append("event")
        self.at = max(self.device.now, self.device.free_at)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@dataclass
class FakeDevice:
    """A queue of work: the host's time goes on by what it does, the device's by what it has to."""

    now: float = 0.0
    free_at: float = 0.0
    queued: float = 0.0
    said: list[str] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def clock_ms(self) -> float:
        return self.now

    def wait(self) -> None:
        self.now = max(self.now, self.free_at)

    def queue(self, ms: float) -> None:
        self.free_at = max(self.now, self.free_at) + ms
        self.queued += ms

    def sleep(self, ms: float) -> None:
        self.said.append("sleep")
        self.slept.append(ms)
        self.queue(ms)

    def flush(self) -> None:
        self.said.append("flush")
        self.queue(FLUSH_MS)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def warm_up(self, call: Call, times: int) -> None:
        for _ in range(times):
            call()

    def capture(self, call: Call, repeats: int) -> Captured:
        before = self.now, self.free_at
        queued = self.queued
        for _ in range(repeats):
            call()
        work_ms = self.queued - queued
        self.now, self.free_at = before  # a capture runs nothing

        def replay() -> None:
            self.now += LAUNCH_MS
            self.queue(0.01 + work_ms)

        return Captured(replay, 1 + NODES * repeats)

    def call(self, host_ms: float, device_ms: float) -> Callable[[], None]:
        """A call of one kernel, which the host takes that long to queue."""

        def run() -> None:
            self.said.append("call")
            self.now += host_ms
            self.queue(device_ms)

        return run
