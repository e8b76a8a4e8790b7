"""The kernels of the divergences besides the paper's: short rows, long rows, the backward pass."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    QUIET,
    STEP,
    assert_same,
    assert_solves,
    checked,
    cohort,
    forced,
    fused,
    fused_and_grad,
    in_double,
)
from loss_cases import Case, assert_exact, by_autograd, cases
from torch import Tensor

from dml_fast.kernels import autograd, finish, launch
from dml_fast.kernels.launch_table import Config
from dml_fast.loss import backends, closed_form, linear_mutual_loss, mutual_loss, reference
from dml_fast.loss.problem import Problem

pytestmark = QUIET
OTHERS = ("reverse", "symmetric", "jsd")
INF, NAN = torch.inf, torch.nan
WIDE = STEP + 5  # two tiles of the kernel for long rows

by_backward = partial(by_autograd, fused)


def by_engine(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Gradients as the engine takes them, each scaled on the device by a power of two."""
    scale = torch.tensor([0.5, 2.0, 1.0, 4.0, 8.0], device=DEVICE)[: len(case.logits)]
    losses, grads, _ = fused_and_grad(case.logits, case.target, **case.options, grad_scale=scale)
    return losses, [g / s for g, s in zip(grads, scale, strict=True)]


def weights(*shape: int) -> Tensor:
    return 0.1 + torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


