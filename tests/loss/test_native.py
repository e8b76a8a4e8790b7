"""The loss in C++: the same bits with any number of threads and vectors; what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_fast import _native
from dml_fast.errors import UserError
from dml_fast.loss import backends, closed_form, mutual_loss, mutual_loss_and_grad, native
from dml_fast.loss.checks import prepare

LEVELS = ("baseline", "avx2", "avx512")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 3.0, "label_smoothing": 0.1},
    "sum": {"peer_reduction": "sum", "reduction": "sum", "kl_weight": 0.3},
    "rows": {"reduction": "none", "temperature": 0.5},
}


def cohort(classes: int, rows: int = 40, students: int = 3, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(classes)
    logits = [(3 * torch.randn(rows, classes)).to(dtype) for _ in range(students)]
    return logits, torch.randint(classes, (rows,))


def found(logits: list[Tensor], target: Tensor, **options: Any) -> list[Tensor]:
    losses, grads, stats = mutual_loss_and_grad(logits, target, backend="native", **options)
    return [losses, *grads, *stats[:4]]


@pytest.fixture
def at_level(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool]:
    monkeypatch.delenv("DML_FAST_ISA", raising=False)
    highest = _native.instruction_set()

    def switch(level: str) -> bool:
        if LEVELS.index(level) > LEVELS.index(highest):
            return False
        monkeypatch.setenv("DML_FAST_ISA", level)
        return True

    return switch


def assert_same_at_levels(
    at_level: Callable[[str], bool], logits: list[Tensor], target: Tensor, options: dict[str, Any]
) -> None:
    """AVX2 and AVX-512 give the same bits; the baseline, which cannot fuse, nearly those."""
    answers = [found(logits, target, **options) for level in LEVELS if at_level(level)]
    for answer in answers[2:]:
        assert all(torch.equal(a, b) for a, b in zip(answer, answers[1], strict=True))
    for answer in answers[1:]:
        for a, b in zip(answer, answers[0], strict=True):
            assert a.dtype == b.dtype
            rtol = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [1, 10, 31, 32, 33, 100, 1057, 9001])
def test_every_instruction_set(
    classes: int, dtype: Any, options: dict[str, Any], at_level: Callable[[str], bool]
) -> None:
    logits, target = cohort(classes, rows=5, dtype=dtype)
    assert_same_at_levels(at_level, logits, target, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("classes", [1, 33, 960, 1057])
def test_every_instruction_set_on_several_labels(
    classes: int,
    dtype: Any,
    options: dict[str, Any],
    at_level: Callable[[str], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, _ = cohort(classes, rows=37, dtype=dtype)
    target = (torch.rand(37, classes) < 0.3).to(dtype)
    options = options | {"distribution": "bernoulli"}
    assert_same_at_levels(at_level, logits, target, options)
    expected = found(logits, target, **options)
    monkeypatch.setattr(native, "_PER_THREAD", 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    answers = found(logits, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))


@pytest.mark.parametrize("odd", [False, True])
def test_the_same_bits_for_any_number_of_threads(monkeypatch: Any, odd: bool) -> None:
    logits, target = cohort(50, rows=100)
    if odd:
        logits[1][3, 7], logits[2][70:, 4] = torch.nan, -torch.inf
    expected = found(logits, target)
    monkeypatch.setattr(native, "_PER_THREAD", 1)
    for threads in (2, 3, 16):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        answers = found(logits, target)
        for a, b in zip(answers, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_rows_gradient_does_not_depend_on_the_other_rows(options: dict[str, Any]) -> None:
    options = options | {"reduction": "sum"}
    logits, target = cohort(33)
    whole = found(logits, target, **options)
    part = found([z[7:9] for z in logits], target[7:9], **options)
    assert all(torch.equal(w[7:9], p) for w, p in zip(whole[1:4], part[1:4], strict=True))


def test_large_gradients_that_are_written_past_the_caches() -> None:
    torch.manual_seed(0)
    logits, target = [torch.randn(4100, 1040) for _ in range(2)], torch.randint(1040, (4100,))
    whole = found(logits, target, reduction="sum")
    part = found([z[4000:4003] for z in logits], target[4000:4003], reduction="sum")
    assert all(torch.equal(w[4000:4003], p) for w, p in zip(whole[1:3], part[1:3], strict=True))


def test_confident_and_flat_logits_are_exact() -> None:
    for scale in (1e-4, 1e-2, 1.0, 1e2, 1e4):
        torch.manual_seed(0)
        logits = [scale * torch.randn(6, 40) for _ in range(2)]
        target = torch.arange(6)
        losses, grads, stats = mutual_loss_and_grad(logits, target, backend="native")
        exact = mutual_loss_and_grad([z.double() for z in logits], target, backend="closed_form")
        torch.testing.assert_close(losses.double(), exact[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.kl.double(), exact[2].kl, rtol=1e-3, atol=0)
        for g, e in zip(grads, exact[1], strict=True):
            torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-7)


def test_what_it_lacks_goes_to_the_closed_form_after_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_said", set())
    logits, target = cohort(5)
    weight = torch.ones(3, 3)
    cases: list[tuple[list[Tensor], dict[str, Any], str]] = [
        ([z.double() for z in logits], {}, "it computes in float32"),
        (logits, {"peer_weight": weight}, "it has no peer weights"),
    ]
    for z, options, reason in cases:
        for expected_lines in (1, 0):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "dml_fast"):
                answer = mutual_loss(z, target, backend="native", **options)
            expected = mutual_loss(z, target, backend="closed_form", **options)
            assert torch.equal(answer, expected)
            line = f"mutual loss: the closed form in place of the C++ loop: {reason}"
            assert [r.getMessage() for r in caplog.records] == [line] * expected_lines


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_backward_pass_of_ones_is_the_gradient_itself(kept: bool, stacked: bool) -> None:
    given, target = cohort(5)
    expected = torch.stack(mutual_loss_and_grad(given, target, backend="native")[1])
    logits = torch.stack(given).requires_grad_() if stacked else [z.requires_grad_() for z in given]
    inputs = [logits] if isinstance(logits, Tensor) else logits

    def grads(losses: Tensor, **options: Any) -> Tensor:
        found = torch.autograd.grad(losses, inputs, **options)
        return found[0] if stacked else torch.stack(found)

    losses = mutual_loss(logits, target, backend="native")
    first = grads(losses.sum(), retain_graph=kept)
    assert torch.equal(first, expected)
    if kept:  # then nobody may get the saved gradients themselves
        first.zero_()
        assert torch.equal(grads(losses.sum(), retain_graph=True), expected)
    else:
        with pytest.raises(RuntimeError, match="one backward pass together"):
            losses.sum().backward()


def test_auto_takes_it_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = cohort(5)
    problem = prepare(
        logits, target, kl_weight=1.0, temperature=1.0, label_smoothing=0.0, class_weight=None,
        ignore_index=-100, peer_reduction="mean", reduction="mean", peer_weight=None,
        row_weight=None, teacher_logits=None,
    )  # fmt: skip
    assert backends.find("auto", problem) is native
    problem.dtype = torch.float64
    assert backends.find("auto", problem) is closed_form


def call(**changes: Any) -> Any:
    """Call the C++ code on numpy arrays, of which it gets addresses."""
    means = [np.empty(2, np.float32) for _ in range(3)]
    arguments = {
        "logits": [np.zeros((4, 6), np.float32) for _ in range(2)], "rows": 4, "classes": 6,
        "bf16": False, "students": 2, "index": np.zeros(4, np.int64), "ignored": None,
        "soft": None, "best": None, "class_weight": None, "row_weight": None, "smoothing": 0.0,
        "temperature": 1.0, "peer_mean": True, "kl_weight": 1.0, "factors": [0.25] * 4,
        "grad_scale": [1.0, 1.0], "grads": [np.empty((4, 6), np.float32) for _ in range(2)],
        "float_grads": True, "means": means, "correct": np.empty(2, np.int64),
        "finite": np.empty(2, bool), "each_row": None, "threads": 1, "labels": False,
        "divergence": 0, "beta": 0.5, "labelled_rows": False,
    } | changes  # fmt: skip
    arrays = ("index", "soft", "best", "class_weight", "row_weight", "correct", "finite")
    given = {name: address(arguments[name]) for name in (*arrays, "each_row")}
    given |= {name: [*map(address, arguments[name])] for name in ("logits", "grads", "means")}
    return _native.mutual_loss(**(arguments | given))


def address(array: Any) -> int:
    return 0 if array is None else array if isinstance(array, int) else array.ctypes.data


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": []},
        {"logits": [0, 0]},
        {"logits": [1 << 20 | 1] * 2},
        {"rows": -1},
        {"classes": 0},
        {"students": 0},
        {"students": 3},
        {"index": None},
        {"index": np.array([0, 1, 2, 6])},
        {"index": np.array([0, 1, 2, -1])},
        {"index": (1 << 20) + 4},
        {"soft": np.zeros((4, 6), np.float32)},
        {"index": None, "soft": np.zeros((4, 6), np.float32)},
        {"index": None, "soft": np.zeros((4, 6), np.float32), "best": np.full(4, 6)},
        {"labels": True},
        {"temperature": 0.0},
        {"factors": [0.25]},
        {"grad_scale": [1.0]},
        {"grads": [np.empty((4, 6), np.float32)]},
        {"grads": [0, 0]},
        {"float_grads": False},
        {"means": []},
        {"means": [0, 0, 0]},
        {"correct": 0},
        {"finite": 0},
        {"divergence": 4},
        {"beta": 1.0},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any]) -> None:
    call()
    with pytest.raises(ValueError):
        call(**changes)


def test_the_bounds_of_integers() -> None:
    x = np.array([3, -5, 2**62, 0])
    assert _native.smallest_and_largest(x.ctypes.data, 3) == (-5, 2**62)
    for wrong in ((x.ctypes.data, 0), (0, 1), (x.ctypes.data + 1, 1)):
        with pytest.raises(ValueError):
            _native.smallest_and_largest(*wrong)


def test_the_right_classes_may_be_ignored_ones() -> None:
    call(index=np.array([0, 1, 2, -7]), ignored=-7)
    with pytest.raises(UserError, match=r"^backend is 'Native', .*did you mean native\?"):
        mutual_loss(*cohort(3), backend="Native")
