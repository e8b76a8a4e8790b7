"""The loss of linear heads against the paper's equations in float64 on logits made whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dml_fast.loss import reference
from dml_fast.loss.linear import linear_mutual_loss

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Heads = list[tuple[Tensor, Tensor, Tensor | None]]


@dataclass
class Case:
    """Heads are (hidden, weight, bias)."""

    heads: Heads
    teachers: Heads
    target: Tensor
    options: dict[str, Any]
    chunk_rows: int | None = None
    memory: str = "fast"

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The very same numbers in another dtype; indices stay."""

        def cast(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(cast(one) for one in value)
            if isinstance(value, Tensor):
                return value.to(device, dtype if value.is_floating_point() else value.dtype)
            return value

        options = {name: cast(value) for name, value in self.options.items()}
        heads, teachers, target = map(cast, (self.heads, self.teachers, self.target))
        return Case(heads, teachers, target, options, self.chunk_rows, self.memory)


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Case:
    """Students of different widths, any combination of options, any chunks."""
    classes = draw(st.integers(1, 9))
    batch = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=2)))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    def positive(*shape: int) -> Tensor:
        return (0.1 + torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)

    def heads(count: int) -> Heads:
        widths = [draw(st.integers(1, 6)) for _ in range(count)]
        return [
            (
                normal(*batch, d),
                normal(classes, d),
                normal(classes) if draw(st.booleans()) else None,
            )
            for d in widths
        ]

    students, teachers = heads(draw(st.integers(1, 4))), heads(draw(st.integers(0, 2)))
    options: dict[str, Any] = {
        "kl_weight": draw(st.sampled_from([0.0, 0.3, 2.5])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 3.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "peer_reduction": draw(st.sampled_from(["mean", "sum"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if draw(st.booleans()):
        options["class_weight"] = positive(classes)
    if draw(st.booleans()):
        options["row_weight"] = positive(*batch)
    if draw(st.booleans()):
        options["peer_weight"] = positive(len(students), len(students) + len(teachers))
    if draw(st.booleans()):
        options["kl_weight"] = torch.tensor(options["kl_weight"], dtype=dtype)
    if draw(st.booleans()):
        target = normal(*batch, classes).softmax(-1)
    else:
        target = torch.randint(classes, batch, generator=g)
        options["ignore_index"] = draw(st.sampled_from([-100, 0]))
        ignored = torch.rand(batch, generator=g) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        target = target.masked_fill(ignored, options["ignore_index"])
    rows, memory = (draw(st.sampled_from(x)) for x in ([1, 3, 4, 100, None], ["fast", "lean"]))
    return Case(students, teachers, target, options, rows, memory)


def column(heads: Heads, i: int) -> list[Any]:
    return [head[i] for head in heads]


def ours(case: Case, heads: Heads) -> Tensor:
    options = dict(case.options)
    for i, name in enumerate(("teacher_hidden", "teacher_weight", "teacher_bias")):
        options[name] = column(case.teachers, i)
    hidden, weight, bias = (column(heads, i) for i in range(3))
    options |= {"chunk_rows": case.chunk_rows, "memory": case.memory}
    return linear_mutual_loss(hidden, weight, case.target, bias, **options)


def plain(case: Case, heads: Heads) -> Tensor:
    options = {**case.options, "teacher_logits": [F.linear(*head) for head in case.teachers]}
    return reference.mutual_loss([F.linear(*head) for head in heads], case.target, **options)


def by_autograd(function: Any, case: Case) -> tuple[Tensor, list[tuple[Tensor | None, ...]]]:
    """Losses, and the gradients of every student's (hidden, weight, bias)."""
    heads = [tuple(t if t is None else t.clone().requires_grad_() for t in h) for h in case.heads]
    losses = function(case, heads)
    # Not a plain sum: a loss or a row must not get another's incoming gradient.
    outer = torch.linspace(0.5, 1.0, losses.numel(), dtype=losses.dtype, device=losses.device)
    leaves = [t for head in heads for t in head if t is not None]
    grads = iter(torch.autograd.grad(losses, leaves, outer.reshape(losses.shape)))
    return losses.detach(), [tuple(None if t is None else next(grads) for t in h) for h in heads]


def assert_exact(case: Case, device: str = "cpu") -> None:
    """Our error against float64 is at most plain torch's in the same dtype, plus a little."""
    exact_losses, exact_grads = by_autograd(plain, case.to(torch.float64))
    plain_losses, plain_grads = by_autograd(plain, case)
    dtype = case.heads[0][0].dtype
    losses, grads = by_autograd(ours, case.to(dtype, device))
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert losses.shape == exact_losses.shape
    eps = torch.finfo(dtype).eps * largest_logit(case)  # of a logit
    loss_terms, grad_terms = magnitudes(case)
    assert error(losses, exact_losses) <= error(plain_losses, exact_losses) + 4 * eps * loss_terms
    for head, *each in zip(case.heads, grads, plain_grads, exact_grads, strict=True):
        hidden, weight, _ = head
        factors = (
            weight.double().abs().sum(0).max(),
            rows_of(hidden).abs().sum(0).max(),
            rows(case),
        )
        for given_, found, simple, exact, factor in zip(head, *each, factors, strict=True):
            if given_ is None:
                assert found is None
                continue
            assert found.shape == given_.shape
            assert found.dtype == dtype
            allowed = 4 * eps * grad_terms * float(factor)
            assert error(found, exact) <= error(simple, exact) + allowed


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.cpu().double() - exact).abs().max()) if found.numel() else 0.0


def rows(case: Case) -> int:
    return case.heads[0][0][..., 0].numel()


def rows_of(hidden: Tensor) -> Tensor:
    return hidden.double().reshape(-1, hidden.shape[-1])


def largest_logit(case: Case) -> float:
    """At least 1: sum of the magnitudes that a logit is made of."""
    sizes = [1.0]
    for head in case.heads + case.teachers:
        sizes.append(float(F.linear(*(t if t is None else t.double().abs() for t in head)).max()))
    return max(sizes)


def magnitudes(case: Case) -> tuple[float, float]:
    """Of the terms whose differences a loss and an element of a logit's gradient are."""
    options, count = case.options, rows(case)
    peers = len(case.heads) + len(case.teachers)
    divergence = 1.1 * float(options["kl_weight"]) * options["temperature"] * peers
    if options["reduction"] == "mean":
        labelled = count
        if not case.target.is_floating_point():
            labelled = max(1, int((case.target != options["ignore_index"]).sum()))
        return 10 * (1 + options["temperature"] * divergence), 10 / labelled + divergence / count
    return 10 * count * (1 + options["temperature"] * divergence), 1.1 + divergence


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_losses_and_gradients_are_those_of_whole_logits(case: Case) -> None:
    assert_exact(case)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_losses_and_gradients_on_cuda(case: Case) -> None:
    assert_exact(case, "cuda")
