"""What the experiments compare with: codes that are not learned, and mutual information."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from benchmarks.neighbours import codes, harness, landsat
from benchmarks.neighbours.codes import Coder
from dml_fast.errors import UserError

SCENE = harness.SHARED / "landsat7_olinda.npz"


def test_itq_turns_towards_the_signs() -> None:
    rows = np.random.default_rng(0).standard_normal((300, 6)) @ np.diag([3, 2, 2, 1, 1, 0.5])
    errors = []
    for iterations in (0, 1, 2, 5, 20, 50):
        turn = codes.rotation(rows, 3, iterations)
        np.testing.assert_allclose(turn.T @ turn, np.eye(6), atol=1e-12)
        errors.append(codes.quantisation_error(rows, turn))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("make", [codes.itq, codes.random_hyperplanes])
def test_codes_of_far_clusters_differ_and_are_the_same_again(make: type[Coder]) -> None:
    random = np.random.default_rng(1)
    centres = 10 * random.standard_normal((4, 12))
    label = np.arange(80) % 4
    rows = centres[label] + 0.1 * random.standard_normal((80, 12)) + 100  # far from the origin
    bits = make(rows, 8, 5)(rows)
    assert bits.shape == (80, 8)
    assert (bits == make(rows, 8, 5)(rows)).all()
    distance = (bits[:, None] != bits[None]).sum(2)
    same = label[:, None] == label[None]
    assert distance[same].mean() < 0.5 < 2 < distance[~same].mean()


def test_itq_needs_a_dimension_for_each_bit() -> None:
    with pytest.raises(UserError, match="ITQ of 8 bits needs as many dimensions, not 3"):
        codes.itq(np.zeros((5, 3)), 8, 0)


def test_mutual_information_is_that_of_the_joint_histogram() -> None:
    random = np.random.default_rng(2)
    a = random.random((5, 7)).astype(np.float32)
    b = random.random((7, 9)).astype(np.float32)  # 1 pixel each way
    found = landsat.information(a, b, 4)
    assert found.shape == (3, 3)
    ours, theirs = landsat.binned(a, 4), landsat.binned(b, 4)
    assert (ours.min(), ours.max()) == (theirs.min(), theirs.max()) == (0, 3)
    for r in range(3):
        for c in range(3):
            there = theirs[r : r + 5, c : c + 7].ravel()
            expected = mutual_info_score(ours.ravel(), there) / np.log(2)
            assert found[r, c] == pytest.approx(expected, abs=1e-12)


def test_mutual_information_finds_an_inverted_image() -> None:
    b = np.random.default_rng(3).random((40, 40)).astype(np.float32)
    a = 3 - 2 * b[8 + 5 : 32 + 5, 8 - 3 : 32 - 3]
    assert landsat.optimum(landsat.information(a, b, 8)).tolist() == [5, -3]
    assert landsat.optimum(np.zeros((5, 5))).tolist() == [0, 0]
    assert landsat.optimum(np.eye(5)[::-1]).tolist() == [0, 0]
    flat = np.ones((5, 5))
    flat[2, 2] = 0
    assert landsat.optimum(flat).tolist() == [-1, 0]


def test_rough_pairs_are_off_by_their_error() -> None:
    rows, columns = np.mgrid[:352, :349].astype(np.float32)
    pairs = landsat.rough_pairs(rows, columns, 4, count=50)
    middle = slice(landsat.MARGIN, landsat.MARGIN + landsat.SIDE)
    assert pairs.a.shape == (50, 36, 36)
    assert pairs.b.shape == (50, 76, 76)
    assert pairs.a.max() < landsat.LEARN
    assert set(pairs.error[:, 0]) == {2, 3, 4}
    assert set(pairs.error[:, 1]) == {1, 2, 3}
    again = landsat.rough_pairs(rows, rows, 4, count=50)
    # a pixel u of a is at u + m + error in b: there b holds what a does
    shifted = again.b[:, middle, middle] + pairs.error[:, 0, None, None]
    np.testing.assert_array_equal(shifted, again.a)
    windows = landsat.windows(rows, rows, 4, count=50)
    assert windows.a.min() >= landsat.LEARN
    np.testing.assert_array_equal(windows.b[:, 8:-8, 8:-8], windows.a)
    with pytest.raises(ValueError, match="does not lie in the scene"):
        landsat.cut(rows, np.array([[-1, 0]]), 4)


@pytest.mark.skipif(not SCENE.exists(), reason=f"{SCENE} is not there")
def test_mutual_information_finds_windows_of_two_bands() -> None:
    windows = landsat.windows(*landsat.read_bands(SCENE, 1, 4), 0, count=20)
    found = [
        landsat.optimum(landsat.information(a, b, 12))
        for a, b in zip(windows.a, windows.b, strict=True)
    ]
    near = np.linalg.norm(np.array(found), axis=1) <= 1.5
    assert near.mean() > 0.6


def test_rows_of_a_job_are_lines_of_their_own() -> None:
    lines = {
        ("digits, x", 0): {"students": 1.0},
        ("digits, many", 0): {"rows": {"a": {"students": 2.0}, "b": {"students": 3.0}}},
    }
    found = harness.flat(lines)
    assert {key: line["students"] for key, line in found.items()} == {
        ("digits, x", 0): 1.0,
        ("digits, a", 0): 2.0,
        ("digits, b", 0): 3.0,
    }
