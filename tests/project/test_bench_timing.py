"""The stopwatch for GPUs, on a device that is a queue: the host cannot starve it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common import clocks, kinds, tables, timing
from benchmarks.common.device import Call, Captured, node_kinds
from benchmarks.common.step_case import SGD, StepCase, naive_step
from benchmarks.peers import loss as peers
from benchmarks.peers.hour import hour_step, in_one_graph

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


def test_the_device_sleeps_before_the_flush_and_the_clock_starts_after_it() -> None:
    device = FakeDevice()
    stopwatch = timing.DeviceTime(cold=True, device=device)
    call = device.call(host_ms=0.7, device_ms=0.012)
    stopwatch(call)
    device.said.clear()
    reading = stopwatch(call)
    assert device.said == ["sleep", "flush", "event", "call", "event"]
    assert device.slept[-1] == pytest.approx(1.4)  # twice what the host takes
    assert reading.ms == pytest.approx(0.012)
    assert reading.host_ms == pytest.approx(0.7)
    assert reading.hidden is True


def test_without_the_sleep_the_host_would_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "sleep", lambda self, ms: None)
    device = FakeDevice()
    reading = timing.DeviceTime(cold=True, device=device)(device.call(0.7, 0.012))
    assert reading.ms > 0.6
    assert reading.hidden is False


def test_a_slower_host_gets_a_longer_sleep() -> None:
    device = FakeDevice()
    stopwatch = timing.DeviceTime(cold=False, device=device)
    host_ms = [1.0]

    def call() -> None:
        device.now += host_ms[0]
        device.queue(0.5)

    stopwatch(call)
    host_ms[0] = 3.0  # more than twice as long
    reading = stopwatch(call)
    assert reading.hidden and reading.ms == pytest.approx(0.5)
    assert device.slept[-2:] == [pytest.approx(2.0), pytest.approx(4.0)]
    stopwatch(call)
    assert device.slept[-1] == pytest.approx(6.0)


def test_a_call_that_waits_cannot_hide_and_the_table_says_so() -> None:
    device = FakeDevice()

    def waits() -> None:
        device.queue(0.1)
        device.wait()
        device.now += 2.0
        device.queue(0.1)

    stopwatch = timing.DeviceTime(cold=False, device=device)
    readings = [stopwatch(waits) for _ in range(3)]
    assert not any(reading.hidden for reading in readings)
    assert len(device.slept) == timing.ATTEMPTS + 2  # it is not tried again and again
    row = {"name": "liger", **timing.figures(readings)}
    assert row["median_ms"] == pytest.approx(2.2)
    (remark,) = tables.remarks({"contestants": [row, {"name": "x", "hidden": 1.0}]})
    assert "contain the host's: liger." in remark


def test_a_graph_is_timed_by_the_slope_of_two() -> None:
    device = FakeDevice()
    calls: dict[str, Call] = {"a": device.call(1.0, 0.005), "b": device.call(0.1, 0.04)}

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    timed, refusals = timing.in_graphs(calls | {"liger": waits}, 0, device)
    assert refusals == {"liger": "operation not permitted when stream is capturing"}
    assert len(timed["a"].ms) == timing.ROUNDS["cuda"][0] >= 15
    assert timed["a"].ms == pytest.approx([0.005] * len(timed["a"].ms))
    assert timed["b"].ms == pytest.approx([0.04] * len(timed["b"].ms))
    assert timed["a"].nodes == NODES  # what a graph has once is not of a call


def test_figures_are_of_one_call_where_a_reading_has_many() -> None:
    readings = [timing.Reading(40.0, 2.0, True), timing.Reading(60.0, 4.0, False)]
    found = timing.figures(readings, 20)
    assert found == {"median_ms": 2.5, "min_ms": 2.0, "host_ms": pytest.approx(0.15), "hidden": 0.5}
    assert timing.figures([timing.Reading(3.0)]) == {"median_ms": 3.0, "min_ms": 3.0}
    seen: list[int] = []
    assert timing.repeated(lambda: seen.append(1) or len(seen), 3)() == 3


class FakeDriver:
    """Two functions of libcuda, for a graph with that handle."""

    def __init__(self, graph: int, kinds_of: list[int]) -> None:
        self.graph, self.kinds_of = graph, kinds_of

    def cuGraphGetNodes(self, graph: ctypes.c_void_p, nodes: Any, count: Any) -> int:
        if graph.value != self.graph:
            return 400
        count._obj.value = len(self.kinds_of)
        for i in range(len(self.kinds_of) if nodes is not None else 0):
            nodes[i] = 1000 + i
        return 0

    def cuGraphNodeGetType(self, node: ctypes.c_void_p, kind: Any) -> int:
        assert node.value is not None
        kind._obj.value = self.kinds_of[node.value - 1000]
        return 0


def test_all_nodes_of_a_graph_are_read_from_the_driver() -> None:
    driver = FakeDriver(2**40 + 5, [2, 0, 0, 1, 5])
    assert node_kinds(2**40 + 5, driver) == [2, 0, 0, 1, 5]
    with pytest.raises(RuntimeError, match="driver says 400"):
        node_kinds(7, driver)


def test_clocks_are_read_and_what_throttles_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        assert command[1] == "--id=GPU-1"
        return SimpleNamespace(stdout="1755, 2619, 412.50, [N/A], 0x0000000000000005\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(clocks, "_uuid", lambda: "GPU-1")
    device = FakeDevice()
    found = clocks.read(device)
    assert device.slept  # so it is awake meanwhile
    assert found == {
        "sm_mhz": 1755.0,
        "memory_mhz": 2619.0,
        "power_w": 412.5,
        "celsius": None,
        "throttle": ["power cap"],  # the other bit says that it is idle
    }
    text = clocks.describe({"before": found | {"throttle": []}, "after": found | {"power_w": None}})
    assert text == (
        "Before and after: SM 1755, 1755 MHz; memory 2619, 2619 MHz; 412.5, ? W; "
        "throttled: power cap."
    )


def test_where_nobody_knows_the_clocks_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(clocks, "_uuid", lambda: "GPU-1")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = clocks.read(FakeDevice())
    assert "nvidia_smi: FileNotFoundError" in found["absent"] and "nvml: " in found["absent"]
    assert "not recorded (nvidia_smi" in clocks.describe({"before": found, "after": found})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize", "conv"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NHWC<__nv_bfloat16, int>", "norm"),
        ("triton_poi_fused__native_batch_norm_legit_functional_relu_3", "norm"),
        ("triton_red_fused_add_convolution_backward_7", "pointwise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
            "pointwise",
        ),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
            "copy",
        ),
        ("Memset (Device)", "copy"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedOptimizer, FusedSgdMathFunctor>",
            "optimizer",
        ),
        ("one_pass", "loss"),
        ("who_knows", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(name: str, kind: str) -> None:
    assert kinds.kind_of(name) == kind
    assert kinds.by_kind([(name, 2.0), (name, 3.0)])[kind] == {"time": 5.0, "count": 2.0}


def test_the_best_baseline_is_the_fastest_that_is_not_ours() -> None:
    rows: list[tables.Row] = [
        {"name": "naive", "median_ms": 8.0, "graph_ms": 4.0},
        {"name": "careful + max-autotune", "median_ms": 3.0, "graph_ms": 2.0},
        {"name": "careful + compile", "left_out": "absent"},
        {"name": "closed_form + compile", "median_ms": 1.0},
        {"name": "triton", "median_ms": 2.0, "graph_ms": 0.5},
    ]
    found = {row["name"]: row for row in tables.compared(rows, peers.is_baseline)}
    assert found["triton"]["best_over_this"] == 1.5
    assert found["triton"]["best_over_this_in_graph"] == 4.0
    assert "best_over_this" not in found["careful + compile"]
    assert "\n+" not in tables.prose("careful + compile, " * 40)  # Markdown would make a list of it
    heading = tables.describe(list(found.values()), [tables.BEST, tables.NAIVE]).splitlines()[0]
    assert "best/this" in heading and "naive/this" not in heading


def test_one_student_has_a_loss_in_every_way() -> None:
    z, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, 2])
    expected = torch.nn.functional.cross_entropy(z, target)
    for losses in (peers.naive, peers.careful):
        torch.testing.assert_close(losses([z], target), expected.view(1))
    with pytest.raises(peers.AbsentError, match="one student"):
        peers.contestant("quack", torch.device("cpu"), 2)
    with pytest.raises(peers.AbsentError, match="need a GPU"):
        peers.contestant("quack", torch.device("cpu"), 1)


def test_the_graph_of_an_hour_starts_from_the_first_weights() -> None:
    """Its warm-up leaves no trace, momentum included: three steps give the naive loop's losses."""

    @dataclass
    class Layer(FakeDevice):
        def capture(self, call: Call, repeats: int) -> Captured:
            return Captured(call, None)

    def models() -> list[nn.Module]:
        torch.manual_seed(0)
        return [
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
            for _ in range(2)
        ]

    case = StepCase("resnet8", 2, 6, torch.device("cpu"))
    case.images, case.target = torch.randn(6, 3, 4, 4), torch.randint(5, (6,))
    naive = naive_step(case, models(), None, compiled=False)
    mine = models()
    optimizer = torch.optim.SGD([p for m in mine for p in m.parameters()], **SGD, fused=True)
    step = hour_step(mine, case.images, case.target, optimizer, None, compiled=False)
    replay = in_one_graph(step, mine, optimizer, Layer())
    for _ in range(3):
        torch.testing.assert_close(replay(), naive())
