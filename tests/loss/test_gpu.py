"""The loss on a CUDA device: no wait for it, and the CPU's answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dml_fast.loss import mutual_loss, mutual_loss_and_grad

pytestmark = pytest.mark.gpu


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def arguments(soft: bool) -> dict[str, Any]:
    """Every option at once, some rows unlabelled, one student broken."""
    g = torch.Generator().manual_seed(0)
    logits = list(torch.randn((3, 32, 10), generator=g))
    logits[2][4] = torch.nan
    target = torch.randint(10, (32,), generator=g)
    target[5] = -100
    if soft:
        target = torch.rand((32, 10), generator=g)
    return {
        "logits": logits,
        "target": target,
        "kl_weight": torch.tensor(0.5),
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "class_weight": torch.rand(10, generator=g),
        "row_weight": torch.rand(32, generator=g),
        "teacher_logits": [torch.randn((32, 10), generator=g)],
        "return_stats": True,
    }


def to_cuda(value: Any) -> Any:
    if isinstance(value, list):
        return [to_cuda(one) for one in value]
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("soft", [False, True])
def test_no_call_waits_for_the_device(soft: bool, request: pytest.FixtureRequest) -> None:
    on_cpu = arguments(soft)
    on_gpu = {name: to_cuda(value) for name, value in on_cpu.items()}
    leaves = [z.requires_grad_() for z in on_gpu["logits"]]
    request.getfixturevalue("no_waiting")
    losses, grads, stats = mutual_loss_and_grad(
        **on_gpu, grad_scale=torch.ones_like(leaves[0][0, 0])
    )
    mutual_loss(**on_gpu)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    expected_losses, expected_grads, expected_stats = mutual_loss_and_grad(**on_cpu)
    torch.testing.assert_close(losses.cpu(), expected_losses, equal_nan=True)
    for g, leaf, expected in zip(grads, leaves, expected_grads, strict=True):
        torch.testing.assert_close(g.cpu(), expected, equal_nan=True)
        torch.testing.assert_close(leaf.grad.cpu(), expected, equal_nan=True)
    for found, expected in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-5)
