"""Run every Triton kernel with every option once, at small sizes: the driver of compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize

Answers are compared with the closed form, so that what the tool has watched was the real work.
``--part 3/16`` runs one case in sixteen. With it several processes compile at once beforehand, and
a run under the tool finds everything in Triton's cache. Without a GPU it needs TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dml_fast.kernels.availability import unavailable_reason
from dml_fast.loss import mutual_loss, mutual_loss_and_grad
from dml_fast.loss.linear import linear_mutual_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What it is, the tolerance, and its answers by a backend.
Case = tuple[str, float, Callable[[str], list[Any]]]
EXACT, ROUNDED = 1e-5, 1e-2  # fp32, and 16 bits
# (K, N, C): 8 rows, 1 row, 4 and 8 warps a program; two sweeps, aligned and not; several groups of
# 64 programs; more rows than a program counts labels of.
ONE_PASS = [
    (1, 2, 1),
    (4, 600, 10),
    (8, 9, 16),
    (4, 70, 100),
    (2, 3, 127),
    (3, 5, 1001),
    (4, 5, 2048),
]
LONG = [(8, 3, 4096), (3, 66, 4099), (4, 4, 8192), (2, 1030, 12)]


def cases() -> Iterator[Case]:
    """Sizes and launches first, then options and dtypes, in one pass and in two sweeps."""
    for shape in ONE_PASS + LONG:
        yield f"{shape}", EXACT, partial(answers, draw(shape))
    for shape in ((4, 70, 100), (3, 66, 4099)):
        for dtype in (torch.bfloat16, torch.float16):
            yield f"{shape} {dtype}", ROUNDED, partial(answers, draw(shape, dtype))
        for name, arguments in options(shape):
            yield f"{shape} {name}", EXACT, partial(answers, arguments)
        yield f"{shape} linear heads", EXACT, partial(linear_answers, shape)


def options(shape: tuple[int, int, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every option of the loss, several at a time where they do not hide each other."""
    students, rows, classes = shape
    yield (
        "weights, smoothing, temperature",
        draw(shape)
        | {
            "class_weight": torch.rand(classes, device=DEVICE),
            "row_weight": torch.rand(rows, device=DEVICE),
            "label_smoothing": 0.1,
            "temperature": 2.0,
            "kl_weight": torch.tensor(0.5, device=DEVICE),
            "grad_scale": torch.full((students,), 8.0, device=DEVICE),
        },
    )
    soft = torch.rand((rows, classes), device=DEVICE).softmax(-1)
    yield "soft targets by row", draw(shape) | {"target": soft, "reduction": "none"}
    yield "sums", draw(shape) | {"peer_reduction": "sum", "reduction": "sum", "kl_weight": 0.0}
    teachers = [torch.randn((rows, classes), device=DEVICE)]
    weight = torch.rand((students, students + 1), device=DEVICE)
    yield "teachers", draw(shape) | {"teacher_logits": teachers, "grad_scale": 4.0}
    yield "peer weights", draw(shape) | {"teacher_logits": teachers, "peer_weight": weight}
    strided = torch.randn((classes, students, rows), device=DEVICE).permute(1, 2, 0)
    yield "columns far apart", draw(shape) | {"logits": list(strided)}
    yield "one stack", draw(shape) | {"logits": torch.randn(shape, device=DEVICE)}
    bad = draw(shape)
    bad["logits"][0][1] = math.nan
    bad["logits"][1][2] = -math.inf
    bad["logits"][2][:, : classes // 2] = -math.inf
    yield "bad rows and masked classes", bad
    unlabelled = draw(shape)
    unlabelled["target"][:] = -100
    yield "no labels", unlabelled


def draw(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Logits, and a target that lacks a label in one row of three."""
    students, rows, classes = shape
    logits = [torch.randn((rows, classes), device=DEVICE).to(dtype) for _ in range(students)]
    target = torch.randint(classes, (rows,), device=DEVICE)
    target[1::3] = -100
    return {"logits": logits, "target": target}


def answers(arguments: dict[str, Any], backend: str) -> list[Any]:
    """Losses and gradients by the engine's path and by autograd, and all statistics."""
    losses, grads, stats = mutual_loss_and_grad(**arguments, backend=backend, return_stats=True)
    few = {name: value for name, value in arguments.items() if name != "grad_scale"}
    given = arguments["logits"]
    leaves = [
        z.detach().requires_grad_() for z in ([given] if isinstance(given, Tensor) else given)
    ]
    few["logits"] = leaves[0] if isinstance(given, Tensor) else leaves
    by_autograd = mutual_loss(**few, backend=backend)
    assert isinstance(by_autograd, Tensor)
    by_autograd.sum().backward()
    return [losses, *grads, *stats, by_autograd, *(leaf.grad for leaf in leaves)]


def linear_answers(shape: tuple[int, int, int], backend: str) -> list[Any]:
    """Losses and gradients of linear heads, whose rows come in chunks of 16, means of the whole."""
    students, rows, classes = shape
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE).requires_grad_()

    hidden = [leaf(rows, 8) for _ in range(students)]
    weight = [leaf(classes, 8) for _ in range(students)]
    target = torch.arange(rows, device=DEVICE) % classes
    target[1::3] = -100
    losses = linear_mutual_loss(hidden, weight, target, backend=backend, chunk_rows=16)
    assert isinstance(losses, Tensor)
    losses.sum().backward()
    return [losses, *(z.grad for z in (*hidden, *weight) if z.grad is not None)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="which of how many parts")
    part, parts = map(int, parser.parse_args(argv).part.split("/"))
    if reason := unavailable_reason(DEVICE):
        print(f"sanitize.py: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    wrong = count = 0
    for number, (name, tolerance, solve) in enumerate(cases()):
        if number % parts != part:
            continue
        count += 1
        found, right = solve("triton"), solve("closed_form")
        try:
            torch.testing.assert_close(
                found, right, rtol=100 * tolerance, atol=tolerance, equal_nan=True
            )
        except AssertionError as error:
            wrong += 1
            print(f"WRONG {name}: {error}")
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases on {DEVICE}, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
