"""The loss and its gradient against the paper's equations in float64, over every option."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dml_fast import reference
from dml_fast.loss import FusedMutualLoss, mutual_loss, mutual_loss_and_grad

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost far more than such small tensors, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Case:
    logits: list[Tensor]
    target: Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The very same numbers in another dtype; indices stay."""

        def cast(value: Any) -> Any:
            if isinstance(value, list):
                return [cast(one) for one in value]
            if isinstance(value, Tensor):
                return value.to(device, dtype if value.is_floating_point() else value.dtype)
            return value

        options = {name: cast(value) for name, value in self.options.items()}
        return Case(cast(self.logits), cast(self.target), options)


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Case:
    """K in 1..5 students, up to two batch dimensions, and any combination of the options."""
    students, classes = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    batch = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=2)))
    dtype = draw(st.sampled_from(dtypes))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return (spread * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    def positive(*shape: int) -> Tensor:
        return (0.1 + torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)

    options: dict[str, Any] = {
        "kl_weight": draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 3.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "peer_reduction": draw(st.sampled_from(["mean", "sum"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    teachers = draw(st.integers(0, 2))
    if teachers:
        options["teacher_logits"] = [normal(*batch, classes) for _ in range(teachers)]
    if draw(st.booleans()):
        options["class_weight"] = positive(classes)
    if draw(st.booleans()):
        options["row_weight"] = positive(*batch)
    if draw(st.booleans()):
        weight = positive(students, students + teachers)
        options["peer_weight"] = weight * (torch.rand(weight.shape, generator=g) < 0.7)
    if draw(st.booleans()):
        options["kl_weight"] = torch.tensor(options["kl_weight"], dtype=dtype)
    if draw(st.booleans()):
        target = torch.randn((*batch, classes), generator=g, dtype=torch.float64).softmax(-1)
        target = target.to(dtype)
    else:
        target = torch.randint(classes, batch, generator=g)
        target = target.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16])))
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0]))
        ignored = torch.rand(batch, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        target = target.masked_fill(ignored, options["ignore_index"])
    return Case([normal(*batch, classes) for _ in range(students)], target, options)


def by_autograd(function: Any, case: Case) -> tuple[Tensor, list[Tensor]]:
    logits = [z.detach().clone().requires_grad_() for z in case.logits]
    losses = function(logits, case.target, **case.options)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), logits))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max()) if found.numel() else 0.0


def assert_exact(case: Case, device: str = "cpu") -> None:
    """Our error against float64 is at most plain torch's in the same dtype, plus a little."""
    exact_losses, exact_grads = by_autograd(reference.mutual_loss, case.to(torch.float64))
    plain_losses, plain_grads = by_autograd(reference.mutual_loss, case)
    ours = case.to(case.logits[0].dtype, device)
    losses, grads = by_autograd(mutual_loss, ours)
    losses, grads = losses.cpu(), [g.cpu() for g in grads]

    dtype = case.logits[0].dtype
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps, stored = torch.finfo(losses.dtype).eps, torch.finfo(dtype)
    loss_terms, grad_terms = magnitudes(case)
    assert error(losses, exact_losses) <= (
        error(plain_losses, exact_losses) + 8 * eps * (float(exact_losses.abs().max()) + loss_terms)
    )
    for found, plain, exact, z in zip(grads, plain_grads, exact_grads, case.logits, strict=True):
        assert found.shape == z.shape
        assert found.dtype == z.dtype
        rounding = stored.eps * (float(exact.abs().max()) + stored.smallest_normal)
        assert error(found, exact) <= error(plain, exact) + 4 * eps * grad_terms + rounding


def magnitudes(case: Case) -> tuple[float, float]:
    """Of the terms whose differences a loss and an element of a gradient are."""
    options = case.options
    rows = case.logits[0][..., 0].numel()
    labelled = rows
    if not case.target.is_floating_point():
        labelled = int((case.target != options["ignore_index"]).sum())
    peers = len(case.logits) + len(options.get("teacher_logits", []))
    if "peer_weight" not in options and options["peer_reduction"] == "mean":
        peers = 1
    divergence = float(options["kl_weight"]) * options["temperature"] * peers
    loss = 1 + options["temperature"] * divergence  # entropies of at most log 12
    if options["reduction"] == "mean":
        return 2.5 * loss, 1 / max(labelled, 1) + divergence / rows
    return 2.5 * loss * (rows if options["reduction"] == "sum" else 1), 1 + divergence


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
