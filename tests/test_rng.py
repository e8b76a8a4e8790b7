"""Seeds that are derived from numbers and names."""

from __future__ import annotations

import numpy as np

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
