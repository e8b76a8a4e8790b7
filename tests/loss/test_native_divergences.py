"""All divergences in C++, with every option, against the closed form in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_fast import _native
from dml_fast.loss import mutual_loss, mutual_loss_and_grad, native
from dml_fast.loss.divergences import DIVERGENCES

OTHERS = DIVERGENCES[1:]


def drawn(choose: random.Random, divergence: str, dtype: torch.dtype, odd: bool) -> Any:
    """Logits, a target and options."""
    students, rows = choose.randint(1, 4), choose.choice((1, 5, 19))
    classes = choose.choice((2, 3, 10, 33, 100, 1100))
    scale, apart = choose.choice((0.01, 1.0, 3.0, 30.0)), choose.choice((0.01, 1.0))
    common = scale * torch.randn(rows, classes)
    logits = [common * (1 - apart) + apart * torch.randn(rows, classes) for _ in range(students)]
    options: dict[str, Any] = {
        "divergence": divergence,
        "temperature": choose.choice((1.0, 0.5, 3.0)),
        "kl_weight": choose.choice((0.0, 0.3, 1.0)),
        "peer_reduction": choose.choice(("mean", "sum")),
        "reduction": choose.choice(("mean", "sum", "none")),
        "label_smoothing": choose.choice((0.0, 0.1)),
        "grad_scale": choose.choice((None, 8.0)),
    }
    if divergence == "jsd":
        options["beta"] = choose.choice((0.1, 0.5, 0.9))
    target = torch.randint(classes, (rows,))
    if choose.random() < 0.4:
        options |= {"ignore_index": 0, "kl_rows": choose.choice(("all", "labelled"))}
    elif choose.random() < 0.3:
        target = torch.randn(rows, classes).softmax(-1)
    if choose.random() < 0.3:
        options["class_weight"] = torch.rand(classes)
    if choose.random() < 0.3:
        options["row_weight"] = torch.rand(rows)
    if choose.random() < 0.3:
        options["teacher_logits"] = [scale * torch.randn(rows, classes) for _ in range(2)]
    everyone = [*logits, *options.get("teacher_logits", ())]
    for z in everyone if odd else ():
        row = choose.randrange(rows)
        wrong = choose.choice((torch.nan, torch.inf, -torch.inf, None, None))
        if wrong is None:
            z[row, : classes // 2] = -torch.inf  # masks them
        else:
            z[row, choose.randrange(classes) :] = wrong
    everyone = [z.to(dtype) for z in everyone]
    if len(everyone) > students:
        options["teacher_logits"] = everyone[students:]
    return everyone[:students], target, options


def in_double(value: Any) -> Any:
    if isinstance(value, list):
        return [in_double(one) for one in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_near(found: Tensor, wanted: Tensor, rtol: float, least: float = 1e-9) -> None:
    """Within rtol of the largest of all numbers; NaN and infinities where they belong."""
    size = wanted[wanted.isfinite()].abs().amax().item() if wanted.isfinite().any() else 0.0
    options: Any = {"rtol": 0.0, "atol": rtol * size + least, "equal_nan": True}
    torch.testing.assert_close(found.double(), wanted, **options)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_random_problems_with_every_option(divergence: str, dtype: torch.dtype, odd: bool) -> None:
    choose = random.Random(f"{divergence} {dtype} {odd}")
    for seed in range(25):
        torch.manual_seed(seed)
        logits, target, options = drawn(choose, divergence, dtype, odd)
        losses, grads, stats = mutual_loss_and_grad(logits, target, backend="native", **options)
        exactly = {name: in_double(value) for name, value in options.items()}
        exact, gradients, known = mutual_loss_and_grad(
            in_double(logits), in_double(target), backend="closed_form", **exactly
        )
        assert_near(losses, exact, 1e-5)
        assert_near(stats.ce, known.ce, 1e-5)
        weight = options["temperature"] ** 2 * 5  # of at most so many peers
        assert_near(stats.kl, known.kl, 1e-5, 4e-8 * weight)
        assert torch.equal(stats.correct, known.correct)
        assert torch.equal(stats.finite, known.finite)
        for one, wanted in zip(grads, gradients, strict=True):
            assert one.dtype == dtype
            assert_near(one, wanted, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [1, 31, 33, 1057, 2100])
def test_every_instruction_set_and_number_of_threads(
    classes: int, dtype: torch.dtype, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(classes)
    logits = [(3 * torch.randn(37, classes)).to(dtype) for _ in range(3)]
    target = torch.randint(classes, (37,))

    def found() -> list[Tensor]:
        losses, grads, stats = mutual_loss_and_grad(
            logits, target, backend="native", divergence=divergence, temperature=2.0
        )
        return [losses, *grads, *stats[:4]]

    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    levels = ["baseline", "avx2", "avx512"]
    answers = []
    for level in levels[: levels.index(_native.instruction_set()) + 1]:
        monkeypatch.setenv("DML_FAST_ISA", level)
        answers.append(found())
    for answer in answers[2:]:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[1], strict=True))
    for answer in answers[1:]:
        for a, b in zip(answer, answers[0], strict=True):
            rtol = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)
    monkeypatch.setattr(native, "_PER_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(found(), answers[-1], strict=True))


@pytest.mark.parametrize("divergence", OTHERS)
def test_through_autograd(divergence: str) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(7, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    target = torch.tensor([0, 1, -100, 3, 4, -100, 2])
    options: dict[str, Any] = {"divergence": divergence, "kl_rows": "labelled"}
    grads: Callable[..., Any] = torch.autograd.grad
    weights = torch.tensor([1.0, 0.5, 2.0])
    found = grads(
        (mutual_loss(logits, target, backend="native", **options) * weights).sum(), logits
    )
    exact = [z.detach().double().requires_grad_() for z in logits]
    losses = mutual_loss(exact, target, backend="closed_form", **options)
    wanted = grads((losses * weights).sum(), exact)
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, 4e-3)
        assert not a[2].any()
        assert not a[5].any()


def test_the_padding_of_labelled_rows_may_be_unusable() -> None:
    logits = [torch.randn(3, 4) for _ in range(2)]
    logits[0][1, 2] = torch.nan
    target = torch.tensor([1, -100, 2])
    losses, grads, stats = mutual_loss_and_grad(
        logits, target, kl_rows="labelled", backend="native"
    )
    rest = mutual_loss_and_grad([z[::2] for z in logits], target[::2], backend="native")
    torch.testing.assert_close(losses, rest[0])
    assert stats.finite.tolist() == [False, True]
    assert not any(g[1].any() for g in grads)
