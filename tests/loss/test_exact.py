"""The loss and its gradient against the paper's equations in float64, over every option."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from loss_cases import Case, assert_exact, by_autograd, cases
from torch import Tensor

from dml_fast.loss import FusedMutualLoss, mutual_loss, mutual_loss_and_grad


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost far more than such small tensors, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_values_and_gradients_are_the_papers(case: Case) -> None:
    assert_exact(case)


@pytest.mark.gpu
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_values_and_gradients_on_cuda(case: Case) -> None:
    assert_exact(case, "cuda")


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_both_doors_give_the_same_bits(case: Case) -> None:
    losses, grads = by_autograd(mutual_loss, case)
    direct_losses, direct_grads, _ = mutual_loss_and_grad(case.logits, case.target, **case.options)
    assert torch.equal(losses, direct_losses)
    assert not direct_losses.requires_grad
    for g, direct in zip(grads, direct_grads, strict=True):
        assert torch.equal(g, direct)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_stacked_and_listed_logits_give_the_same_bits(case: Case) -> None:
    losses, grads = by_autograd(mutual_loss, case)
    stack = torch.stack(case.logits).requires_grad_()
    options = dict(case.options)
    if "teacher_logits" in options:
        options["teacher_logits"] = torch.stack(options["teacher_logits"])
    stacked = mutual_loss(stack, case.target, **options)
    assert torch.equal(losses, stacked)
    assert torch.equal(torch.stack(grads), torch.autograd.grad(stacked.sum(), stack)[0])


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_one_student_alone_has_torchs_cross_entropy(case: Case) -> None:
    z = case.logits[0].double()
    case = case.to(torch.float64)
    options = {"label_smoothing", "ignore_index", "reduction"} & case.options.keys()
    kept = {name: case.options[name] for name in options}
    weight = case.options.get("class_weight")
    classes = z.shape[-1]
    soft = case.target.is_floating_point()
    target = case.target.reshape(-1, classes) if soft else case.target.reshape(-1).long()
    expected = F.cross_entropy(z.reshape(-1, classes), target, weight, **kept)
    found = mutual_loss([z], case.target, class_weight=weight, **kept)[0].reshape(expected.shape)
    if math.isnan(expected.sum()):  # a mean over no labels
        expected = torch.zeros_like(expected)
    torch.testing.assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(case=cases([torch.float64]))
def test_gradcheck(case: Case) -> None:
    """Numerical derivatives of a student's loss, its peers held still."""
    case.options["kl_weight"] = float(case.options["kl_weight"])

    def own_loss(z: Tensor) -> Tensor:
        return mutual_loss([z, *case.logits[1:]], case.target, **case.options)[0]

    assert torch.autograd.gradcheck(own_loss, case.logits[0].clone().requires_grad_())


@pytest.mark.parametrize(
    ("backend", "dtype"), [("closed_form", torch.float64), ("native", torch.float32)]
)
def test_half_of_the_rows_have_no_label(backend: str, dtype: torch.dtype) -> None:
    """Cross-entropy over the labelled half, divergence over all: by plain autograd in float64."""
    torch.manual_seed(0)
    exact = [torch.randn(8, 5, dtype=torch.float64).to(dtype).double() for _ in range(3)]
    leaves = [z.clone().requires_grad_() for z in exact]
    target = torch.tensor([3, -100, 0, -100, -100, 4, 1, -100])
    log_p = [z.log_softmax(-1) for z in leaves]
    wanted = []
    for k in range(3):
        peers = [log_p[j].detach() for j in range(3) if j != k]
        kl = sum((q.exp() * (q - log_p[k])).sum() for q in peers) / 2 / 8
        ce = -sum(log_p[k][row, target[row]] for row in (0, 2, 5, 6)) / 4
        wanted.append(ce + 0.7 * kl)
    wanted_grads = torch.autograd.grad(torch.stack(wanted).sum(), leaves)
    given = [z.to(dtype) for z in exact]
    options: dict[str, Any] = {"kl_weight": 0.7, "backend": backend}
    losses, grads, _ = mutual_loss_and_grad(given, target, **options)
    close = (
        {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    )
    torch.testing.assert_close(losses.double(), torch.stack(wanted).detach(), **close)
    for found, grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(found.double(), grad, **close)


def test_by_hand() -> None:
    """K = 2, N = 1, C = 2: p_1 = (3/4, 1/4), p_2 = (1/2, 1/2), y = 0."""
    logits = [
        torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
    ]
    losses, grads, stats = mutual_loss_and_grad(logits, torch.tensor([0]))
    # KL(p_2 || p_1) = (log 2/3 + log 2) / 2; KL(p_1 || p_2) = 3/4 log 3/2 + 1/4 log 1/2
    kl = [0.5 * math.log(4 / 3), 0.25 * math.log(27 / 16)]
    torch.testing.assert_close(stats.kl, torch.tensor(kl, dtype=torch.float64))
    ce = torch.tensor([math.log(4 / 3), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(losses, ce + stats.kl)
    # (q - onehot) + (p_k - p_peer)
    torch.testing.assert_close(grads[0], torch.tensor([[0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(grads[1], torch.tensor([[-0.75, 0.75]], dtype=torch.float64))


def test_the_module_passes_every_option_on() -> None:
    g = torch.Generator().manual_seed(1)
    logits = list(torch.randn((3, 8, 5), generator=g))
    target = torch.randint(5, (8,), generator=g).index_fill(0, torch.tensor([2]), 4)
    fixed: dict[str, Any] = {
        "kl_weight": 0.5,
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": torch.rand(5, generator=g),
        "ignore_index": 4,
        "peer_reduction": "sum",
        "reduction": "none",
    }
    called: dict[str, Any] = {
        "row_weight": torch.rand(8, generator=g),
        "teacher_logits": [torch.randn((8, 5), generator=g)],
    }
    module = FusedMutualLoss(**fixed)
    expected = mutual_loss(logits, target, **fixed, **called)
    assert torch.equal(module(logits, target, **called), expected)
    called["peer_weight"] = torch.rand(3, 4, generator=g)
    weighted = mutual_loss(logits, target, **fixed, **called)
    assert torch.equal(module(logits, target, **called), weighted)
    assert not torch.equal(weighted, expected)
    for name in fixed:  # each one matters here: a dropped option would show
        others = {key: value for key, value in fixed.items() if key != name}
        del called["peer_weight"]
        changed = mutual_loss(logits, target, **others, **called)
        called["peer_weight"] = None
        assert changed.shape != expected.shape or not torch.equal(changed, expected), name
    assert "class_weight" in module.state_dict()
    assert "temperature=2.0" in repr(module)
