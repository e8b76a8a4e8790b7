"""The kernel, rows per program and number of warps for each (L, C, bytes per element).

It is a fixed table, since autotuning would choose another order of summation on another machine.
benchmarks/aot/report.py compiles it for sm_80, sm_90 and sm_100; README.md lists what spills.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import NamedTuple

import triton

logger = logging.getLogger(__name__)

SWITCH = os.environ.get("DML_FAST_TWO_SWEEP", "")
"""For measurements: how two_sweep is launched, as in ``16,hints,batch=32,ctas=8``.

Warps per block of threads, hints to the L2 cache, sums per reduction, and blocks of threads
(a cluster) per row; what is left out is as in the table.
"""


class Config(NamedTuple):
    """How to launch.

    Attributes:
        kernel: "one_pass", "two_sweep" or "gradient".
        rows: rows of the batch per program.
        block: columns held at a time: all of them (one pass), or a tile.
        warps: warps of 32 threads per program, or per block of a cluster.

    And of two sweeps alone:
        hints: whether loads and stores say what the L2 cache is to keep.
        spread: whether a thread's columns are apart, as rows.columns has it.
        batch: sums over the threads in one reduction, a power of two.
        ctas: blocks of threads per program, which are a cluster.
    """

    kernel: str
    rows: int
    block: int
    warps: int
    hints: bool = False
    spread: bool = False
    batch: int = 1
    ctas: int = 1


def choose(
    tiles: int,
    classes: int,
    itemsize: int,
    other: bool,
    *,
    distributions: int,
    width: int,
    in_place: bool,
) -> Config:
    """Return the configuration for rows of C classes.

    Args:
        tiles: how many rows of C numbers a program holds for a row of the batch: one for each of
            the L distributions, and one each for a dense target, peer weights, a temperature
            other than 1 and all statistics.
        classes: C.
        itemsize: bytes of the widest logit.
        other: whether the divergence is another than the paper's.
        distributions: L.
        width: adjacent logits of a row that a thread may read at once, at most 128 bits of them.
        in_place: whether the gradients are written over the logits.
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
    # With 8 warps ptxas stops at 128 registers, and spills from 5 tiles on.
    warps, hints, batch, ctas = 4, False, 8 if distributions <= 5 else 1, 1
    for word in filter(None, SWITCH.split(",")):
        name, _, number = word.partition("=")
        if name == "hints":
            hints = True
        elif name == "batch":
            batch = int(number)
        elif name == "ctas":
            ctas = possible(int(number), in_place, other)
        else:
            warps = int(name)
    each = 4 if width == 1 else width
    columns = 32 * warps * ctas * each
    return Config("two_sweep", 1, columns, warps, hints, width == 1, batch, ctas)


@cache
def possible(ctas: int, in_place: bool = False, other: bool = False) -> int:
    """Return the blocks of threads per row that can be had."""
    why = ""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        why = f"Triton {triton.__version__} compiles no sums over one: it takes 3.9"
    elif in_place:
        why = "gradients over the logits could be written before a label's logit is read"
    elif other:
        why = "the kernels of other divergences than the paper's have none"
    if ctas > 1 and why:
        logger.warning("two sweeps run without a cluster per row: %s", why)
        return 1
    return ctas


def choose_gradient(tiles: int, classes: int) -> Config:
    """Return the configuration of the gradient kernel, for the arguments of `choose`."""
    block = min(1024, max(16, 1 << (classes - 1).bit_length()))  # a tile has 1,024 elements
    warps = 1 if tiles <= 2 else 2 if tiles <= 4 else 4
    return Config("gradient", min(16, 1024 // block), block, warps)
