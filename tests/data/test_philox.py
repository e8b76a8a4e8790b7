"""Philox against the published vectors and against Triton's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dml_fast.data.philox import Draws, below, philox, uniform

# Random123, tests/kat_vectors: counter, key (lower word first), result
VECTORS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def draw(out, seed, samples, epoch, view, block, N: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, N)
    sample = tl.load(samples + rows)
    zero = sample * 0
    a, b, c, d = tl.philox(seed, sample, epoch + zero, view + zero, block + zero)
    tl.store(out + rows, a)
    tl.store(out + N + rows, b)
    tl.store(out + 2 * N + rows, c)
    tl.store(out + 3 * N + rows, d)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(philox(counter, key[0] | key[1] << 32).tolist()) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**33 + 5, 2**63 - 1])
def test_equal_to_tritons(seed: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples = np.array([0, 1, 2, 77, 50_000, 2**20, 2**31 - 1, 3], np.int32)
    out = torch.zeros(4, len(samples), dtype=torch.int32, device=device)
    draw[(1,)](out, seed, torch.from_numpy(samples).to(device), 9, 3, 5, N=len(samples))
    ours = philox((samples, 9, 3, 5), seed)
    np.testing.assert_array_equal(out.cpu().numpy().view(np.uint32), ours)


def test_arrays_are_broadcast_and_equal_single_draws() -> None:
    samples, views = np.arange(5)[:, None], np.arange(3)
    together = philox((samples, 7, views, 1), 11)
    assert together.shape == (4, 5, 3) and together.dtype == np.uint32
    for sample in range(5):
        for view in range(3):
            one = philox((sample, 7, view, 1), 11)
            np.testing.assert_array_equal(together[:, sample, view], one)


def test_every_part_of_the_key_matters() -> None:
    drawn = [
        Draws(seed, purpose).words(np.arange(3), epoch, count, view=view, first=first)[0]
        for seed, purpose, epoch, view, first, count in [
            (0, "a", 0, 0, 0, 4), (1, "a", 0, 0, 0, 4), (0, "b", 0, 0, 0, 4),
            (0, "a", 1, 0, 0, 4), (0, "a", 0, 1, 0, 4), (0, "a", 0, 0, 1, 4),
        ]
    ]  # fmt: skip
    assert len({words.tobytes() for words in drawn}) == len(drawn)
    draws = Draws(0, "a")
    long = draws.words(np.arange(3), 0, 10)
    assert long.shape == (10, 3)
    np.testing.assert_array_equal(long[4:8], draws.words(np.arange(3), 0, 4, first=1))


def test_permutations_hold_each_number_once_and_differ() -> None:
    draws = Draws(3, "order")
    orders = [draws.permutation(1000, epoch, number) for epoch, number in [(0, 0), (1, 0), (0, 1)]]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], Draws(3, "order").permutation(1000, 0))
    places = np.array([draws.permutation(5, epoch) for epoch in range(4000)])
    counts = np.stack([np.bincount(column, minlength=5) for column in places.T])
    assert np.abs(counts - 800).max() < 130  # five deviations of a binomial


def test_numbers_fill_their_range_evenly() -> None:
    words = Draws(1, "x").words(np.arange(20_000), 0)
    values = uniform(words)
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(values.mean(1) - 0.5).max() < 0.011
    counts = np.bincount(below(words[0], 7), minlength=7)
    assert len(counts) == 7 and np.abs(counts - 20_000 / 7).max() < 250
    edges = np.array([0, 2**32 - 1], np.uint32)
    assert below(edges, 10).tolist() == [0, 9] and uniform(edges)[1] < 1
