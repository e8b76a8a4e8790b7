"""Which kernel, how many rows a program and how many warps, by (L, C, bytes an element).

A static table, not autotuning: that would pick another order of summation on another machine.
Compiled for sm_80, sm_90 and sm_100 by benchmarks/aot/report.py; README.md lists what spills.
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


def choose(tiles: int, classes: int, itemsize: int) -> Config:
    """The configuration for rows of C classes.

    Args:
        tiles: how many rows' worth of registers a row of the batch takes: the L distributions,
            and one each for a dense target, peer weights, another temperature, all statistics.
        classes: C.
        itemsize: bytes of the widest logit.
    """
    block = max(16, 1 << (classes - 1).bit_length())
    if block <= 16:
        return Config("one_pass", 4, block, 1)
    # Elements a thread x (tiles + 1) are what it holds; more of them share the reductions' cost.
    held = 96 if tiles <= 2 else 80  # at 48, ptxas stops at 128 registers for two rows, and spills
    warps = 1
    while warps < 8 and block * (tiles + 1) > held * 32 * warps:
        warps *= 2
    if block * (tiles + 1) <= 96 * 32 * warps:
        return Config("one_pass", 1, block, warps)
    # 128 bits a thread. On 8 warps ptxas stops at 128 registers and spills from 5 tiles on.
    return Config("two_sweep", 1, 128 * (16 // itemsize), 4)


def choose_gradient(tiles: int, classes: int) -> Config:
    """The configuration of the gradient kernel, whose tiles have 1,024 elements; as in `choose`."""
    block = min(1024, max(16, 1 << (classes - 1).bit_length()))
    warps = 1 if tiles <= 2 else 2 if tiles <= 4 else 4
    return Config("gradient", min(16, 1024 // block), block, warps)
