"""Products of features, tile by tile: torch multiplies, the C++ code counts while they are cached.

A tile is approximate. Its type and the library that multiplied it leave no trace in the result:
see csrc/features.hpp. Each Python thread takes a tile of queries and lets torch use one thread,
since two pools of threads would fight over the cores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dml_fast import _native

Ranker: TypeAlias = "_native.FeaturesF32 | _native.FeaturesF64"

CHUNK = 16  # csrc/ranking.hpp: blocks of queries begin with a whole chunk
# If bfloat16 leaves a larger share of pairs unsure, float32 is faster: such a pair costs about
# 50 ns, a product of 512 features in float32 about 5 ns more than in bfloat16.
MOST_UNSURE = 0.1
PROBE_ITEMS = 2048  # gallery items after which that share is first compared
# For smaller bfloat16 products a library may choose code that rounds sums to bfloat16 as well.
SMALLEST_BF16 = 1 << 18


@dataclass(frozen=True)
class Tiling:
    """Sizes that change speed and memory, but no bit of the result.

    Attributes:
        query_rows: queries of a tile.
        item_rows: gallery items of a tile; 256 x 1024 float32 are 1 MiB, which a core's cache has.
        operand_bytes: size of the rounded copies of the gallery (and of the queries) at a time.
        positives: how many exact scores of matches are kept at a time, 48 bytes each.
        bf16: whether tiles may be bfloat16; None: if the CPU multiplies it fast.
    """

    query_rows: int = 256
    item_rows: int = 1024
    operand_bytes: int = 1 << 25
    positives: int = 1 << 18
    bf16: bool | None = None

    def use_bf16(self) -> bool:
        """Return whether the first tiles are bfloat16."""
        if self.bf16 is not None:
            return self.bf16
        mkldnn: Any = torch.backends.mkldnn
        enabled = mkldnn.is_available() and getattr(mkldnn, "enabled", True)
        return bool(enabled) and _native.has_fast_bf16()


class Screen:
    """Feeds tiles of all pairs to a ranker.

    Args:
        ranker: of Q queries and G items with D features.
        items: G.
        dims: D.
        tiling: sizes.
        threads: how many tiles are counted at the same time.
    """

    def __init__(self, ranker: Ranker, items: int, dims: int, tiling: Tiling, threads: int) -> None:
        self.ranker, self.items, self.dims, self.tiling = ranker, items, dims, tiling
        self.threads = threads
        self.bf16 = tiling.use_bf16()
        self.loose = float32_may_be_rounded()
        self.stop = threading.Event()

    def run(self, begin: int, end: int) -> None:
        """Start the ranker on the queries begin..end-1 and count all their pairs."""
        self.ranker.start(begin, end)
        before = torch.get_num_threads()
        self.stop.clear()
        pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            operands: Tensor | None = None
            for first, last in self._panels():
                if operands is None or (operands.dtype == torch.bfloat16) != self.bf16:
                    operands = self._query_operands(end - begin)
                panel = self._panel_operands(first, last)
                unsure = self._panel(pool, operands, panel, begin, first)
                if unsure > MOST_UNSURE * (end - begin) * (last - first):
                    self.bf16 = False
                del panel  # before the next one takes as much
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)  # the workers' calls changed it for all threads

    def _panels(self) -> Iterator[tuple[int, int]]:
        """Yield consecutive parts of the gallery; their size changes with the type of tiles."""
        first = 0
        while first < self.items:
            rows = max(1, self.tiling.operand_bytes // (self.dims * (2 if self.bf16 else 4)))
            if first == 0 and self.bf16:
                rows = min(rows, PROBE_ITEMS)
            last = min(first + rows, self.items)
            yield first, last
            first = last

    def _panel(
        self, pool: ThreadPoolExecutor, operands: Tensor, panel: Tensor, begin: int, first: int
    ) -> int:
        """Count the products of all started queries with a panel; return how many were unsure."""
        rows = min(self.tiling.query_rows, -(-len(operands) // self.threads))
        tasks = [
            pool.submit(self._tiles, operands[i : i + rows], panel, begin + i, first)
            for i in range(0, len(operands), rows)
        ]
        pending = set(tasks)
        while pending:  # waking up now and then lets Ctrl-C in
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()
        return sum(task.result() for task in tasks)

    def _tiles(self, operands: Tensor, panel: Tensor, query: int, first: int) -> int:
        """Multiply and count one tile of queries with the panel, in a worker."""
        unsure = 0
        rows = self.tiling.item_rows
        whole = torch.empty(len(operands), min(rows, len(panel)), dtype=panel.dtype)
        for i in range(0, len(panel), rows):
            if self.stop.is_set():
                break
            part = panel[i : i + rows]
            out = (
                whole if len(part) == whole.shape[1] else whole.new_empty(len(operands), len(part))
            )
            small = out.numel() * self.dims < SMALLEST_BF16
            if out.dtype == torch.bfloat16 and small:
                out.copy_(torch.mm(operands.float(), part.float().T))
            else:
                torch.mm(operands, part.T, out=out)
            if out.dtype == torch.bfloat16:
                bits = out.view(torch.int16).numpy()
                unsure += self.ranker.count_bf16(bits, query, first + i)
            else:
                unsure += self.ranker.count_f32(out.numpy(), query, first + i)
        return unsure

    def _query_operands(self, rows: int) -> Tensor:
        if self.bf16:
            half = np.empty((rows, self.dims), np.int16)
            self.ranker.query_operands_bf16(half, False)
            return torch.from_numpy(half).view(torch.bfloat16)
        single = np.empty((rows, self.dims), np.float32)
        self.ranker.query_operands_f32(single, self.loose)
        return torch.from_numpy(single)

    def _panel_operands(self, first: int, last: int) -> Tensor:
        if self.bf16:
            half = np.empty((last - first, self.dims), np.int16)
            self.ranker.panel_operands_bf16(first, last, half, False)
            return torch.from_numpy(half).view(torch.bfloat16)
        single = np.empty((last - first, self.dims), np.float32)
        self.ranker.panel_operands_f32(first, last, single, self.loose)
        return torch.from_numpy(single)


def float32_may_be_rounded() -> bool:
    """Return whether the user lets torch multiply float32 in a lower precision."""
    if torch.get_float32_matmul_precision() != "highest":
        return True
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
    return getattr(matmul, "fp32_precision", "none") not in ("none", "ieee")


def query_blocks(
    positives: np.ndarray[tuple[int], np.dtype[np.int64]], dims: int, tiling: Tiling
) -> Iterator[tuple[int, int]]:
    """Yield blocks of whole chunks of queries that keep operands and exact scores in bounds.

    Args:
        positives: (Q,) how many gallery items have each query's identity.
        dims: D.
        tiling: the bounds.
    """
    most_rows = max(CHUNK, tiling.operand_bytes // (4 * dims) // CHUNK * CHUNK)
    queries, begin = len(positives), 0
    while begin < queries:
        totals = np.cumsum(positives[begin : begin + most_rows])
        fitting = int(np.searchsorted(totals, tiling.positives, side="right"))
        end = min(begin + max(CHUNK, fitting // CHUNK * CHUNK), queries)
        if fitting == len(totals):
            end = begin + fitting
        yield begin, end
        begin = end
