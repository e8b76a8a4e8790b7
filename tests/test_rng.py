"""Seeds that are derived from numbers and names."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mutations import mutated_json, outcome

from dml_fast import rng
from dml_fast.errors import UserError
from dml_fast.foreign import reading
from dml_fast.rng import derive_seed, numpy_generator


def test_derived_seeds_are_fixed_and_tell_their_parts_apart() -> None:
    parts = [(), (0,), (1,), (1, 0), (0, 1), (2**32,), (-1,), ("1",), ("a", 1), (10,), (1, 0, 0)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) == 7777801250388762567  # a change would break every saved run
    assert derive_seed(np.int64(1), np.int32(2)) == derive_seed(1, 2)
    draws = numpy_generator(1, "x").random(4)
    np.testing.assert_array_equal(draws, numpy_generator(1, "x").random(4))
    assert (draws != numpy_generator(1, "y").random(4)).all()


@pytest.fixture
def saved() -> Iterator[dict[str, Any]]:
    state = rng.state()
    yield state
    rng.set_state(state)


@pytest.mark.parametrize("key", ["python", "numpy_rest"])
def test_a_damaged_state_is_refused_or_draws(saved: dict[str, Any], key: str) -> None:
    def restore(text: str) -> bool:
        with reading("last.pt"):
            rng.set_state(saved | {key: text})
        return bool(0 <= random.random() < 1 and 0 <= np.random.random() < 1)

    texts = [json.dumps(value) for value in mutated_json(json.loads(saved[key]), 200)]
    found = [outcome(lambda text=text: restore(text)) for text in texts]
    assert None in found and True in found


@pytest.mark.parametrize(
    "change",
    [
        {"numpy": torch.zeros(623, dtype=torch.int64)},
        {"numpy": -torch.ones(624, dtype=torch.int64)},
        {"numpy_rest": json.dumps(["MT19937", 10**6, 0, 0.0])},  # beyond the end of the keys
        {"numpy_rest": json.dumps(["MT19937", -1, 0, 0.0])},
        {"torch": torch.zeros(5056, dtype=torch.uint8)},
        {"torch": torch.zeros(5, dtype=torch.uint8)},
    ],
)
def test_a_state_that_would_read_elsewhere_is_refused(
    saved: dict[str, Any], change: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"last\.pt is damaged"), reading("last.pt"):
        rng.set_state(saved | change)
