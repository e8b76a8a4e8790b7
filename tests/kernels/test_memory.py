"""Every element that a kernel is to write is written, and none beyond; its counters end at zero."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import QUIET, STEP, checked, cohort
from torch import Tensor

from dml_fast.kernels import launch
from dml_fast.loss.problem import Problem

pytestmark = [pytest.mark.usefixtures("kernel"), QUIET]
GUARD, BYTE = 512, 0xAB  # bytes on either side, and what all memory is filled with


class Arena:
    """Allocates for dml_fast.kernels.launch, each tensor between guards."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = torch.Size([shape] if isinstance(shape, int) else shape)
        size = shape.numel() * dtype.itemsize
        buffer = torch.full((size + 2 * GUARD,), BYTE, dtype=torch.uint8, device=device)
        self.buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(dtype).reshape(shape)

    def empty_like(self, z: Tensor, *, memory_format: torch.memory_format) -> Tensor:
        assert memory_format == torch.contiguous_format
        return self.empty(z.shape, dtype=z.dtype, device=z.device)

    def assert_guards_stand(self) -> None:
        assert self.buffers
        for buffer, size in self.buffers:
            assert (buffer[:GUARD] == BYTE).all()
            assert (buffer[GUARD + size :] == BYTE).all()


def assert_written(*tensors: Tensor | None) -> None:
    for x in tensors:
        assert x is not None
        found = x.contiguous().reshape(-1).view(torch.uint8).reshape(-1, x.element_size())
        assert not (found == BYTE).all(1).any()


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
    arena = Arena()
    monkeypatch.setattr(launch, "torch", arena)
    return arena


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What launches count with."""
    made: list[Tensor] = []
    real = launch.counters

    def kept(device: torch.device, size: int, keep: bool) -> Tensor:
        made.append(real(device, size, keep))
        assert made[-1].numel() >= size
        return made[-1]

    monkeypatch.setattr(launch, "counters", kept)
    return made


def guarded(z: Tensor) -> Tensor:
    """The same numbers with NaN before and after, which no kernel may meet."""
    wide = z.new_full((z.numel() + 128,), torch.nan)
    inner = wide[64 : 64 + z.numel()].reshape(z.shape)
    inner.copy_(z)
    return inner


SHAPES = [(2, 1, 1), (3, 5, 7), (1, 9, 16), (2, 3, STEP + 1), (2, 2, 2 * STEP)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_is_written_and_nothing_else(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    reduction: str,
    arena: Arena,
    counters: list[Tensor],
) -> None:
    students, rows, classes = shape
    logits, target = cohort(students, rows, classes, dtype)
    assert_all_is_written(
        checked([guarded(z) for z in logits], target, reduction=reduction), arena, counters
    )


@pytest.mark.parametrize("divergence", ["reverse", "symmetric", "jsd"])
def test_other_divergences_write_no_less(
    divergence: str, arena: Arena, counters: list[Tensor]
) -> None:
    logits, target = cohort(2, 3, STEP + 1, torch.float16)
    asked = checked([guarded(z) for z in logits], target, divergence=divergence)
    assert_all_is_written(asked, arena, counters)


def assert_all_is_written(problem: Problem, arena: Arena, counters: list[Tensor]) -> None:
    students = len(problem.students)
    kept = [z.clone() for z in problem.students]
    (losses, grads, stats), saved = launch.launch(problem, with_grad=True, save=True, stats="all")
    assert grads is not None and stats is not None and saved is not None
    arena.assert_guards_stand()
    assert_written(losses, *grads, saved, *stats)
    assert all(x.isfinite().all() for x in (losses, *grads, saved, *stats))

    outer = torch.ones_like(losses)
    later = [launch.empty_like(z) for z in problem.students]
    launch.launch_gradient(problem, saved, outer, later)
    arena.assert_guards_stand()
    assert_written(*later)
    only = [None] * (students - 1) + [launch.empty_like(problem.students[-1])]
    launch.launch_gradient(problem, saved, outer, only)
    assert torch.equal(only[-1], later[-1])
    assert all(torch.equal(a, b) for a, b in zip(kept, problem.students, strict=True))
    assert counters and not any(c.any() for c in counters)


def test_without_statistics_only_losses_are_written(arena: Arena) -> None:
    logits, target = cohort(2, 5, 7)
    problem = checked(logits, target)
    (losses, grads, stats), saved = launch.launch(
        problem, with_grad=False, save=False, stats="none"
    )
    arena.assert_guards_stand()
    assert_written(losses)
    assert grads is stats is saved is None


@pytest.mark.parametrize("divergence", ["forward", "symmetric"])
@pytest.mark.parametrize("stats", ["none", "cheap", "all"])
def test_gradients_over_the_logits_are_those_beside_them(
    kernel: str, stats: str, divergence: str
) -> None:
    """All statistics read the logits once more: then they are not written over."""
    logits, target = cohort(3, 5, 2 * STEP + 5)
    problem = checked(logits, target, divergence=divergence)
    beside = launch.launch(problem, with_grad=True, save=False, stats=stats)
    problem = replace(problem, students=tuple(z.clone() for z in logits))
    over = launch.launch(replace(problem, in_place=True), with_grad=True, save=False, stats=stats)
    assert beside.solution.grads is not None and over.solution.grads is not None
    assert torch.equal(beside.solution.losses, over.solution.losses)
    pairs = zip(beside.solution.grads, over.solution.grads, problem.students, strict=True)
    for a, b, z in pairs:
        assert torch.equal(a, b)
        assert (b.data_ptr() == z.data_ptr()) == (stats != "all")