OPTIONS: dict[str, dict[str, Any]] = {
    "tempered": {
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": weights(WIDE),
        "row_weight": weights(3),
        "kl_weight": torch.tensor(1.5),
        "kl_rows": "labelled",
        "peer_reduction": "sum",
    },
    "weighed": {"peer_weight": weights(2, 3) * torch.tensor([[0, 1, 1], [0, 0, 1]])},
    "by row": {"reduction": "none", "ce_weight": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("divergence", OTHERS)
def test_both_passes_are_exact(kernel: str, divergence: str, name: str) -> None:
    logits, target = cohort(3, 3, WIDE)
    if name == "by row":
        logits[0] = logits[0].bfloat16()
        target = torch.nn.functional.one_hot(target, WIDE) * 0.5 + 0.5 / WIDE
    else:
        target[1] = -100
    plain = {"kl_weight": 1.0, "temperature": 1.0, "reduction": "mean", "peer_reduction": "mean"}
    options = {**plain, **OPTIONS[name], "divergence": divergence, "ignore_index": -100}
    if divergence == "jsd":
        options["beta"] = 0.3
    options["teacher_logits"] = [logits.pop().cpu()]
    case = Case([z.float().cpu() for z in logits], target.cpu(), options)
    assert_exact(case, DEVICE, by_backward)
    assert_exact(case, DEVICE, by_engine)


@st.composite
def other_cases(draw: st.DrawFn) -> Case:
    widths = st.sampled_from([1, 2, 7, 33, STEP, STEP + 1])
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    case = draw(cases(dtypes, widths, st.integers(1, 3)))
    case.options["divergence"] = draw(st.sampled_from(OTHERS))
    case.options["kl_rows"] = draw(st.sampled_from(["all", "labelled"]))
    if case.options["divergence"] == "jsd":
        case.options["beta"] = draw(st.sampled_from([0.5, 0.1, 0.95]))
    return case


@pytest.mark.slow
@pytest.mark.parametrize("answer", [by_backward, by_engine], ids=["autograd", "engine"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=other_cases())
def test_every_option_is_exact(kernel: str, answer: Any, case: Case) -> None:
    assert_exact(case, DEVICE, answer)


def assert_both_solve(problem: Problem, **tolerance: Any) -> None:
    """The engine's launch, and the forward and backward passes of autograd."""
    assert_solves(problem, stats="cheap", **tolerance)
    (losses, _, _), saved = launch.launch(problem, with_grad=False, save=True, stats="none")
    assert saved is not None
    grads = [torch.empty_like(z) for z in problem.students]
    launch.launch_gradient(problem, saved, torch.ones_like(losses), grads)
    exact = closed_form.solve(in_double(problem), True, "none").grads
    assert_same(grads, exact, **{"rtol": 1e-5, "atol": 1e-5, **tolerance})


@pytest.mark.parametrize("divergence", OTHERS)
def test_bad_rows_and_masked_classes(kernel: str, divergence: str) -> None:
    """A class that all mask, that a student masks, that a peer masks, and broken students."""
    logits, target = cohort(3, 6, WIDE)
    target.fill_(WIDE - 1)
    for z in logits:
        z[0, :STEP] = -INF
    logits[0][1, 3] = logits[1][2, STEP + 1] = -INF
    logits[0][3, 1], logits[1][3], logits[2][4, STEP] = NAN, -INF, INF
    for z in logits[:2]:
        z[5, 0] = NAN
    weighed = torch.tensor([[0.0, 0, 1], [1, 0, 2], [0.5, 0, 0]], device=DEVICE)
    for options in ({"reduction": "none"}, {"temperature": 2.0, "peer_weight": weighed}):
        problem = checked(logits, target, divergence=divergence, **options)
        assert_both_solve(problem)
    losses, grads, _ = fused_and_grad(logits, target, divergence=divergence, kl_weight=0.0)
    assert losses.isnan().all()
    assert all(g[[0, 1, 2]].isfinite().all() for g in grads)  # not even an infinite one counts


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("students", [1, 8])
def test_one_student_and_eight(kernel: str, students: int, divergence: str) -> None:
    logits, target = cohort(students, 2, 5)
    assert_both_solve(checked(logits, target, divergence=divergence))


@pytest.mark.parametrize("divergence", OTHERS)
def test_students_that_nearly_agree(kernel: str, divergence: str) -> None:
    """Or that are the same: then there is no divergence, and it is not negative."""
    logits, target = cohort(2, 3, WIDE)
    near = [logits[0], logits[0] + 1e-3 * logits[1]]
    wanted = reference.mutual_loss(
        [z.double().cpu() for z in near], target.cpu(), ce_weight=0.0, divergence=divergence
    )
    found = fused_and_grad(near, target, divergence=divergence)[2].kl
    tolerance = 1e-3 if divergence == "jsd" else 1.0  # the others are differences of log p
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=1e-6)
    same = fused_and_grad([near[0]] * 3, target, divergence=divergence)[2].kl
    assert (same >= 0).all()
    assert same.max() < 1e-6


def test_far_logits(kernel: str) -> None:
    logits, target = cohort(3, 2, WIDE)
    for divergence in OTHERS:
        far = [(3e3 * z).round() for z in logits]
        assert_both_solve(checked(far, target, divergence=divergence), atol=0.02)


def test_all_statistics_are_those_of_any_divergence(kernel: str) -> None:
    logits, target = cohort(2, 3, WIDE)
    found = fused_and_grad(logits, target, divergence="reverse", return_stats=True)[2]
    plain = fused_and_grad(logits, target, return_stats=True)[2]
    for name in ("pairwise_kl", "entropy", "mutual_information", "row_mutual_information"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    assert not torch.equal(found.kl, plain.kl)
    assert_solves(checked(logits, target, divergence="symmetric"), stats="all")


@pytest.mark.parametrize("divergence", OTHERS)
def test_sums_over_many_programs(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (finish, launch):
        monkeypatch.setattr(module, "GROUP", finish.tl.constexpr(4))
    monkeypatch.setattr(launch, "FEW", 2)
    monkeypatch.setattr(launch, "choose", lambda *_, **__: Config("one_pass", 1, 16, 1))
    logits, target = cohort(2, 9, 5)
    assert_solves(checked(logits, target, divergence=divergence), stats="cheap")


@pytest.mark.parametrize("divergence", OTHERS)
def test_parts_divide_by_the_whole(kernel: str, divergence: str) -> None:
    logits, target = cohort(2, 3, 7)
    target[1] = -100
    problem = checked(logits, target, divergence=divergence, kl_rows="labelled")
    assert_both_solve(replace(problem, whole=(torch.tensor(3.0, device=DEVICE), 7)))


def test_the_kernels_take_them(caplog: pytest.LogCaptureFixture) -> None:
    logits, target = cohort(2, 3, 5)
    for divergence in OTHERS:
        problem = checked(logits, target, divergence=divergence)
        assert launch.unsupported_reason(problem) is None
        assert backends.find("triton", problem) is autograd
        double = checked([z.double() for z in logits], target, divergence=divergence)
        assert "float64" in str(launch.unsupported_reason(double))
    with caplog.at_level(logging.WARNING, "dml_fast"):
        fused(logits, target, divergence="jsd")
    assert not caplog.records


@pytest.mark.parametrize("divergence", OTHERS)
def test_linear_heads(divergence: str, caplog: pytest.LogCaptureFixture) -> None:
    """By chunks of rows, and in two passes by chunks of classes, which the closed form refuses."""
    logits, target = cohort(2, 5, 9)
    hidden = [torch.eye(5, device=DEVICE) for _ in logits]
    exact = [z.clone().requires_grad_() for z in logits]
    wanted = mutual_loss(exact, target, divergence=divergence, backend="closed_form")
    wanted.sum().backward()
    for memory in ("fast", "lean"):
        weight = [z.T.clone().requires_grad_() for z in logits]
        with caplog.at_level(logging.WARNING, "dml_fast"), forced("one_pass"):
            found = linear_mutual_loss(
                hidden,
                weight,
                target,
                divergence=divergence,
                chunk_rows=3,
                memory=memory,
                backend="triton",
            )
            found.sum().backward()
        torch.testing.assert_close(found, wanted)
        for w, z in zip(weight, exact, strict=True):
            torch.testing.assert_close(w.grad.T, z.grad, rtol=1e-4, atol=1e-6)
    assert not caplog.records
