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
        return Config("one_pass", 8, block, 1)
    for limit, warps in ((256, 1), (2048, 4), (4096, 8)):
        if block <= limit:
            return Config("one_pass", 1, block, warps)
    vector = 16 // itemsize
    return Config("two_sweep", 1, 256 * vector, 8)


def choose_gradient(classes: int) -> Config:
    """The configuration of the gradient kernel, a tile of about 1,024 elements."""
    block = max(16, 1 << (classes - 1).bit_length())
    if block >= 1024:
        return Config("gradient", 1, 1024, 4)
    return Config("gradient", min(16, 1024 // block), block, 4)
