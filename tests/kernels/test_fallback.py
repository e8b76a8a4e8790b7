"""What the Triton kernels do not take goes to the closed form, and a log line says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, QUIET, assert_same, checked, cohort

from dml_fast.kernels import autograd
from dml_fast.loss import backends, mutual_loss, mutual_loss_and_grad, native

pytestmark = QUIET


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(backends, "_reasons", {})


@pytest.fixture
def interpreted_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def call(
    students: int, teachers: int = 0, rows: int = 3, dtype: Any = torch.float32, **options: Any
) -> Any:
    logits, target = cohort(students + teachers, rows, 4, dtype)
    if options:
        target = torch.nn.functional.one_hot(target.long().clamp(min=0), 4)
    return {
        "logits": logits[:students],
        "target": target,
        "teacher_logits": logits[students:],
        **options,
    }


CASES = {
    "nine students": ({"students": 9}, "8 students and teachers at most"),
    "with teachers": ({"students": 6, "teachers": 3}, "8 students and teachers at most"),
    "float64": ({"students": 2, "dtype": torch.float64}, "float64"),
    "empty": ({"students": 2, "rows": 0}, "the batch is empty"),
    "several labels": ({"students": 2, "distribution": "bernoulli"}, "do not exclude each other"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_steps_in_and_says_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    shape, reason = CASES[name]
    arguments = call(**shape)
    expected = mutual_loss_and_grad(**arguments, backend="closed_form")
    with caplog.at_level(logging.WARNING, "dml_fast"):
        found = mutual_loss_and_grad(**arguments, backend="triton")
        losses = mutual_loss(**arguments, backend="triton")
    assert torch.equal(losses, expected[0])
    assert_same(found, expected, rtol=0, atol=0)
    (record,) = caplog.records
    assert record.getMessage().startswith("mutual loss: the closed form in place of")
    assert reason in record.getMessage()


@pytest.mark.usefixtures("interpreted_elsewhere")
def test_no_triton_for_the_cpu_without_its_interpreter(caplog: pytest.LogCaptureFixture) -> None:
    arguments = {name: to_cpu(value) for name, value in call(2).items()}
    found = mutual_loss(**arguments, backend="triton")
    assert torch.equal(found, mutual_loss(**arguments, backend="closed_form"))
    (record,) = caplog.records
    assert "TRITON_INTERPRET=1" in record.getMessage()


def to_cpu(value: Any) -> Any:
    return [one.cpu() for one in value] if isinstance(value, list) else value.cpu()


@pytest.mark.parametrize(("students", "teachers"), [(8, 0), (5, 3), (1, 0)])
def test_eight_distributions_are_the_kernels_own(
    students: int, teachers: int, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = call(students, teachers)
    assert backends.find("triton", checked(**arguments)) is autograd
    found = mutual_loss(**arguments, backend="triton")
    assert not caplog.records
    expected = mutual_loss(**arguments, backend="closed_form")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_kernels_where_they_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    backend = backends.find("auto", checked(**call(2)))
    assert backend is (autograd if DEVICE.type == "cuda" else native)
    assert not caplog.records
