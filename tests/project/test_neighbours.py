"""The experiments' harness: a killed one goes on, and its statistics are right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from sklearn import datasets

from benchmarks.neighbours import harness, report, selection, sets, vectors
from benchmarks.neighbours.harness import Job


def job(setting: str, seed: int, ran: list[str], value: float = 1.0, *options: str) -> Job:
    def measure(folder: Path) -> Mapping[str, float]:
        assert folder.is_dir()
        ran.append(f"{setting} {seed}")
        return {"score": value}

    return Job(setting, seed, options, measure)


def test_a_rerun_measures_what_is_missing(tmp_path: Path) -> None:
    path, work, ran = tmp_path / "x.jsonl", tmp_path / "work", []
    harness.finish([job("a", 0, ran, 0.5)], path, work)
    half = path.read_bytes()[:-20]
    path.write_bytes(path.read_bytes() + half)  # as a killed process leaves it
    assert len(harness.read(path)) == 1
    harness.finish([job("a", 0, ran), job("a", 1, ran, 0.25)], path, work)
    assert ran == ["a 0", "a 1"]
    assert harness.figures(harness.read(path), "a", "score") == {0: 0.5, 1: 0.25}
    assert path.read_bytes().count(b"\n") == 2
    assert not any(work.iterdir())


def test_a_line_of_other_options_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    harness.finish([job("a", 0, [], 1.0, "--epochs", "1")], path, tmp_path)
    with pytest.raises(ValueError, match=r"a, seed 0, with other options \(--epochs 1\)"):
        harness.finish([job("a", 0, [], 1.0, "--epochs", "2")], path, tmp_path)


def test_a_command_that_is_stopped_leaves_no_line(tmp_path: Path) -> None:
    def stopped(folder: Path) -> Mapping[str, float]:
        harness._printed(lambda arguments: 143, [])
        return {}

    path = tmp_path / "x.jsonl"
    with pytest.raises(SystemExit, match="143"):
        harness.finish([Job("a", 0, (), stopped)], path, tmp_path)
    assert not path.exists()


def test_a_comparison_pairs_by_seed() -> None:
    values = {
        ("dml", 0): 3.0,
        ("dml", 1): 5.0,
        ("dml", 2): 99.0,
        ("base", 1): 2.0,
        ("base", 0): 1.0,
    }
    lines = {
        key: {"setting": key[0], "seed": key[1], "score": value} for key, value in values.items()
    }
    text = harness.comparison(lines, ["base", "dml", "absent"], ["score"], lambda _: "base")
    assert "absent" not in text
    assert "+2.50 ± 0.50 (2/2)" in text  # seed 2 has no partner
    assert harness.comparison({}, ["base"], ["score"], str) == "Not measured yet."


def test_the_page_of_figures_is_what_the_lines_make() -> None:
    assert report.main(["--check"]) == 0


def test_labels_to_a_goal_are_those_of_the_mean_curve() -> None:
    labels = [20, 30, 40]
    random = [(labels, [50.0, 60.0, 70.0]), (labels, [52.0, 64.0, 72.0])]  # ends at 71
    better = [(labels, [50.0, 74.0, 80.0]), (labels, [50.0, 69.0, 82.0])]  # at 30 labels 71.5
    assert selection.labels_to(better, random) == "30"
    assert selection.labels_to(random, random) == "40"
    assert selection.labels_to(random, better) == "never"


def test_draws_of_drawings_are_disjoint_and_of_one_character() -> None:
    pids = np.repeat([7, 3, 9], [20, 19, 12])
    found = [*sets.draws(pids, 0)]
    assert len(found) == 5 and len({draw.gallery.tobytes() for draw in found}) == 5
    for draw in found:
        assert draw.gallery.shape == (3, 5) and draw.together.shape == (5 + 4 + 2, 3)
        for part in (draw.gallery, draw.together):
            assert (pids[part] == pids[part[:, :1]]).all()
        everything = np.concatenate([draw.gallery.reshape(-1), draw.alone])
        assert sorted(everything) == list(range(51))
        assert len(np.unique(draw.together)) == 33 and np.isin(draw.together, draw.alone).all()


def test_strangers_are_told_by_nearness() -> None:
    """Each character is a direction; every other one is in the gallery."""
    pids = np.repeat(np.arange(6), 8)
    noise = np.random.default_rng(0).normal(0, 0.01, (48, 6))
    x = (np.eye(6)[pids] + noise).astype(np.float32)
    found = next(iter(sets.scores(x, pids, 0)))
    assert found["3: centroid"] == found["1: 1 shot"] == found["1: strangers by nearest"] == 100


def test_digits_as_vectors_are_the_digits(tmp_path: Path) -> None:
    vectors.write_digits(tmp_path / "whole.npz")
    vectors.write_digits(tmp_path / "halves.npz", halves=True)
    whole, halves = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "halves.npz")
    pixels, test = datasets.load_digits(), whole["split"] == "test"
    assert (int(test.sum()), len(test)) == (359, 1797)
    assert sorted(map(bytes, np.rint(16 * whole["x"]).astype(np.uint8))) == sorted(
        map(bytes, pixels.data.astype(np.uint8))
    )
    assert np.bincount(whole["y"]).tolist() == np.bincount(pixels.target).tolist()
    rows = whole["x"].reshape(-1, 8, 8)
    assert (halves["x_left"] == rows[:, :, :4].reshape(-1, 32)).all()
    assert (halves["x_right"] == rows[:, :, 4:].reshape(-1, 32)).all()
