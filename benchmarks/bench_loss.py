"""Forward and backward of a cohort's loss on the CPU: the pair loop, a careful loop, ours.

    pytest benchmarks/bench_loss.py

The contestants' gradients are compared before any is timed. On a shared machine

    python benchmarks/bench_loss.py

says more: contestants take turns, each call is timed in CPU time of its single thread, which
leaves out the time that others had the core, and the ratios of the medians are printed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.loss import mutual_loss, mutual_loss_and_grad

SIZES = [(2, 128, 100), (4, 128, 100), (8, 128, 100), (4, 128, 10)]  # (K, N, C)
Contestant = Callable[[list[Tensor], Tensor], Any]


def pair_loop(logits: list[Tensor], target: Tensor) -> list[Tensor]:
    """As most re-implementations have it: a softmax per pair."""
    total = torch.zeros(())
    for k, z in enumerate(logits):
        loss = F.cross_entropy(z, target)
        for j, other in enumerate(logits):
            if j != k:
                log_q, p = F.log_softmax(z, 1), F.softmax(other.detach(), 1)
                loss = loss + F.kl_div(log_q, p, reduction="batchmean") / (len(logits) - 1)
        total = total + loss
    return list(torch.autograd.grad(total, logits))


def careful_loop(logits: list[Tensor], target: Tensor) -> list[Tensor]:
    """As a careful user would write it: one log-softmax a student."""
    log_q = [F.log_softmax(z, 1) for z in logits]
    p = [q.detach().exp() for q in log_q]
    total = torch.zeros(())
    for k, q in enumerate(log_q):
        total = total + F.nll_loss(q, target)
        for j, peer in enumerate(p):
            if j != k:
                total = total + F.kl_div(q, peer, reduction="batchmean") / (len(logits) - 1)
    return list(torch.autograd.grad(total, logits))


def autograd_path(logits: list[Tensor], target: Tensor) -> list[Tensor]:
    """`mutual_loss` and autograd."""
    return list(torch.autograd.grad(mutual_loss(logits, target).sum(), logits))


def engine_path(logits: list[Tensor], target: Tensor) -> list[Tensor]:
    """`mutual_loss_and_grad`, which also counts correct answers and finite students."""
    return mutual_loss_and_grad(logits, target)[1]


CONTESTANTS: list[Contestant] = [pair_loop, careful_loop, autograd_path, engine_path]


def make(size: tuple[int, int, int]) -> tuple[list[Tensor], Tensor]:
    _, rows, classes = size
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (rows,), generator=generator)
    draws = torch.randn(size, generator=generator).unbind(0)
    return [z.clone().requires_grad_() for z in draws], target


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda c: c.__name__)
def bench_loss(benchmark: Any, contestant: Contestant, size: tuple[int, int, int]) -> None:
    """One loss and its gradients for K students."""
    logits, target = make(size)
    for ours, theirs in zip(contestant(logits, target), pair_loop(logits, target), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    benchmark.group = f"mutual loss {size}"
    benchmark.extra_info["torch_threads"] = torch.get_num_threads()
    benchmark.pedantic(contestant, (logits, target), rounds=200, warmup_rounds=20)


def interleaved(size: tuple[int, int, int], rounds: int = 400) -> dict[str, float]:
    """Median CPU milliseconds of each contestant, taking turns in random order."""
    turns = random.Random(0)  # who runs after whom matters to caches and to the heap
    logits, target = make(size)
    samples: dict[str, list[float]] = {c.__name__: [] for c in CONTESTANTS}
    for round_ in range(rounds + 20):
        for contestant in turns.sample(CONTESTANTS, len(CONTESTANTS)):
            start = time.thread_time()
            contestant(logits, target)
            if round_ >= 20:
                samples[contestant.__name__].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(times) for name, times in samples.items()}


def main() -> None:
    """Print a line for each size."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread; median CPU ms (times as fast as pair_loop)")
    for size in SIZES:
        medians = interleaved(size)
        cells = [f"{n} {t:.3f} ({medians['pair_loop'] / t:.1f})" for n, t in medians.items()]
        print(f"{size!s:14}", "  ".join(cells))


if __name__ == "__main__":
    main()
