"""backend="compiled": the closed form as a program of torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from loss_cases import Case, assert_exact, by_autograd, cases
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.loss import compiled, mutual_loss, mutual_loss_and_grad

pytestmark = [pytest.mark.slow, pytest.mark.compat]

loss = partial(mutual_loss, backend="compiled")
loss_and_grad = partial(mutual_loss_and_grad, backend="compiled")


class Programs:
    """Stands in for inductor, which takes seconds a program, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """No program yet, and quickly made ones."""
    counted = Programs()
    monkeypatch.setattr(compiled, "_programs", {})
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    return counted


def cohort(students: int = 3, rows: int = 12, classes: int = 7) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(rows + classes)
    logits = [3 * torch.randn((rows, classes), generator=g) for _ in range(students)]
    return logits, torch.randint(classes, (rows,), generator=g)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_every_option_gives_the_papers_values(case: Case, programs: Programs) -> None:
    assert_exact(case, answer=partial(by_autograd, loss))
    losses, grads, _ = loss_and_grad(case.logits, case.target, **case.options)
    assert_exact(case, answer=lambda _: (losses, grads))


def test_by_inductor() -> None:
    """One program of each function for a real compiler."""
    logits, target = cohort()
    case = Case(logits, target, {**DEFAULTS, "ignore_index": int(target[0])})
    assert_exact(case, answer=partial(by_autograd, loss))
    logits[1][5] = torch.nan
    arguments = {
        "logits": logits,
        "target": target,
        "ignore_index": int(target[0]),
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": torch.rand(7),
        "teacher_logits": torch.randn(1, 12, 7),
        "return_stats": True,
        "grad_scale": torch.tensor(8.0),
    }
    expected = mutual_loss_and_grad(**arguments, backend="closed_form")
    found = loss_and_grad(**arguments)
    assert found[2].finite.tolist() == [True, False, True]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(tuple(a), tuple(b), equal_nan=True)


DEFAULTS = {"kl_weight": 1.0, "temperature": 1.0, "peer_reduction": "mean", "reduction": "mean"}


def test_one_program_whatever_changes_from_step_to_step(programs: Programs) -> None:
    for step, rows in enumerate((12, 8, 33, 2, 64)):
        logits, target = cohort(rows=rows)
        for k, z in enumerate(logits):
            z.requires_grad_(k <= step)  # who is frozen
        if step == 2:
            logits = [z.detach().t().contiguous().t() for z in logits]
        arguments = {"kl_weight": 0.1 + step, "grad_scale": 2.0**step, "return_stats": True}
        expected = mutual_loss_and_grad(logits, target, **arguments, backend="closed_form")
        found = loss_and_grad(logits, target, **arguments)
        torch.testing.assert_close(found[:2], expected[:2])
        torch.testing.assert_close(tuple(found[2]), tuple(expected[2]))
    assert programs.count == 1


def test_a_changing_temperature_takes_three_programs_at_most(programs: Programs) -> None:
    logits, target = cohort()
    for temperature in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5):
        expected = mutual_loss(logits, target, temperature=temperature, backend="closed_form")
        torch.testing.assert_close(loss(logits, target, temperature=temperature), expected)
    assert programs.count <= 3


def test_more_kinds_of_call_than_torch_keeps_programs_of_one_function(programs: Programs) -> None:
    for classes in range(3, 13):
        for _ in range(2):
            logits, target = cohort(classes=classes)
            torch.testing.assert_close(loss(logits, target), mutual_loss(logits, target))
    assert programs.count == 10


def test_batch_dimensions_come_back(programs: Programs) -> None:
    logits, target = cohort()
    deep = [z.reshape(3, 4, 7) for z in logits]
    arguments = {"reduction": "none", "return_stats": True}
    losses, grads, stats = loss_and_grad(deep, target.reshape(3, 4), **arguments)
    assert losses.shape == (3, 3, 4)
    assert grads[0].shape == (3, 4, 7)
    assert stats.row_mutual_information.shape == (3, 4)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_row_or_none_takes_no_program(rows: int, programs: Programs) -> None:
    logits, target = cohort(rows=rows)
    expected = mutual_loss(logits, target, backend="closed_form")
    assert torch.equal(loss(logits, target), expected)
    assert programs.count == 0


def test_within_torch_compile_it_is_part_of_the_callers_program(programs: Programs) -> None:
    logits, target = cohort()
    found = torch.compile(loss, fullgraph=True)(logits, target)
    torch.testing.assert_close(found, mutual_loss(logits, target))
    assert programs.count == 1
    assert not compiled._programs


def test_an_infinite_divergence_does_not_count_when_switched_off(programs: Programs) -> None:
    logits, target = cohort(2)
    logits[0][:, 6] = -torch.inf
    target.clamp_(max=5)
    assert loss(logits, target)[0] == torch.inf
    assert loss(logits, target, kl_weight=0.0).isfinite().all()


def test_a_torch_that_cannot_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 3.99\nmore")

    monkeypatch.setattr(compiled, "_programs", {})
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(UserError, match=r"on Python 3\.99\): use backend='closed_form'$"):
        loss(*cohort())


def test_no_cpp_compiler_is_an_error() -> None:
    code = (
        "import torch; from dml_fast.loss import mutual_loss;"
        "mutual_loss(torch.zeros(2, 3, 4), torch.zeros(3).long(), backend='compiled')"
    )
    nothing = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | nothing | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dml_fast.errors.UserError: backend='compiled' cannot compile here")
    assert "/no/such/compiler" in last
