"""The Triton kernels against float64 by the rule of loss_cases.py, in every option and layout.

What they share with the closed form is in test_loss_bad_rows.py, test_loss_properties.py and
test_loss_stats.py, which run on both kernels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    INTERPRETED,
    KERNELS,
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
    on_device,
)
from loss_cases import Case, assert_exact, by_autograd, cases
from torch import Tensor

from dml_fast.kernels import autograd, finish, launch
from dml_fast.kernels.launch_table import Config, choose
from dml_fast.loss import closed_form
from dml_fast.loss.problem import MutualStats

pytestmark = QUIET

by_backward = partial(by_autograd, fused)
# Not more: compiled, every example is several kernels of its own, of 2 to 10 seconds each.
SOME = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def by_engine(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Gradients as the engine takes them, each scaled on the device by a power of two."""
    scale = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 1.0, 8.0, 1.0], device=DEVICE)
    scale = scale[: len(case.logits)]
    losses, grads, _ = fused_and_grad(case.logits, case.target, **case.options, grad_scale=scale)
    return losses, [g / s for g, s in zip(grads, scale, strict=True)]


WIDTHS = st.sampled_from([1, 2, 7, 12, 33, STEP, STEP + 1, 2 * STEP + 2])
SMALL = cases([torch.float32, torch.bfloat16, torch.float16], WIDTHS, st.integers(1, 3))


@pytest.mark.slow
@SOME
@given(case=SMALL)
def test_autograd_is_exact_in_every_option(kernel: str, case: Case) -> None:
    assert_exact(case, DEVICE, by_backward)


@pytest.mark.slow
@SOME
@given(case=SMALL)
def test_gradients_in_one_launch_are_exact_in_every_option(kernel: str, case: Case) -> None:
    assert_exact(case, DEVICE, by_engine)


@pytest.mark.slow
@SOME
@given(case=SMALL)
def test_statistics_are_exact_in_every_option(kernel: str, case: Case) -> None:
    case = case.to(case.logits[0].dtype, DEVICE)
    problem = on_device(checked(case.logits, case.target, **case.options))
    # A divergence is a difference of all the entropies, with the factor T².
    size = max(1.0, problem.temperature**2) * len(problem.students + problem.teachers)
    for wanted in ("cheap", "all"):
        found = launch.launch(problem, with_grad=False, save=True, stats=wanted).solution.stats
        exact = closed_form.solve(in_double(problem), False, wanted).stats
        assert isinstance(found, MutualStats)
        assert_same(found, exact, rtol=1e-5, atol=1e-5 * size)


SIZES = [(1, 1), (3, 2), (128, 2), (3, 10), (5, 100), (1, 127), (1, 1000), (3, 1001), (1, 4099)]


@pytest.mark.slow
@pytest.mark.parametrize("answer", [by_backward, by_engine], ids=["autograd", "engine"])
@pytest.mark.parametrize("kernel", [None, *KERNELS], ids=["by the table", *KERNELS])
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_odd_sizes(rows: int, classes: int, kernel: str | None, answer: Any) -> None:
    if kernel == "two_sweep" and rows > 100:
        pytest.skip("a program a row: nothing that three rows do not show")
    logits, target = cohort(2, rows, classes)
    options = {"kl_weight": 1.0, "temperature": 1.0, "ignore_index": -100}
    options |= {"peer_reduction": "mean", "reduction": "mean"}
    case = Case([z.cpu() for z in logits], target.cpu(), options)
    if kernel is None:
        assert_exact(case, DEVICE, answer)
    else:
        with forced(kernel):
            assert_exact(case, DEVICE, answer)


def test_the_table_has_both_kernels() -> None:
    """So that "by the table" above is both of them."""
    alike = {"distributions": 2, "width": 1, "in_place": False}
    assert choose(2, 1001, 4, False, **alike).kernel == "one_pass"
    assert choose(2, 2**18, 4, False, **alike).kernel == "two_sweep"


@pytest.mark.parametrize("students", [1, 8])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_student_and_eight(kernel: str, students: int, reduction: str) -> None:
    logits, target = cohort(students, 3, 5)
    assert_solves(checked(logits, target, reduction=reduction))


def test_students_and_teachers_of_all_precisions(kernel: str) -> None:
    logits, target = cohort(3)
    logits = [logits[0].half(), logits[1].bfloat16(), logits[2]]
    teachers = [cohort(2, 6, 10, d)[0][0] for d in (torch.float64, torch.bfloat16)]
    assert_solves(checked(logits, target, teacher_logits=teachers), rtol=1e-2, atol=1e-4)
    grads = fused_and_grad(logits, target)[1]
    assert [g.dtype for g in grads] == [z.dtype for z in logits]
    leaves = [z.requires_grad_() for z in logits]
    fused(leaves, target).sum().backward()
    for z, g in zip(leaves, grads, strict=True):
        assert z.grad is not None and z.grad.dtype == z.dtype
        torch.testing.assert_close(z.grad, g, rtol=1e-2, atol=1e-6)


