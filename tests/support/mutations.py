"""Damaged copies of files, drawn from a seed, and what may come of reading them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from dml_fast.errors import UserError

T = TypeVar("T")

ODD_VALUES = (
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 2**31, 2**63, 10**30, "", "x",
    "\x00", "\udce9", "-1", "NaN", "../..", "[x]", "$x^$", [], [[]], {}, {"": None}, [None] * 3,
)  # fmt: skip


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield copies of a file with bytes flipped, set, cut off, left out, repeated or inserted."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        changed = bytearray(data)
        for _ in range(int(rng.choice([1, 1, 1, 2, 8]))):
            size = len(changed)
            at = int(rng.integers(size)) if size else 0
            end = min(size, at + int(rng.choice([1, 2, 16, 512])))
            match number % 7 if size else 5:
                case 0:
                    changed[at] ^= 1 << int(rng.integers(8))
                case 1:
                    changed[at] = int(rng.choice([0, 0xFF, 0x80, ord("/"), rng.integers(256)]))
                case 2:
                    del changed[at:]
                case 3:
                    del changed[at:end]
                case 4:
                    changed[at:at] = changed[at:end]
                case 5:
                    changed[at:at] = rng.bytes(int(rng.choice([1, 4, 64])))
                case 6:
                    changed[at:end] = bytes(end - at)
        yield bytes(changed)


def mutated_json(value: Any, count: int, seed: int = 0) -> Iterator[Any]:
    """Yield copies of a JSON value in which some values or keys are others, missing or added."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = copy.deepcopy(value)
        for _ in range(int(rng.choice([1, 1, 2]))):
            places = list(_places(changed))
            if not places:
                break
            holder, key = places[int(rng.integers(len(places)))]
            match int(rng.integers(5)):
                case 0:
                    del holder[key]
                case 1 if isinstance(holder, dict):
                    holder[f"{key}x"] = holder.pop(key)
                case 2:
                    holder[key] = [copy.deepcopy(holder[key])]
                case _:
                    holder[key] = copy.deepcopy(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))])
        yield changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items):
            yield value, key
            yield from _places(inner)


def json_texts(value: Any, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield damaged JSON files: half of them with other bytes, half with other values."""
    yield from mutations(json.dumps(value, indent=2).encode(), count // 2, seed)
    for changed in mutated_json(value, count - count // 2, seed):
        yield json.dumps(changed).encode()


def outcome(read: Callable[[], T]) -> T | None:
    """Return what reading returns, or None for a `UserError` of one line; others pass."""
    try:
        return read()
    except UserError as error:
        message = str(error)
        assert message and message.isprintable(), message
        assert len(message) < 1000, message
        return None
