"""The step of a cohort that a good engineer writes in an hour, without us.

bf16 autocast, channels-last, one fused optimizer for all students, one softmax a student, one
backward pass, ``torch.compile`` of each student, and one CUDA graph captured by hand on one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.common.device import Cuda, Device
from benchmarks.peers.loss import careful

WARM_UP = 3


def hour_step(
    models: Sequence[nn.Module],
    images: Tensor,
    target: Tensor,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None,
    compiled: bool,
) -> Callable[[], Tensor]:
    """Return one update of all students; it returns their losses (K,) before it.

    Args:
        models: K students, channels-last.
        images: (N, 3, H, W), channels-last.
        target: (N,).
        optimizer: of all students' parameters.
        dtype: of autocast.
        compiled: whether each student is compiled.
    """
    passes = [torch.compile(m, dynamic=False) for m in models] if compiled else models
    kind = images.device.type

    def step() -> Tensor:
        # Each weight is cast once in a step: a cache would only be in the way of a capture.
        with torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False):
            logits = [one(images) for one in passes]
        losses = careful(logits, target)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    return step


def in_one_graph(
    step: Callable[[], Tensor],
    models: Sequence[nn.Module],
    optimizer: torch.optim.SGD,
    device: Device | None = None,
) -> Callable[[], Tensor]:
    """Return the step as the replay of a CUDA graph; what its warm-up changes is put back.

    Args:
        step: as it is captured.
        models: the students.
        optimizer: with momentum. A buffer of zeros gives the first step what no buffer does.
        device: tests put another one here.
    """
    device = device or Cuda()
    state = [t for m in models for t in (*m.parameters(), *m.buffers())]
    saved = [t.detach().clone() for t in state]
    device.warm_up(step, WARM_UP)
    with torch.no_grad():
        for t, before in zip(state, saved, strict=True):
            t.copy_(before)
        for slots in optimizer.state.values():
            slots["momentum_buffer"].zero_()
    optimizer.zero_grad(set_to_none=True)
    found: list[Tensor] = []
    replay = device.capture(lambda: found.append(step()), 1).replay

    def call() -> Tensor:
        replay()
        return found[-1]

    return call
