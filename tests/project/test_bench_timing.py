"""The stopwatch for GPUs, on a device that is a queue: the host cannot starve it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import NODES, FakeDevice
from torch import nn

from benchmarks import bench_loss, bench_step
from benchmarks.common import clocks, counting, tables, timing
from benchmarks.common.device import Call, Captured, node_kinds
from benchmarks.common.loss_case import LossCase
from benchmarks.common.step_case import SGD, StepCase, naive_step
from benchmarks.peers import loss as peers
from benchmarks.peers.hour import hour_step, in_one_graph


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A GPU for the scripts: what only a real one can tell is made up."""
    device = FakeDevice()
    state = {"sm_mhz": 1.0, "memory_mhz": 2.0, "power_w": 3.0, "celsius": 4.0, "throttle": []}
    monkeypatch.setattr(timing, "Cuda", lambda: device)
    monkeypatch.setattr(timing, "copy_gb_per_s", lambda *_: 3000.0)
    monkeypatch.setattr(clocks, "read", lambda: state)
    monkeypatch.setattr(counting, "launched", lambda call: counting.Launched(9, 2))
    monkeypatch.setattr(counting, "device_bytes", lambda call: 5)
    monkeypatch.setattr(torch.cuda, "synchronize", device.wait)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: int(1e6 * device.now))
    return device


def test_a_table_of_losses_on_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: FakeDevice) -> None:
    case = LossCase((2, 3, 5), torch.float32, torch.device("cpu"))
    case.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(bench_loss, "CIFAR", [(2, 3, 5)])
    answer = [x.detach() for x in (case._losses, *case._grads)]

    def contestant(name: str, *_: Any) -> peers.Contestant:
        host_ms, device_ms = {"naive": (4.0, 0.8), "careful": (2.0, 0.3), "triton": (0.5, 0.1)}[
            name
        ]

        def run(*_: Any) -> Any:
            gpu.call(host_ms, device_ms)()
            return answer[0], answer[1:]

        return peers.Contestant(name, run, waits=name == "naive")

    monkeypatch.setattr(peers, "contestant", contestant)
    result = bench_loss.compare(case, ["naive", "careful", "triton"], 0)
    rows = {row["name"]: row for row in result["contestants"]}
    assert result["rounds"] == 15
    ours = rows["triton"]
    assert [ours["median_ms"], ours["graph_ms"]] == pytest.approx([0.1, 0.1])
    assert ours["host_ms"] == pytest.approx(0.5) and ours["hidden"] == 1
    assert ours["nodes"] == NODES and ours["kernels"] == 9
    assert "graph_ms" not in rows["naive"]
    text = bench_loss.describe(result)
    assert "the best baseline: careful" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| triton"))
    cells = [cell.strip() for cell in line.split("|")[2:]]
    assert cells[:6] == ["3.00", "8.00", "0.1", "3.00", "100", "3"]
    assert "Before and after: SM 1, 1 MHz" in text


def test_a_table_of_steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: FakeDevice) -> None:
    monkeypatch.setattr(bench_step, "DEVICE", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(bench_step, "matrix_gflop_per_s", lambda *_: 1000.0)
    spent = {  # host and device, ms
        "naive fp32": (200.0, 20.0),
        "hour graph bf16 + compile": (0.05, 9.0),
        "graph bf16": (0.05, 6.0),
        "one student graph bf16": (0.05, 3.0),
    }

    class Case(StepCase):
        def contestant(self, name: str) -> Any:
            work = gpu.call(*spent[name])

            def step() -> torch.Tensor:
                work()
                return torch.ones(self.count(name))

            return step

        def flops(self) -> int:
            return 4 * 10**9

    case = Case("resnet8", 4, 8, torch.device("cpu"))
    result = bench_step.compare(case, list(spent), 0)
    rows = {row["name"]: row for row in result["contestants"]}
    assert {name: row["median_ms"] for name, row in rows.items()} == pytest.approx(
        {
            "naive fp32": (3 * 200 + 20) / 3,  # what the host takes, as a user has it
            "hour graph bf16 + compile": 9.0,
            "graph bf16": 6.0,
            "one student graph bf16": 3.0,
        }
    )
    assert "hidden" not in rows["naive fp32"] and rows["graph bf16"]["hidden"] == 1
    assert rows["graph bf16"]["gflop_per_s"] == pytest.approx(4 / 6 * 1000)
    assert rows["one student graph bf16"]["gflop_per_s"] == pytest.approx(1 / 3 * 1000)
    assert rows["graph bf16"]["moves"] == 2
    text = bench_step.describe(result)
    assert "the best baseline: hour graph bf16 + compile" in " ".join(text.split())
    text = " ".join(text.split())
    assert bench_step.NO_HOUR not in text and tables.STARVED not in text
    del result["clocks"]
    result["contestants"] = [{"name": "graph bf16", "median_ms": 8.4, "kernels": 9}]
    text = " ".join(bench_step.describe(result).split())  # a report from before
    assert bench_step.NO_HOUR in text and tables.STARVED in text


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
