"""The Triton kernels compiled and on a GPU: what the interpreter on a CPU cannot show.

Exact as torch, the same bits every time, inside CUDA graphs and torch.compile, on two streams at
once, without waiting for the device, beyond 2³¹ elements, and in no more memory than promised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import counting
from dml_fast.loss import mutual_loss, mutual_loss_and_grad, reference

pytestmark = pytest.mark.gpu

Shape = tuple[int, int, int]  # (K, N, C)
SHAPES: list[Shape] = [  # both kernels, widths that vectors fit and others, every choice of warps
    (1, 3, 1),
    (2, 1, 2),
    (2, 128, 10),
    (8, 37, 10),
    (4, 128, 100),
    (8, 128, 100),
    (3, 5, 127),
    (4, 64, 1000),
    (7, 9, 1001),
    (2, 16, 2048),
    (8, 6, 4096),
    (4, 6, 4099),
    (4, 8, 32768),
    (2, 8, 50257),
    (2, 3, 131072),
]
ONE_PASS, TWO_SWEEP = (4, 2000, 1000), (4, 96, 32768)
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tempered": {"temperature": 3.0, "kl_weight": 0.5, "label_smoothing": 0.1},
    "sums": {"peer_reduction": "sum", "reduction": "sum"},
    "rows": {"reduction": "none", "temperature": 0.5},
}
# Not their product: each is a kernel of its own to compile, in 2 to 10 seconds.
FEW = [(4, 128, 10), (4, 128, 100), (4, 64, 1000), (7, 9, 1001), (4, 8, 32768)]
CASES = [
    *((shape, torch.float32, "paper") for shape in SHAPES),
    *((shape, dtype, "paper") for shape in FEW for dtype in (torch.bfloat16, torch.float16)),
    *((shape, torch.bfloat16, name) for shape in FEW[1:] for name in OPTIONS if name != "paper"),
]


def draw(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Logits and a target of which one row in eight has no label, where there are so many."""
    _, rows, classes = shape
    g = torch.Generator("cuda").manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=g, device="cuda")
    target = torch.randint(classes, (rows,), generator=g, device="cuda")
    target[5::8] = -100
    return [z.to(dtype).requires_grad_() for z in logits], target


def ours(logits: list[Tensor], target: Tensor, **options: Any) -> tuple[Any, ...]:
    """(losses, gradients, statistics) of the engine's path."""
    return mutual_loss_and_grad(logits, target, backend="triton", return_stats=True, **options)


def autograd(logits: list[Tensor], target: Tensor, **options: Any) -> tuple[Any, ...]:
    """(losses, gradients, statistics) of a user's path."""
    found = mutual_loss(logits, target, backend="triton", return_stats=True, **options)
    losses, stats = found
    assert isinstance(losses, Tensor)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits), stats


def everything(answer: tuple[Any, ...]) -> list[Tensor]:
    losses, grads, stats = answer
    return [losses, *grads, *stats]


