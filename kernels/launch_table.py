"""Which kernel, how many rows a program and how many warps, by (L, C, bytes an element).

A static table, not autotuning: that would pick another order of summation on another machine.
Every row was compiled for sm_80, sm_90 and sm_100 and has no spills (benchmarks/aot.py).
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How to launch.

    Attributes:
        kernel: "one_pass", "two_sweep" or "gradient".
        rows: rows of the batch a program.
        block: columns held at a time: all of them (one pass), or a tile.
        warps: of 32 threads.
    """

    kernel: str
    rows: int
    block: int
    warps: int


def choose(distributions: int, classes: int, itemsize: int, everything: bool = False) -> Config:
    """The configuration for L distributions of C classes; `everything` adds all statistics."""
    block = max(16, 1 << (classes - 1).bit_length())
    if block <= 16:
        return Config("one_pass", 4, block, 1)
    # Elements a thread x (L + 1) are what it holds; more of them share the reductions' cost.
    held = 48 if everything else 80
    warps = 1
    while warps < 16 and block * (distributions + 1) > held * 32 * warps:
        warps *= 2
    if block * (distributions + 1) <= (72 if warps == 16 else held) * 32 * warps:
        return Config("one_pass", 1, block, warps)
    return Config("two_sweep", 1, 256 * (16 // itemsize), 8)


def choose_gradient(distributions: int, classes: int) -> Config:
    """The configuration of the gradient kernel: tiles of 1,024 elements."""
    block = min(1024, max(16, 1 << (classes - 1).bit_length()))
    warps = 1 if distributions <= 2 else 2 if distributions <= 4 else 4
    return Config("gradient", min(16, 1024 // block), block, warps)
