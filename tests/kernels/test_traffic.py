"""Bytes that the Triton kernels load and store, counted in the interpreter.

The floor of a loss with its gradients is one read of the logits and one write of the gradients,
K N C elements each. What else is read and written is O(N) or O(1) a program, and is asserted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import INTERPRETED, QUIET, STEP, checked, cohort, forced
from torch import Tensor

from dml_fast.kernels import launch
from dml_fast.loss.problem import Problem

pytestmark = [QUIET, pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")]
K, N, C = 3, 6, 2 * STEP + 5  # of fp32; a tail of rows and a tail of columns


class Traffic:
    """Bytes by argument; of several arguments that are one tensor, the first has them."""

    def __init__(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.programs = 0

    def look_at(self, arguments: dict[str, Any], programs: int) -> None:
        self.programs = programs
        tensors = {x.data_ptr(): (n, x) for n, x in reversed(arguments.items()) if is_tensor(x)}
        self._starts = np.array(sorted(tensors), dtype=np.int64)
        parts = [tensors[int(start)] for start in self._starts]
        self._names = np.array([name for name, _ in parts])
        sizes = [
            sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for _, x in parts
        ]
        ends = [(size + 1) * x.element_size() for size, (_, x) in zip(sizes, parts, strict=True)]
        self._ends = self._starts + ends

    def count(self, counter: Counter[str], pointers: Any, mask: Any) -> None:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[wanted].astype(np.int64)
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = (which >= 0) & (addresses + itemsize <= self._ends[which])
        assert inside.all(), "an access outside of all arguments"
        for name in self._names[which]:
            counter[name] += itemsize


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def counting() -> Iterator[Traffic]:
    from triton.runtime import interpreter

    traffic = Traffic()
    builder = type(interpreter.interpreter_builder)
    load, store = builder.create_masked_load, builder.create_masked_store
    run = interpreter.GridExecutor.__call__

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.count(traffic.loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.count(traffic.stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_run(self: Any, *arguments: Any, **options: Any) -> Any:
        traffic.look_at(options, self.grid[0])
        return run(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(interpreter.GridExecutor, "__call__", counted_run)
        yield traffic


def problem(dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
    logits, target = cohort(K, N, C, dtype)
    options = {"teacher_logits": None} | options
    return checked(logits, target, **options)


def measure(asked: Problem, **options: Any) -> tuple[Traffic, Any]:
    with counting() as traffic:
        answer = launch.launch(asked, **({"save": False, "stats": "none"} | options))
    return traffic, answer


def assert_logits_are_read(traffic: Traffic, times: int, itemsize: int = 4) -> None:
    """So many times, and once more the label's logit of each row."""
    for k in range(K):
        assert traffic.loaded.pop(f"z{k}") == (times * N * C + N) * itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "reads"), [("one_pass", 1), ("two_sweep", 2)])
def test_losses_and_gradients_in_one_launch(kernel: str, reads: int, dtype: torch.dtype) -> None:
    with forced(kernel):
        traffic, _ = measure(problem(dtype), with_grad=True)
    size = dtype.itemsize
    assert_logits_are_read(traffic, reads, size)
    for k in range(K):
        assert traffic.stored.pop(f"g{k}") == N * C * size
    assert traffic.loaded.pop("index") == 8 * N
    # Of each quantity a number per program.
    of_programs = 4 * 2 * K * traffic.programs
    assert traffic.stored.pop("partials") == traffic.loaded.pop("partials") == of_programs
    assert traffic.stored.pop("counters") == 4  # zero for the next launch
    assert traffic.stored.pop("losses") == 4 * K
    assert not +traffic.loaded and not +traffic.stored


