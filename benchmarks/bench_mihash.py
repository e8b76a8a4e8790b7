"""Time MIHashLoss beside a dense form of it, the triplet loss, and a ResNet-8 on the same rows.

    pytest benchmarks/bench_mihash.py --benchmark-only

Forward and backward pass, one thread, codes of 32 bits, 16 bins, grey images of 8 x 8 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.loss import MIHashLoss
from dml_fast.loss.triplet import TripletLoss
from dml_fast.machine import keep_freed_memory
from dml_fast.models import create_model

BINS = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, and keep memory as a run does."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense(u: Tensor, target: Tensor) -> Tensor:
    """As usually written: every pair at every bin, (N, N, L + 1), left to autograd."""
    bits = u.shape[1]
    phi = torch.tanh(u / 2)
    places = (bits - phi @ phi.T) * (BINS / (2 * bits))
    kernel = (1 - (places[..., None] - torch.arange(BINS + 1)).abs()).clamp(min=0)
    same = target[:, None] == target
    near, far = same.float().fill_diagonal_(0), (~same).float()

    def entropy(weight: Tensor) -> tuple[Tensor, Tensor]:
        count = weight.sum(1)
        h = (kernel * weight[..., None]).sum(1) / count[:, None]
        return torch.special.entr(h.clamp(min=1e-12)).sum(1) / torch.tensor(2.0).log(), count

    (whole, total), (plus, n), (minus, m) = map(entropy, (near + far, near, far))
    return -(whole - n / total * plus - m / total * minus).mean()


@pytest.mark.parametrize("rows", [64, 128, 512])
@pytest.mark.parametrize("name", ["mihash", "dense", "triplet", "resnet8"])
def test_time(name: str, rows: int, benchmark: Any) -> None:
    torch.manual_seed(0)
    u, target = torch.randn(rows, 32, requires_grad=True), torch.arange(rows) % 10
    x = torch.randn(rows, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    net = create_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = {"mihash": MIHashLoss(BINS), "dense": dense, "triplet": TripletLoss()}.get(name)

    def work() -> Tensor:
        value = F.cross_entropy(net(x), target) if loss is None else loss(u, target)
        value.backward()
        return value.detach()

    if name == "dense":
        torch.testing.assert_close(work(), MIHashLoss(BINS)(u, target).detach())
    benchmark.pedantic(work, rounds=15, warmup_rounds=2)
