"""Cases of the mutual loss for the tests of its backends, and the rule that they must satisfy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dml_fast.loss import mutual_loss, reference

Answer = Callable[["Case"], tuple[Tensor, list[Tensor]]]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


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
def cases(
    draw: st.DrawFn,
    dtypes: list[torch.dtype] = DTYPES,
    widths: st.SearchStrategy[int] = st.integers(1, 12),  # noqa: B008
    sides: st.SearchStrategy[int] = st.integers(1, 6),  # noqa: B008
) -> Case:
    """K in 1..5 students, up to two batch dimensions, and any combination of the options."""
    students, classes = draw(st.integers(1, 5)), draw(widths)
    batch = tuple(draw(st.lists(sides, min_size=0, max_size=2)))
    if batch[1:] == (classes,):  # such a target also fits torch's order, and is refused
        batch = (batch[0], classes + 1)
    dtype = draw(st.sampled_from(dtypes))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return (spread * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    def positive(*shape: int) -> Tensor:
        return (0.1 + torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)

    options: dict[str, Any] = {
        "kl_weight": draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        "ce_weight": draw(st.sampled_from([1.0, 1.0, 0.0, 0.4])),
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


def assert_exact(case: Case, device: Any = "cpu", answer: Answer | None = None) -> None:
    """Our error against float64 is at most plain torch's in the same dtype, plus a little.

    ``answer`` gives losses and gradients of a case; without it, the closed form under autograd.
    """
    exact_losses, exact_grads = by_autograd(reference.mutual_loss, case.to(torch.float64))
    plain_losses, plain_grads = by_autograd(reference.mutual_loss, case)
    ours = case.to(case.logits[0].dtype, device)
    if answer is None:
        losses, grads = by_autograd(partial(mutual_loss, backend="closed_form"), ours)
    else:
        losses, grads = answer(ours)
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
    if options.get("divergence", "forward") != "forward":  # log p is a factor of the gradient
        hot = [z.double() / options["temperature"] for z in case.logits]
        divergence *= 1 + max(
            (float(-z.log_softmax(-1).min()) for z in hot if z.numel()), default=0
        )
    loss = 1 + options["temperature"] * divergence
    loss *= max(2.5, math.log(case.logits[0].shape[-1]))  # what entropies are at most
    if options["reduction"] == "mean":
        return loss, 1 / max(labelled, 1) + divergence / rows
    return loss * (rows if options["reduction"] == "sum" else 1), 1 + divergence
