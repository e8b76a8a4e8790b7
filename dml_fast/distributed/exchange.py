"""What students exchange: their detached logits, by one all-gather a step."""

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


# torch 2.13 has renamed it, and warns of the old name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Exchange:
    """Gives every rank of a column the logits of all students.

    Every rank sends as many places as the largest share has students, so that it is one collective
    of equal parts. Each rank receives (R - 1) * M * N * C elements a call, for R rows, M places,
    N rows of the batch and C classes.

    Args:
        shares: of the rows.
        row: of this rank.
        group: the ranks of this column, in the order of their rows.
    """

    def __init__(self, shares: Shares, row: int, group: ProcessGroup) -> None:
        self._shares, self._row, self._group = shares, row, group
        self._places = max(map(len, shares))
        self._dtypes: dict[int, torch.dtype] = {}
        self.received_bytes = 0
        self.calls = 0

    def __call__(self, mine: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Exchange.

        Args:
            mine: (N, C) of each of this row's students, by number, all of them.

        Returns:
            (N, C) of every student; of its own type, bit for bit, on the device of ``mine``.
        """
        first = next(iter(mine.values()))
        if not self._dtypes:
            self._learn_types(mine)
        wire = reduce(torch.promote_types, self._dtypes.values())  # which holds all exactly
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

    def _learn_types(self, mine: Mapping[int, Tensor]) -> None:
        """Once: a network of the user's may give fp32 where the others give bf16."""
        everyone: list[dict[int, torch.dtype]] = [{} for _ in self._shares]
        dist.all_gather_object(everyone, {k: z.dtype for k, z in mine.items()}, group=self._group)
        for types in everyone:
            self._dtypes |= types
