"""The kernel, rows per program and number of warps for each (L, C, bytes per element).

It is a fixed table, since autotuning would choose another order of summation on another machine.
benchmarks/aot/report.py compiles it for sm_80, sm_90 and sm_100; README.md lists what spills.
"""

from __future__ import annotations

import os
from typing import NamedTuple

SWITCH = os.environ.get("DML_FAST_TWO_SWEEP", "")
"""For measurements: warps of two_sweep, and whether it gives hints, as in ``16,hints``."""


class Config(NamedTuple):
    """How to launch.

    Attributes:
        kernel: "one_pass", "two_sweep" or "gradient".
        rows: rows of the batch per program.
        block: columns held at a time: all of them (one pass), or a tile.
        warps: warps of 32 threads per program.
        hints: whether loads and stores say what the L2 cache is to keep (two sweeps).
    """

    kernel: str
    rows: int
    block: int
    warps: int
    hints: bool = False


def choose(tiles: int, classes: int, itemsize: int, other: bool = False) -> Config:
    """Return the configuration for rows of C classes.

    Args:
        tiles: how many rows of C numbers a program holds for a row of the batch: one for each of
            the L distributions, and one each for a dense target, peer weights, a temperature
            other than 1 and all statistics.
        classes: C.
        itemsize: bytes of the widest logit.
        other: whether the divergence is another than the paper's.
    """
    block = max(16, 1 << (classes - 1).bit_length())
    if block <= 16:
        return Config("one_pass", 4, block, 1)
    # A thread holds (its elements) x (tiles + 1) numbers. The more elements per thread, the fewer
    # threads repeat the reductions.
    # At 48, ptxas stops at 128 registers for two rows, and spills; "jsd" spills at 96 and one warp.
    held = 96 if tiles <= 2 and not other else 80
    warps = 1
    while warps < 8 and block * (tiles + 1) > held * 32 * warps:
        warps *= 2
    if block * (tiles + 1) <= 96 * 32 * warps:
        return Config("one_pass", 1, block, warps)
    # 128 bits per thread. With 8 warps ptxas stops at 128 registers, and spills from 5 tiles on.
    asked, _, hints = SWITCH.partition(",")
    warps = int(asked or 4)
    return Config("two_sweep", 1, 32 * warps * (16 // itemsize), warps, hints == "hints")


def choose_gradient(tiles: int, classes: int) -> Config:
    """Return the configuration of the gradient kernel, for the arguments of `choose`."""
    block = min(1024, max(16, 1 << (classes - 1).bit_length()))  # a tile has 1,024 elements
    warps = 1 if tiles <= 2 else 2 if tiles <= 4 else 4
    return Config("gradient", min(16, 1024 // block), block, warps)
