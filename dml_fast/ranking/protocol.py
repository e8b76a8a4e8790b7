"""The rules of an evaluation, checked in one place for all ways of ranking."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

import numpy as np

from dml_fast.errors import UserError, brief, check_choice, check_whole
from dml_fast.machine import available_bytes

TIES = ("stable", "expected", "optimistic", "pessimistic")  # csrc/scores.hpp: enum Ties
PROTOCOLS = ("market1501", "cuhk03", "all")
_LITTLE = 1 << 26  # bytes that are not worth asking how much is free


class UsualJunk(int):
    """A ``junk_pid`` that the caller did not choose: a warning counts what it leaves out."""


USUAL_JUNK = UsualJunk(-1)
JunkPid: TypeAlias = int | str | bytes | None


@dataclass(frozen=True)
class SingleShot:
    """CUHK03's single-gallery-shot CMC from random draws, as other libraries compute it.

    ``protocol="cuhk03"`` is the mean over all draws, computed exactly, and has no noise.

    Attributes:
        repeats: how often one gallery image of each identity is drawn for each query.
        seed: of the draws, 0 to 2^64 - 1; they depend on nothing else.
    """

    repeats: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Rules:
    """Arguments common to all ways of ranking, as the C++ code takes them.

    Attributes:
        max_rank: length of the curves.
        protocol: its name.
        ties: the tie rule's name.
        junk_pid: identity of gallery items to drop, or None.
        camera_rule: whether items with the identity and the camera of the query are left out.
        count_invalid: whether queries without a valid match score 0.
        topk: how many nearest items to report.
        repeats: draws of the single-gallery-shot CMC, 0 for the exact mean, -1 for the plain CMC.
        seed: of the draws.
    """

    max_rank: int
    protocol: str
    ties: str
    junk_pid: JunkPid
    camera_rule: bool
    count_invalid: bool
    topk: int
    repeats: int
    seed: int

    def curve_length(self, items: int) -> int:
        """Return how many ranks of G = ``items`` are counted; beyond them curves are constant."""
        return min(self.max_rank, max(items, 1))

    def check_memory(self, queries: int, items: int) -> None:
        """Refuse results that do not fit in memory.

        Raises:
            UserError: ``max_rank`` or ``topk`` is too large for Q = ``queries``, G = ``items``.
        """
        chunks = -(-queries // 16)  # the C++ code counts for 16 queries at a time
        curves = 6 * self.max_rank + 4 * chunks * self.curve_length(items)
        needed = 8 * (curves + 3 * queries * self.topk)
        if needed > _LITTLE and needed > (free := available_bytes()):
            raise UserError(
                f"max_rank is {self.max_rank} and topk {self.topk}: the result would take "
                f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: give less"
            )

    @property
    def ties_number(self) -> int:
        """The tie rule's number in the C++ enumeration."""
        return TIES.index(self.ties)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def make_rules(
    *,
    max_rank: int,
    protocol: str | SingleShot,
    ties: str,
    junk_pid: JunkPid,
    camera_rule: bool,
    count_invalid: bool,
    topk: int,
) -> Rules:
    """Check the arguments and return them as rules.

    Raises:
        UserError: one of them is out of range or unknown.
    """
    for name, number, least in (("max_rank", max_rank, 1), ("topk", topk, 0)):
        check_whole(name, number, least)
    check_choice("ties", ties, TIES)
    for name, value in (("camera_rule", camera_rule), ("count_invalid", count_invalid)):
        if not isinstance(value, bool | np.bool_ | int):
            raise UserError(f"{name} is {brief(value)}: give True or False")
    repeats, seed = -1, 0
    if isinstance(protocol, SingleShot):
        n, start = protocol.repeats, protocol.seed
        if not (_whole(n) and _whole(start) and 1 <= n < 2**63 and 0 <= start < 2**64):
            raise UserError(
                f"SingleShot(repeats={brief(n)}, seed={brief(start)}) is impossible: give whole "
                "numbers, 1 <= repeats < 2**63 and 0 <= seed < 2**64"
            )
        name, repeats, seed = "cuhk03", protocol.repeats, protocol.seed
    else:
        check_choice("protocol", protocol, PROTOCOLS)
        name = protocol
        repeats = 0 if protocol == "cuhk03" else -1
    cameras = bool(camera_rule) and name != "all"
    return Rules(
        int(max_rank), name, ties, junk_pid, cameras, bool(count_invalid), int(topk), repeats, seed
    )
