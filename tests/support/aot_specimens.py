"""Kernels with known faults, for the test that benchmarks/aot/compiler.py sees each of them.

    python aot_specimens.py ROOT_OF_THE_REPOSITORY

prints a JSON object: specimen -> figures. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton.language as tl


@triton.jit
def copy(x, y, n, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A copy of rows of C, one row a program, 1 load and 1 store of each element."""
    row = tl.program_id(0).to(tl.int64) * C
    column = tl.arange(0, BLOCK)
    inside = column < C
    tl.store(y + row + column, tl.load(x + row + column, mask=inside), mask=inside)


@triton.jit
def hoard(x, y, n, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every value of the row is needed after a sum over all of them: all stay in registers."""
    row = tl.program_id(0).to(tl.int64) * C
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row + column)
    tl.store(y + row + column, values / tl.sum(values))


@triton.jit
def promote(x, y, scale, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiplies by a scale, in fp64 if the scale is one."""
    column = tl.arange(0, BLOCK)
    tl.store(y + column, tl.load(x + column) * scale)


@triton.jit
def sweep(x, y, n, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads the row twice, in two loops, and writes it in the second."""
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x + start + column)
    total = tl.sum(total)
    for start in range(0, n, BLOCK):
        tl.store(y + start + column, tl.load(x + start + column) / total)


@triton.jit
def repair(x, y, count, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two rows, the second read after a sum over the first; something seldom; a count."""
    column = tl.arange(0, BLOCK)
    values = tl.load(x + column)
    total = tl.sum(values)
    more = tl.load(x + C + column) * total
    if tl.sum(more) < 0.0:
        more = tl.sqrt(tl.abs(more) / (1.0 + values * values))
    tl.store(y + column, more)
    if tl.atomic_add(count, 1) == 0:
        tl.store(count, 1)


@triton.jit
def norm(x, y, n, C: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A sum over threads of products, one a thread."""
    values = tl.load(x + tl.arange(0, BLOCK))
    products = tl.fma(values, values, tl.zeros_like(values)) if ROUNDED else values * values
    tl.store(y, tl.sum(products))


POINTERS = {"x": "*fp32", "y": "*fp32"}
ALIGNED = frozenset(POINTERS)
SPECIMENS: dict[str, tuple[Any, dict[str, str], dict[str, int], dict[str, Any]]] = {
    "copy": (copy, {"n": "i32"}, {"C": 512, "BLOCK": 512}, {"aligned": ALIGNED}),
    "copy of unaligned pointers": (copy, {"n": "i32"}, {"C": 512, "BLOCK": 512}, {}),
    "copy of odd rows": (copy, {"n": "i32"}, {"C": 501, "BLOCK": 512}, {"aligned": ALIGNED}),
    "hoard": (hoard, {"n": "i32"}, {"C": 8192, "BLOCK": 8192}, {"aligned": ALIGNED}),
    "hoard in few registers": (
        hoard,
        {"n": "i32"},
        {"C": 8192, "BLOCK": 8192},
        {"aligned": ALIGNED, "maxnreg": 32},
    ),
    "scale in fp32": (promote, {"scale": "fp32"}, {"C": 512, "BLOCK": 512}, {}),
    "scale in fp64": (promote, {"scale": "fp64"}, {"C": 512, "BLOCK": 512}, {}),
    "norm": (norm, {"n": "i32"}, {"C": 0, "BLOCK": 128, "ROUNDED": False}, {}),
    "norm of rounded products": (norm, {"n": "i32"}, {"C": 0, "BLOCK": 128, "ROUNDED": True}, {}),
    "repair if broken": (
        repair,
        {"count": "*i32"},
        {"C": 1024, "BLOCK": 1024},
        {"aligned": ALIGNED},
    ),
    "two sweeps": (sweep, {"n": "i32"}, {"C": 0, "BLOCK": 512}, {"aligned": ALIGNED | {"n"}}),
}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from benchmarks.aot.compiler import compile_for

    figures = {}
    for name, (kernel, types, constexprs, options) in SPECIMENS.items():
        options = {"num_warps": 4, "enable_fp_fusion": True, **options}
        compiled = compile_for(kernel, POINTERS | types, constexprs, 90, **options)
        figures[name] = compiled.figures()
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
