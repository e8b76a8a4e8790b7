"""The logits never exist whole: what is allocated, seen from PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.counting import operators_and_bytes
from dml_fast.loss import backends, closed_form, mutual_loss, products
from dml_fast.loss.linear import linear_mutual_loss
from dml_fast.loss.problem import Problem, Solution

GIB = 2**30
K, C = 3, 300


class Largest(TorchDispatchMode):
    """The bytes of the largest storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and storage(leaf) not in given:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def call(
    rows: int, width: int, learn: str = "all", soft: bool = False, **options: Any
) -> Callable[[], None]:
    """Forward and backward of K students, 8 rows at a time, with every option."""
    g = torch.Generator().manual_seed(0)
    hidden = list(torch.randn((K, rows, width), generator=g).unbind())
    weight = list(torch.randn((K, C, width), generator=g).unbind())
    target = torch.randint(C, (rows,), generator=g)
    target[0] = -100
    if soft:
        target = torch.rand((rows, C), generator=g)
    options |= {
        "class_weight": torch.rand(C, generator=g),
        "row_weight": torch.rand(rows, generator=g),
        "temperature": 2.0,
        "label_smoothing": 0.1,
        "teacher_hidden": hidden[:1],
        "teacher_weight": weight[:1],
    }

    def run() -> None:
        h = [x.detach().requires_grad_() for x in hidden]
        w = [x.detach().requires_grad_(learn == "all") for x in weight]
        linear_mutual_loss(h, w, target, chunk_rows=8, **options).sum().backward()

    return run


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_is_larger_than_a_chunk(reduction: str, soft: bool) -> None:
    run = call(200, 4, soft=soft, reduction=reduction)
    with Largest() as largest:
        run()
    assert largest.bytes <= 4 * (K + 1) * 8 * C  # fp32, the teacher included; 4 N C is 6 times it


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_weights_have_no_accumulators(reduction: str) -> None:
    width = 100
    for learn, most in (("all", 4 * C * width), ("hidden", 4 * (K + 1) * 8 * C)):
        run = call(20, width, learn, reduction=reduction)
        with Largest() as largest:
            run()
        assert 0.2 * most < largest.bytes <= most


def test_no_grad_makes_no_gradients() -> None:
    run = call(20, 100, "all")
    with Largest() as largest, torch.no_grad(), pytest.raises(RuntimeError, match="require grad"):
        run()  # its backward pass finds nothing
    assert largest.bytes <= 4 * (K + 1) * 8 * C


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_rows_cost_only_their_hidden_states(reduction: str) -> None:
    few, many = (operators_and_bytes(call(n, 4, reduction=reduction))[1] for n in (80, 400))
    assert few > 4 * 2 * (K + 1) * 8 * C  # logits and gradients of a chunk: it did measure
    # The gradients of K hidden states in fp32, once more as returned; labels, losses, weights.
    # Not 4 K C = 3600, a row of logits.
    assert (many - few) / 320 < 2 * 4 * K * 4 + 100


Heads = tuple[list[Tensor], list[Tensor], Tensor]


def on_meta(rows: int, classes: int = 131072, width: int = 1024, students: int = 4) -> Heads:
    """bf16, without numbers: for 4096 rows, 4 GiB of logits."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    hidden = [torch.empty((rows, width), **options) for _ in range(students)]
    weight = [torch.empty((classes, width), **options) for _ in range(students)]
    return hidden, weight, torch.empty(rows, dtype=torch.int64, device="meta")


def peak(losses: Callable[[list[Tensor], list[Tensor], Tensor], Any], rows: int) -> int:
    """Bytes beyond the hidden states and weights, of four students' losses and gradients."""
    inputs = 4 * (rows + 131072) * 1024 * 2
    return operators_and_bytes(lambda: losses(*on_meta(rows)).sum().backward())[1] - inputs


class Frugal:
    """A backend that needs what the kernels do: losses, and gradients in the logits' place."""

    SCRATCH, IN_PLACE = 0, True

    @staticmethod
    def solve(problem: Problem, with_grad: bool, stats: str) -> Solution:
        losses = torch.zeros(len(problem.students), device=problem.device)
        assert problem.in_place
        return Solution(losses, problem.students, None)


def test_language_models_need_a_ninth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 x 4096 x 131072. On a GPU, a chunk is 1,024 rows of logits, no more."""

    def unfused(hidden: list[Tensor], weight: list[Tensor], target: Tensor) -> Tensor:
        logits = [F.linear(h, w) for h, w in zip(hidden, weight, strict=True)]
        return mutual_loss(logits, target)

    whole = peak(unfused, 4096)
    monkeypatch.setattr(backends, "find", lambda name, problem: Frugal)
    monkeypatch.setattr(products, "_adds_in_fp32", lambda device: True)
    chunked = peak(linear_mutual_loss, 4096)
    # fp32 gradients of weights and hidden states; logits in bf16
    floor = (2 + 1 / 16 + 1) * GIB
    assert floor <= chunked < floor + 2**22  # labels, losses, a row for each stand-in
    assert chunked < whole / 9


def test_the_closed_form_takes_smaller_chunks_and_looks_at_no_number() -> None:
    """On the meta device reading a number is an error."""
    assert 2 * GIB < peak(linear_mutual_loss, 512) < 2.4 * GIB


class SeenError(Exception):
    """Has the number of rows in the first chunk."""


@pytest.mark.parametrize(
    ("kernels", "classes", "width", "students", "expected"),
    [
        (False, 131072, 1024, 4, 32),  # 24 bytes a logit: 512 MiB / 12 MiB = 42
        (True, 131072, 1024, 4, 1024),  # 2 bytes, and half of 2 GiB
        (True, 131072, 1024, 2, 1024),  # what a student may have does not depend on the others
        (False, 10, 64, 4, 69904),  # 64 MiB / 960
        (False, 2**26, 1, 1, 1),
    ],
)
def test_default_chunks(
    kernels: bool,
    classes: int,
    width: int,
    students: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(problem: Problem, with_grad: bool, stats: str) -> Solution:
        raise SeenError(problem.shape[1])

    solver = Frugal if kernels else closed_form
    monkeypatch.setattr(solver, "solve", stop)
    monkeypatch.setattr(backends, "find", lambda name, problem: solver)
    with pytest.raises(SeenError, match=f"^{expected}$"):
        linear_mutual_loss(*on_meta(70000, classes, width, students))
