"""Linear heads in two passes: the same gradients, from chunks of classes, in less memory."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cases import cohort, exact
from torch import Tensor

from benchmarks.common.counting import operators_and_bytes
from dml_fast.errors import UserError
from dml_fast.loss import linear_chunks, linear_lean, linear_memory, reference
from dml_fast.loss.linear import FusedLinearMutualLoss, linear_mutual_loss

G = torch.Generator().manual_seed(5)
DOUBLE: dict[str, Any] = {"generator": G, "dtype": torch.float64}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": torch.rand(7, **DOUBLE),
        "row_weight": torch.rand(12, **DOUBLE),
        "ce_weight": 0.5,
        "kl_weight": 1.5,
        "softcap": 3.0,
    },
    "rows": {"reduction": "none", "peer_weight": torch.rand(3, 4, **DOUBLE)},
    "labelled": {"kl_rows": "labelled", "reduction": "sum", "label_smoothing": 0.1},
    "soft": {"soft": torch.rand(12, 7, **DOUBLE), "class_weight": torch.rand(7, **DOUBLE)},
}


def answers(found: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Losses, and gradients for an incoming gradient that differs from row to row."""
    outer = torch.linspace(0.5, 2.0, found.numel(), dtype=found.dtype).reshape(found.shape)
    grads = torch.autograd.grad(found, leaves, outer)
    return [found.detach(), *grads]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_whole_logits(name: str) -> None:
    """Five rows, or the five twelfths of the classes, at a time; a teacher, and a bias."""
    hidden, weight, target = cohort()
    options = dict(OPTIONS[name])
    target[3] = -100
    target = options.pop("soft", target)
    cap = options.get("softcap")
    bias = [None, torch.randn(7, **DOUBLE).requires_grad_(), None]
    teacher = torch.randn(12, 2, **DOUBLE), torch.randn(7, 2, **DOUBLE)
    leaves = [*hidden, *weight, bias[1]]
    found = linear_mutual_loss(
        hidden, weight, target, bias, chunk_rows=5, memory="lean",
        teacher_hidden=[teacher[0]], teacher_weight=[teacher[1]], **options,
    )  # fmt: skip
    logits = [F.linear(*each) for each in zip(hidden, weight, bias, strict=True)]
    logits.append(F.linear(*teacher))
    if options.pop("softcap", None):
        logits = [cap * (z / cap).tanh() for z in logits]
    expected = reference.mutual_loss(logits[:3], target, teacher_logits=logits[3:], **options)
    for a, b in zip(answers(found, leaves), answers(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of its interpreter
@pytest.mark.parametrize("soft", [False, True])
def test_kernels_give_the_gradients_of_whole_logits(soft: bool) -> None:
    """Sixteen classes at a time, then the other four."""
    pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, target = cohort(2, rows=6, classes=20)
    options: dict[str, Any] = {"class_weight": torch.rand(20, **DOUBLE), "label_smoothing": 0.1}
    if soft:
        options |= {"reduction": "none", "peer_weight": torch.rand(2, 2, **DOUBLE)}
        target = torch.rand(6, 20, **DOUBLE)
    else:
        options |= {"temperature": 2.0, "ce_weight": 0.5, "row_weight": torch.rand(6, **DOUBLE)}
        target[3] = -100
    expected = answers(exact(hidden, weight, target, **options), hidden + weight)
    leaves = [t.detach().float().to(device).requires_grad_() for t in hidden + weight]
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    losses = linear_mutual_loss(
        leaves[:2], leaves[2:], target.to(device), chunk_rows=5, memory="lean", backend="triton",
        **moved,
    )  # fmt: skip
    for a, b in zip(answers(losses.cpu(), leaves), expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_like_those_of_one_pass(dtype: torch.dtype) -> None:
    hidden, weight, target = cohort(classes=40, dtype=dtype)
    leaves = hidden + weight
    double = [t.detach().double().requires_grad_() for t in leaves]
    expected = answers(exact(double[:3], double[3:], target), double)
    fast, lean = (
        answers(linear_mutual_loss(hidden, weight, target, chunk_rows=5, memory=memory), leaves)
        for memory in ("fast", "lean")
    )
    eps = torch.finfo(dtype).eps
    for a, b, e in zip(lean, fast, expected, strict=True):
        assert a.dtype == b.dtype
        allowed = 2 * float((b.double() - e).abs().max()) + 2 * eps * float(e.abs().max())
        assert float((a.double() - e).abs().max()) <= allowed


def test_a_loss_scaler_keeps_small_gradients_in_fp16() -> None:
    """What rows with a small incoming gradient, and a factor of 2^16, leave of the gradients."""
    hidden, weight, target = cohort(dtype=torch.float16)
    losses = linear_mutual_loss(hidden, weight, target, memory="lean")
    factors = torch.tensor([2.0**16, 2.0**6, 0.0])
    found = torch.autograd.grad(losses, weight, factors)
    double = [t.detach().double().requires_grad_() for t in hidden + weight]
    expected = torch.autograd.grad(
        exact(double[:3], double[3:], target), double[3:], factors.double()
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))


def test_separate_losses_reach_their_own_student() -> None:
    hidden, weight, target = cohort()
    trunks = [h.clone() for h in hidden]
    losses = linear_mutual_loss(trunks, weight, target, memory="lean", separate=True)
    joint = exact(hidden, weight, target)
    for k, loss in enumerate(losses):
        expected = torch.autograd.grad(joint[k], [hidden[k], weight[k]], retain_graph=True)
        found = torch.autograd.grad(loss, hidden + weight, allow_unused=True)
        assert [g is not None for g in found] == [j % 3 == k for j in range(6)]
        torch.testing.assert_close([found[k], found[3 + k]], list(expected))


def test_a_broken_student_and_an_empty_batch() -> None:
    hidden, weight, target = cohort()
    with torch.no_grad():
        hidden[1][4, 0] = torch.nan
    for reduction in ("mean", "none"):
        found = linear_mutual_loss(
            hidden, weight, target, chunk_rows=5, memory="lean", reduction=reduction
        )
        expected = exact(hidden, weight, target, reduction=reduction)
        pairs = zip(
            answers(found, hidden + weight), answers(expected, hidden + weight), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, equal_nan=True)
        none = [h.detach()[:0].requires_grad_() for h in hidden]
        losses = linear_mutual_loss(none, weight, target[:0], memory="lean", reduction=reduction)
        grads = torch.autograd.grad(losses.sum(), none + weight)
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("bias", ["one", "each", "none"])
def test_a_shared_weight_has_one_gradient_the_sum_of_all(bias: str) -> None:
    """Two of three students share it; losses count differently."""
    hidden, weight, target = cohort()
    hidden[2] = hidden[0].detach().flip(0).requires_grad_()
    biases = [torch.randn(7, **DOUBLE).requires_grad_() for _ in range(3)]
    if bias == "one":
        biases[2] = biases[0]
    given = None if bias == "none" else biases
    heads = [weight[0], weight[1], weight[0]]
    leaves = [*hidden, *weight[:2], *(biases[: 2 + (bias == "each")] if given else [])]
    logits = [F.linear(*each) for each in zip(hidden, heads, given or [None] * 3, strict=True)]
    expected = answers(reference.mutual_loss(logits, target), leaves)
    found = answers(
        linear_mutual_loss(hidden, heads, target, given, chunk_rows=5, memory="lean"), leaves
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def peak(memory: str, shared: bool = False, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes beyond the inputs and the gradients that are returned, for C >> N."""
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(16, 64, generator=g).to(dtype).requires_grad_() for _ in range(3)]
    weight = [torch.randn(4096, 64, generator=g).to(dtype).requires_grad_() for _ in range(3)]
    weight = weight[:1] * 3 if shared else weight
    target = torch.randint(4096, (16,), generator=g)
    leaves = list(dict.fromkeys(hidden + weight))

    def call() -> tuple[Tensor, ...]:
        loss = linear_mutual_loss(hidden, weight, target, chunk_rows=1, memory=memory).sum()
        return torch.autograd.grad(loss, leaves)

    return operators_and_bytes(call)[1] - sum(t.nbytes for t in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_than_half_of_the_buffers(dtype: torch.dtype) -> None:
    fast = peak("fast", dtype=dtype)
    assert fast >= 4096 * 64 * 4  # one weight's fp32 gradient, beside those that are returned
    assert peak("lean", dtype=dtype) < 0.5 * fast


def test_a_shared_weight_needs_the_memory_of_one() -> None:
    assert peak("lean", shared=True) < peak("fast", shared=True) / 4


def test_auto_takes_two_passes_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hidden, weight, target = cohort()
    taken = []
    for way in (linear_chunks, linear_lean):
        monkeypatch.setattr(
            way, "differentiable", lambda *_, way=way: (taken.append(way) or target, None)
        )
    monkeypatch.setattr(linear_memory, "LEAST_BYTES", 0)
    monkeypatch.setattr(linear_memory, "_said", set())
    for free in (None, 2**30, 100, 100):
        monkeypatch.setattr(linear_memory, "free_bytes", lambda device, free=free: free)
        with caplog.at_level(logging.WARNING, logger="dml_fast"):
            linear_mutual_loss(hidden, weight, target)
    assert taken == [linear_chunks] * 2 + [linear_lean] * 2
    linear_mutual_loss(hidden, weight, target, divergence="jsd")
    assert taken.pop() is linear_chunks
    (line,) = caplog.messages
    assert "in two passes, as " in line and "GiB are free" in line


def test_what_two_passes_cannot_compute_is_refused() -> None:
    hidden, weight, target = cohort()
    with pytest.raises(UserError, match=r"^memory is 'lean' and divergence 'jsd' needs .*: take "):
        linear_mutual_loss(hidden, weight, target, memory="lean", divergence="jsd")
    with pytest.raises(UserError, match="memory is 'leen', which is none of auto, fast, lean"):
        FusedLinearMutualLoss(memory="leen")
    assert FusedLinearMutualLoss(memory="lean")(hidden, weight, target).grad_fn.name() == (
        "_LeanBackward"
    )