def assert_same_bits(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(everything(found), everything(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def poison(shape: Shape, dtype: torch.dtype) -> None:
    """Leave NaN where the allocator will put the next gradients."""
    students, rows, classes = shape
    kept = [
        torch.full((rows, classes), math.nan, dtype=dtype, device="cuda") for _ in range(students)
    ]
    del kept


def plain(
    logits: list[Tensor], target: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The reference, computed in a dtype of one's choice, gradients rounded to the logits' own."""
    leaves = [z.detach().to(dtype).requires_grad_() for z in logits]
    losses = reference.mutual_loss(leaves, target, **options)
    grads = torch.autograd.grad(losses.sum(), leaves)
    if dtype == torch.float32:
        grads = tuple(g.to(z.dtype) for g, z in zip(grads, logits, strict=True))
    return losses.detach(), list(grads)


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm())


@pytest.mark.parametrize("path", [ours, autograd])
@pytest.mark.parametrize(("shape", "dtype", "options"), CASES, ids=str)
def test_no_further_from_float64_than_plain_torch(
    shape: Shape, dtype: torch.dtype, options: str, path: Any
) -> None:
    chosen = OPTIONS[options]
    logits, target = draw(shape, dtype)
    right_losses, right_grads = plain(logits, target, torch.float64, **chosen)
    torch_losses, torch_grads = plain(logits, target, torch.float32, **chosen)
    poison(shape, dtype)
    losses, grads, _ = path(logits, target, **chosen)
    slack = 2e-6 * float(right_losses.norm()) + 1e-7
    assert error(losses, right_losses) <= error(torch_losses, right_losses) + slack
    for g, by_torch, right in zip(grads, torch_grads, right_grads, strict=True):
        slack = 2e-6 * float(right.norm()) + 1e-7
        # Rounded to 16 bits, both are mostly rounding error, of one size but not the same.
        factor = 1.0 if dtype == torch.float32 else 1.02
        assert error(g, right) <= factor * error(by_torch, right) + slack


@pytest.mark.parametrize("path", [ours, autograd])
@pytest.mark.parametrize("shape", [(4, 128, 100), ONE_PASS, TWO_SWEEP], ids=str)
def test_the_same_bits_a_hundred_times(shape: Shape, path: Any) -> None:
    logits, target = draw(shape, torch.float32)
    first = path(logits, target)
    for _ in range(100):
        assert_same_bits(path(logits, target), first)


@pytest.mark.parametrize("path", [ours, autograd])
@pytest.mark.parametrize("shape", [(4, 128, 100), ONE_PASS, TWO_SWEEP], ids=str)
def test_a_cuda_graph_replays_on_new_inputs(shape: Shape, path: Any) -> None:
    held, target = draw(shape, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        path(held, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = path(held, target)
    for seed in (1, 2, 3):
        logits, new_target = draw(shape, torch.bfloat16, seed)
        with torch.no_grad():
            target.copy_(new_target)
            for z, new in zip(held, logits, strict=True):
                z.copy_(new)
        for tensor in everything(captured):
            tensor.fill_(1)  # of the last replay nothing is left
        graph.replay()
        assert_same_bits(captured, path(logits, new_target))


def test_a_scale_on_the_device_is_read_at_replay() -> None:
    logits, target = draw((4, 128, 100), torch.bfloat16)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0], device="cuda")
    ours(logits, target, grad_scale=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, grads, _ = ours(logits, target, grad_scale=scale)
    scale.mul_(16)
    graph.replay()
    _, unscaled, _ = ours(logits, target)
    for g, plain_g, factor in zip(grads, unscaled, (16, 32, 64, 128), strict=True):
        torch.testing.assert_close(g, plain_g * factor, rtol=0, atol=0)  # powers of two


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("shape", [(4, 128, 100), TWO_SWEEP], ids=str)
def test_compiled_in_one_piece(shape: Shape, mode: str) -> None:
    torch.compiler.reset()
    users = torch.compile(
        lambda logits, target: mutual_loss(logits, target, backend="triton").sum(),
        fullgraph=True,
        mode=mode,
    )
    engines = torch.compile(
        lambda logits, target: mutual_loss_and_grad(logits, target, backend="triton")[:2],
        fullgraph=True,
        mode=mode,
    )
    for seed in (1, 2, 3):
        logits, target = draw(shape, torch.float32, seed)
        losses, grads, _ = ours(logits, target)
        _, by_autograd, _ = autograd(logits, target)
        torch.compiler.cudagraph_mark_step_begin()
        total = users(logits, target)
        found = torch.autograd.grad(total, logits)
        torch.testing.assert_close(total, losses.sum())
        torch.testing.assert_close(found, by_autograd)
        torch.compiler.cudagraph_mark_step_begin()
        found_losses, found_grads = engines(logits, target)
        torch.testing.assert_close(found_losses, losses)
        torch.testing.assert_close(list(found_grads), list(grads))


def test_two_streams_at_once_do_not_share_anything() -> None:
    problems = [draw(ONE_PASS, torch.float32, seed) for seed in (1, 2)]
    alone = [ours(*problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    answers: list[list[tuple[Any, ...]]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, problem, found in zip(streams, problems, answers, strict=True):
            with torch.cuda.stream(stream):
                found.append(ours(*problem))
    torch.cuda.synchronize()
    for found, expected in zip(answers, alone, strict=True):
        for answer in found:
            assert_same_bits(answer, expected)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", [ours, autograd])
@pytest.mark.parametrize("shape", [(4, 128, 100), ONE_PASS, TWO_SWEEP], ids=str)
def test_nobody_waits_for_the_device(
    shape: Shape, path: Any, request: pytest.FixtureRequest
) -> None:
    logits, target = draw(shape, torch.float32)
    request.getfixturevalue("no_waiting")
    for options in OPTIONS.values():
        path(logits, target, **options)


@pytest.mark.parametrize("classes", [1000, 33000])  # in one pass, in two sweeps
def test_beyond_two_to_the_31_elements(classes: int) -> None:
    rows = 2**31 // classes + 64
    needed = 2 * 3 * rows * classes * 2  # logits, and two sets of gradients for good measure
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    g = torch.Generator("cuda").manual_seed(0)
    logits = [
        torch.empty((rows, classes), dtype=torch.bfloat16, device="cuda").normal_(generator=g)
        for _ in range(2)
    ]
    target = torch.randint(classes, (rows,), generator=g, device="cuda")
    losses, grads, _ = ours(logits, target, reduction="none")
    leaves = [z.requires_grad_() for z in logits]
    by_row = mutual_loss(leaves, target, reduction="none", backend="triton")
    by_autograd = torch.autograd.grad(by_row.sum(), leaves)
    for part in (slice(0, 8), slice(rows - 8, rows)):
        few = [z.detach()[part] for z in logits]
        right_losses, right_grads, _ = ours(few, target[part], reduction="none")
        torch.testing.assert_close(losses[:, part], right_losses, rtol=0, atol=0)
        for g_engine, g_autograd, right in zip(grads, by_autograd, right_grads, strict=True):
            torch.testing.assert_close(g_engine[part], right, rtol=0, atol=0)
            torch.testing.assert_close(g_autograd[part], right, rtol=1.6e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 8192, 1000), (4, 512, 32768)], ids=str)
def test_memory_is_the_gradients_and_a_little_for_each_row(
    shape: Shape, dtype: torch.dtype
) -> None:
    students, rows, _ = shape
    logits, target = draw(shape, dtype)
    gradients = sum(z.nbytes for z in logits)
    little = 256 * students * rows + 2**20

    def engine() -> object:
        return mutual_loss_and_grad(logits, target, backend="triton")

    def forward() -> object:
        return mutual_loss(logits, target, backend="triton")

    def forward_and_backward() -> object:
        losses = mutual_loss(logits, target, backend="triton")
        return torch.autograd.grad(losses.sum(), logits)

    assert gradients <= counting.device_bytes(engine) <= gradients + little
    assert counting.device_bytes(forward) <= little
    assert gradients <= counting.device_bytes(forward_and_backward) <= gradients + little


def test_one_launch_forward_and_one_backward() -> None:
    logits, target = draw((4, 128, 100), torch.float32)
    engine = counting.kernels(lambda: mutual_loss_and_grad(logits, target, backend="triton"))
    if engine is None:
        pytest.skip("the profiler sees no kernels here")
    assert engine == 1
    assert counting.kernels(lambda: mutual_loss(logits, target, backend="triton")) == 1
    losses = mutual_loss(logits, target, backend="triton")
    outer = torch.ones_like(losses)

    def backward() -> object:
        return torch.autograd.grad(losses, logits, outer, retain_graph=True)

    assert counting.kernels(backward) == 1