@pytest.mark.parametrize("kernel", ["one_pass", "two_sweep"])
def test_forward_and_backward_of_autograd(kernel: str) -> None:
    """One read; then one read and one write. Between them 3 K + 1 numbers a row are kept."""
    asked = problem()
    with forced(kernel):
        traffic, (_, saved) = measure(asked, with_grad=False, save=True)
        assert_logits_are_read(traffic, 1)
        kept = 4 * N * (3 * K + 1)
        assert saved is not None and saved.numel() * saved.element_size() == kept
        assert traffic.stored.pop("saved") == kept
        assert not any(traffic.stored[f"g{k}"] for k in range(K))

        grads = [torch.empty_like(z) for z in asked.students]
        with counting() as traffic:
            launch.launch_gradient(asked, saved, torch.ones(K), grads)
    tiles = -(-C // 32)  # each reads its rows' numbers anew, from the cache
    for k in range(K):
        assert traffic.loaded.pop(f"z{k}") == 4 * N * C
        assert traffic.stored.pop(f"g{k}") == 4 * N * C
    assert traffic.loaded.pop("saved") == tiles * 4 * N * (2 * K + 1)
    assert traffic.loaded.pop("index") == tiles * 8 * N
    assert traffic.loaded.pop("outer") == tiles * 4 * K * N
    assert not +traffic.loaded and not +traffic.stored


def test_a_student_that_does_not_learn_is_read_and_not_written() -> None:
    asked = problem()
    with forced("one_pass"):
        saved = launch.launch(asked, with_grad=False, save=True, stats="none").saved
        assert saved is not None
        grads = [torch.empty_like(asked.students[0]), None, None]
        with counting() as traffic:
            launch.launch_gradient(asked, saved, torch.ones(K), grads)
    assert [traffic.loaded[f"z{k}"] for k in range(K)] == [4 * N * C] * K
    assert traffic.stored == {"g0": 4 * N * C}


@pytest.mark.parametrize(("kernel", "reads"), [("one_pass", 1), ("two_sweep", 2)])
def test_all_statistics(kernel: str, reads: int) -> None:
    """They come with the one pass; two sweeps need one more, for the pairs."""
    with forced(kernel):
        traffic, _ = measure(problem(), with_grad=False, stats="all")
    assert_logits_are_read(traffic, reads)
    assert traffic.stored["information"] == 4 * N


@pytest.mark.parametrize(
    ("divergence", "kernel", "reads"),
    [
        *(("symmetric", "one_pass", 1), ("jsd", "one_pass", 1)),
        ("symmetric", "two_sweep", 2),
        pytest.param("reverse", "two_sweep", 2, marks=pytest.mark.slow),
        pytest.param("jsd", "two_sweep", 3, marks=pytest.mark.slow),
    ],
)
def test_other_divergences(divergence: str, kernel: str, reads: int) -> None:
    """Long rows are swept once more for "jsd", and for teachers."""
    asked = problem(divergence=divergence)
    with forced(kernel):
        traffic, _ = measure(asked, with_grad=True)
        assert_logits_are_read(traffic, reads)
        assert [traffic.stored.pop(f"g{k}") for k in range(K)] == [4 * N * C] * K
        traffic, (_, saved) = measure(asked, with_grad=False, save=True)
        assert_logits_are_read(traffic, max(reads - 1, 1))
        kept = 4 * N * (4 * K + 1)
        assert saved is not None and saved.numel() * 4 == kept == traffic.stored.pop("saved")
        assert not any(traffic.stored[f"g{k}"] for k in range(K))
        with counting() as traffic:
            launch.launch_gradient(asked, saved, torch.ones(K), asked.students)
    for k in range(K):
        assert traffic.loaded[f"z{k}"] + traffic.loaded[f"g{k}"] == 4 * N * C
        assert traffic.stored[f"z{k}"] + traffic.stored[f"g{k}"] == 4 * N * C


@pytest.mark.parametrize(("kernel", "more"), [("one_pass", 0), ("two_sweep", 1)])
def test_a_row_with_a_masked_class(kernel: str, more: int) -> None:
    """Two sweeps go over that row once more."""
    asked = problem()
    asked.students[1][2, 5] = -torch.inf
    with forced(kernel):
        traffic, _ = measure(asked, with_grad=False)
    for k in range(K):
        assert traffic.loaded[f"z{k}"] == 4 * (N * C + N + more * C)


def test_counted_labels_and_probabilities() -> None:
    """Where rows may lack a label every program counts them all, out of the cache."""
    logits, target = cohort(K, N, C)
    target[1] = -100
    with forced("one_pass"):
        traffic, _ = measure(checked(logits, target), with_grad=True)
        assert traffic.loaded["index"] == 8 * (N + N * traffic.programs)
        soft = torch.rand(N, C)
        traffic, _ = measure(checked(logits, soft), with_grad=True)
    assert traffic.loaded["soft"] == 4 * N * C
    assert [traffic.loaded[f"z{k}"] for k in range(K)] == [4 * N * C] * K
    with forced("two_sweep"):
        traffic, _ = measure(checked(logits, soft), with_grad=True)
    assert traffic.loaded["soft"] == 2 * 4 * N * C
