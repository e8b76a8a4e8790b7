"""Sums over programs: at once or in groups, exact, in a fixed order, with counters zero after."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, QUIET
from torch import Tensor

from dml_fast import mutual_loss_and_grad
from dml_fast.kernels import scratch
from dml_fast.kernels.finish import FEW, GROUP, finish, steps

pytestmark = QUIET


@triton.jit
def sums(
    values,  # (P, Q)
    partials,
    groups,
    totals,
    counters,
    losses,
    stats,
    correct,
    finite,
    more,
    K: tl.constexpr,
    Q: tl.constexpr,
    STATS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """What a kernel of the loss does at its end, with sums that are given."""
    pid = tl.program_id(0)
    by_program, by_quantity = steps(Q, AT_ONCE)
    q = tl.arange(0, 32)
    mine = tl.load(values + pid * Q + q, mask=q < Q)
    tl.store(partials + pid * by_program + q * by_quantity, mine, mask=q < Q)
    finish(
        partials, groups, totals, counters, losses, stats, correct, finite, more,
        0.5, 0.25, 0.125, 0.0625, K, Q, True, False, STATS, AT_ONCE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("programs", "level"),
    [
        *((1, 0), (64, 1), (65, 1), (1, 2), (65, 2)),
        pytest.param(257, 2, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((65, 0), (256, 1), (257, 1))),
    ],
)
def test_sums_are_right_and_counters_zero(programs: int, level: int) -> None:
    """257 is more than are added up at once; 64 and 65 are both sides of a group."""
    assert FEW == 256 and GROUP.value == 64
    students = 3
    quantities = (2 * students, 4 * students, 5 * students + 1 + students**2)[level]
    g = torch.Generator().manual_seed(programs)
    values = torch.randint(-8, 9, (programs, quantities), generator=g).float().to(DEVICE)

    def floats(*shape: int) -> Tensor:
        return torch.full(shape, -1e9, device=DEVICE)

    rows = -(-programs // 64)
    counters = torch.zeros(1 + rows, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the counters are left as they were found
        partials, groups = floats(programs * quantities), floats(rows * quantities)
        totals, losses, stats = floats(quantities), floats(students), floats(2, students)
        correct = torch.full((students,), -7, device=DEVICE)
        finite = torch.full((students,), 7, dtype=torch.uint8, device=DEVICE)
        more = floats(students + 1 + students**2)
        sums[(programs,)](
            values, partials, groups, totals, counters, losses, stats, correct, finite, more,
            students, quantities, level, programs <= FEW, num_warps=1,
        )  # fmt: skip
        assert not counters.any()
    expected = values.double().sum(0).split(students)
    ce, kl = expected[0] * 0.25, expected[1] * 0.125
    assert torch.equal(losses.double(), ce + 0.5 * kl)  # small whole numbers: exact in fp32
    if level:
        assert torch.equal(stats.double(), torch.stack([ce, kl]))
        assert torch.equal(correct, expected[2].long())
        assert torch.equal(finite, (expected[3] == 0).to(torch.uint8))
    if level == 2:
        assert torch.equal(more.double(), torch.cat(expected[4:]) * 0.0625)


class _Device:
    """In place of torch in scratch.py: a GPU whose memory is here."""

    int32 = torch.int32
    Tensor = torch.Tensor
    device = torch.device

    def __init__(self) -> None:
        self.capturing, self.zeroed = False, 0
        self.cuda = self

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def current_stream(self, device: torch.device) -> _Device:
        return self

    cuda_stream = 7

    def zeros(self, size: int, **_: object) -> Tensor:
        self.zeroed += 1
        return torch.zeros(size, dtype=torch.int32)


def test_captured_calls_get_counters_of_their_own_without_a_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that sets zeros takes 1.5 to 2 us of a graph (kernels2.md, section 4)."""
    fake, gpu = _Device(), torch.device("cuda")
    monkeypatch.setattr(scratch, "torch", fake)
    monkeypatch.setattr(scratch, "_kept", {})
    monkeypatch.setattr(scratch, "_slabs", {})
    fake.capturing = True
    scratch.counters(gpu, 3, True)
    assert fake.zeroed == 1  # there is no slab yet
    fake.capturing = False
    eager = scratch.counters(gpu, 3, True)
    assert scratch.counters(gpu, 5, True) is eager
    before, fake.capturing = fake.zeroed, True
    parts = [scratch.counters(gpu, size, True) for size in (2, 5, 1)]
    assert fake.zeroed == before
    starts = [part.data_ptr() for part in parts]
    assert [len(part) for part in parts] == [2, 5, 1]
    assert [b - a for a, b in pairwise(starts)] == [16, 32]  # aligned alike
    assert eager.data_ptr() not in starts
    scratch.counters(gpu, scratch._SLAB, True)  # more than is left
    assert fake.zeroed == before + 1
    scratch.counters(gpu, 2, False)  # torch.compile's
    assert fake.zeroed == before + 2


@pytest.mark.parametrize("classes", [5, pytest.param(3000, marks=pytest.mark.slow)])
def test_losses_have_the_same_bits_with_and_without_statistics(classes: int) -> None:
    """Of both forward kernels."""
    g = torch.Generator().manual_seed(1)
    logits = [torch.randn(9, classes, generator=g).to(DEVICE) for _ in range(3)]
    target = torch.randint(classes, (9,), generator=g).to(DEVICE)
    some = mutual_loss_and_grad(logits, target, backend="triton")
    more = mutual_loss_and_grad(logits, target, backend="triton", return_stats=True)
    assert torch.equal(some[0], more[0])
    assert all(torch.equal(a, b) for a, b in zip(some[1], more[1], strict=True))
    for name in ("ce", "kl", "correct", "finite"):
        assert torch.equal(getattr(some[2], name), getattr(more[2], name))
