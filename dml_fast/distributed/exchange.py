"""The exchange of the students' detached logits: one all-gather per step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dml_fast.distributed.mesh import Shares

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# torch 2.13 renamed it, and warns about the old name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Exchange:
    """Gives every rank of a column the logits of all students.

    Every rank sends as many places as the largest share has students, so that one collective of
    equal parts is enough. Each rank receives (R - 1) * M * N * C elements per call, for R rows of
    the mesh, M places, N rows of the batch and C classes.

    Args:
        shares: the students of each row.
        row: the row of this rank.
        group: the ranks of this column, in the order of their rows.

    Attributes:
        received_bytes: by all calls so far.
        calls: number of calls so far.
    """

    def __init__(self, shares: Shares, row: int, group: ProcessGroup) -> None:
        self._shares, self._row, self._group = shares, row, group
        self._places = max(map(len, shares))
        self._dtypes: dict[int, torch.dtype] = {}
        self.received_bytes = 0
        self.calls = 0

    def __call__(self, mine: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Send the logits of this row's students, and return those of all K students.

        Args:
            mine: (N, C) of each student of this row, by number.

        Returns:
            (N, C) of each student by number, in its own dtype, bit for bit, on the same device.
        """
        first = next(iter(mine.values()))
        if not self._dtypes:
            self._share_types(mine)
        wire = reduce(torch.promote_types, self._dtypes.values())  # it represents all exactly
        sent = torch.empty((self._places, *first.shape), dtype=wire, device=first.device)
        for place, k in enumerate(self._shares[self._row]):
            sent[place].copy_(mine[k])
        sent[len(mine) :] = 0
        found = torch.empty(
            (len(self._shares) * self._places, *first.shape), dtype=wire, device=first.device
        )
        _all_gather(found, sent, group=self._group)
        self.received_bytes += (len(self._shares) - 1) * sent.numel() * sent.element_size()
        self.calls += 1
        return {
            k: found[row * self._places + place].to(self._dtypes[k])
            for row, students in enumerate(self._shares)
            for place, k in enumerate(students)
        }

    def _share_types(self, mine: Mapping[int, Tensor]) -> None:
        """Exchange the dtypes, once: a user's network may give fp32 where the others give bf16."""
        found: list[dict[int, torch.dtype]] = [{} for _ in self._shares]
        dist.all_gather_object(found, {k: z.dtype for k, z in mine.items()}, group=self._group)
        for types in found:
            self._dtypes |= types