OPTIONS: dict[str, dict[str, Any]] = {
    "some unlabelled": {"ignore_index": 3},
    "class weights": {"ignore_index": 3, "class_weight": torch.rand(5)},
    "by row": {"reduction": "none", "kl_weight": torch.tensor(0.5)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [70, 530])
def test_sums_over_many_programs(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More groups than one group holds: three levels would be needed where two were forgotten."""
    if INTERPRETED:  # groups of 4 and fewer rows stand for groups of 64
        monkeypatch.setattr(finish, "GROUP", finish.tl.constexpr(4))
        monkeypatch.setattr(launch, "GROUP", finish.tl.constexpr(4))
        rows //= 10
    else:
        rows *= 10
    monkeypatch.setattr(launch, "choose", lambda *_, **__: Config("one_pass", 1, 16, 1))
    logits, target = cohort(1, rows, 5)
    options = {k: v.to(DEVICE) if k == "class_weight" else v for k, v in OPTIONS[name].items()}
    assert_solves(checked(logits, target, **options))


def test_groups_of_64_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose", lambda *_, **__: Config("one_pass", 1, 16, 1))
    logits, target = cohort(1, 130, 3)
    problem = checked(logits, target)
    found = launch.launch(problem, with_grad=False, save=False, stats="cheap").solution
    assert_same(found, closed_form.solve(in_double(problem), False, "cheap"))


@pytest.mark.parametrize("labelled", [0, 1])
def test_a_batch_with_hardly_a_label(kernel: str, labelled: int) -> None:
    logits, target = cohort()
    target[labelled:] = -100
    for weight in (None, torch.rand(10, device=DEVICE)):
        problem = checked(logits, target, class_weight=weight, label_smoothing=0.1)
        assert_solves(problem)


@pytest.mark.parametrize("labels", [7.5, 0.0, torch.tensor(3.0), torch.tensor(0)], ids=str)
def test_part_of_a_batch_divides_by_the_whole(kernel: str, labels: Any) -> None:
    logits, target = cohort()
    target[1] = -100
    labels = labels.to(DEVICE) if isinstance(labels, Tensor) else labels
    problem = replace(checked(logits, target, label_smoothing=0.1), whole=(labels, 40))
    assert_solves(problem, stats="cheap")
    (losses, _, _), saved = launch.launch(problem, with_grad=False, save=True, stats="none")
    assert saved is not None
    grads = [torch.empty_like(z) for z in logits]
    launch.launch_gradient(problem, saved, torch.ones_like(losses), grads)
    assert_same(grads, closed_form.solve(in_double(problem), True, "none").grads)


@pytest.mark.parametrize(
    ("wrong", "options"),
    [(10, {}), (-(2**40), {"label_smoothing": 0.1}), (2**40, {"class_weight": torch.rand(10)})],
    ids=["plain", "smoothed", "weighted"],
)
def test_a_class_out_of_range_poisons_its_row(
    kernel: str, wrong: int, options: dict[str, Any]
) -> None:
    """On a device nobody looks at the labels first."""
    options = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in options.items()}
    logits, target = cohort()
    logits[0][4, 0] = 50.0  # class 0, which stands for the wrong one
    good = checked(logits, target, reduction="none", **options)
    target = target.clone()
    target[4] = wrong
    bad = replace(good, index=target)
    others = [0, 1, 2, 3, 5]
    (losses, grads, stats), _ = launch.launch(bad, with_grad=True, save=False, stats="cheap")
    expected, saved = launch.launch(good, with_grad=True, save=True, stats="cheap")
    assert grads is not None and saved is not None and expected.grads is not None
    assert losses[:, 4].isnan().all()
    assert_same(losses[:, others], expected.losses[:, others])
    later = [torch.empty_like(z) for z in logits]
    saved = launch.launch(bad, with_grad=False, save=True, stats="none").saved
    assert saved is not None
    launch.launch_gradient(bad, saved, torch.ones_like(losses), later)
    for g, again, e in zip(grads, later, expected.grads, strict=True):
        assert g[4].isnan().any() and again[4].isnan().any()
        assert_same(g[others], e[others])
        assert_same(again[others], e[others])
    assert stats is not None and stats.finite.all()
    mean = replace(bad, reduction="mean", ignore_index=-100)
    averaged = launch.launch(mean, with_grad=True, save=False, stats="none").solution.grads
    assert averaged is not None and all(g[others].isfinite().all() for g in averaged)
    assert launch.count_labels(mean).isfinite()
    single = replace(bad, index=torch.full_like(target, wrong))
    counted = launch.launch(single, with_grad=False, save=False, stats="cheap").solution.stats
    assert counted is not None and not counted.correct.any()


def test_ties_go_to_the_first_class_in_any_tile(kernel: str) -> None:
    """As torch's argmax says on a CPU."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (2, 8, 150), generator=g).float()
    first = logits.argmax(-1)
    target = first[0].clone()
    target[::2] = 149  # as large perhaps, never the first
    logits[0, ::2, 149] = 2.0
    first = logits.argmax(-1)
    soft = torch.nn.functional.one_hot(target, 150).float() / 2
    soft[:, STEP:] += soft[:, :-STEP].clone()  # as probable, and in the same place of its tile
    for labels in (target, soft):
        problem = on_device(checked(list(logits), labels))
        stats = launch.launch(problem, with_grad=False, save=False, stats="cheap").solution.stats
        assert stats is not None
        assert stats.correct.tolist() == (first == target).sum(1).tolist()
        assert 4 <= int(stats.correct[0]) < 8


def test_the_door_gives_what_the_kernels_give(kernel: str) -> None:
    """Of statistics and shapes; numbers are compared elsewhere."""
    logits, target = cohort(2, 6, 5)
    folded = [z.reshape(3, 2, 5) for z in logits]
    losses, stats = fused(folded, target.reshape(3, 2), reduction="none", return_stats=True)
    assert losses.shape == (2, 3, 2)
    assert stats.row_mutual_information.shape == (3, 2)
    assert stats.finite.dtype == torch.bool and stats.correct.dtype == torch.int64
    direct = autograd.solve(checked(folded, target.reshape(3, 2)), False, "all")
    assert_same(direct.stats, stats)
