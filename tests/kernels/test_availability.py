"""When Triton can run, and the reason when it cannot."""

from __future__ import annotations

import pytest
import torch

from dml_fast.kernels import availability
from dml_fast.kernels.availability import unavailable_reason

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _triton_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: object())


def test_without_triton_no_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    for device in (CPU, CUDA):
        assert "not installed" in (unavailable_reason(device) or "")


@pytest.mark.parametrize(("value", "works"), [("1", True), ("0", False), ("true", False)])
def test_the_cpu_needs_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, value: str, works: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    reason = unavailable_reason(CPU)
    assert reason is None if works else "TRITON_INTERPRET=1" in (reason or "")


def test_the_cpu_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in (unavailable_reason(CPU) or "")


def test_another_kind_of_device_is_named() -> None:
    assert "meta tensors" in (unavailable_reason(torch.device("meta")) or "")


def test_a_machine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in (unavailable_reason(CUDA) or "")


@pytest.mark.parametrize(("capability", "works"), [((6, 1), False), ((7, 0), True), ((9, 0), True)])
def test_old_gpus_are_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], works: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    reason = unavailable_reason(CUDA)
    assert (reason is None) if works else "Some GPU has compute capability 6.1" in (reason or "")


@pytest.mark.gpu
def test_this_machines_gpu_works() -> None:
    assert unavailable_reason(CUDA) is None


def test_the_tests_run_where_triton_can() -> None:
    """conftest.py has set the interpreter on a machine without CUDA."""
    assert unavailable_reason(CUDA if torch.cuda.is_available() else CPU) is None
