"""Are several drawings of a character found better, and how are they best put together?

    python -m benchmarks.neighbours.sets                  # what has no line yet
    python -m benchmarks.neighbours.sets --seeds 0 1
    python -m benchmarks.neighbours.sets --table

Two ResNet-8 learn to tell 122 characters of Omniglot apart, in the layout of Market-1501. In each
of five draws, five drawings of each of 89 other characters are the gallery, one set a character,
and the drawings that are left are searched for, alone and in sets of three. Rank-1 in percent,
without the camera rule; a seed's figure is the mean over both students and all draws.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.neighbours import harness
from benchmarks.neighbours.harness import Job, Lines, Places
from dml_fast.comparison.statistics import paired
from dml_fast.eval import rank_sets
from dml_fast.ranking.sets import information_distances
from dml_fast.reporting.markdown import table

NAME = "neighbours_sets"
GALLERY, TOGETHER, DRAWS, STUDENTS = 5, 3, 5, 2
TEMPERATURES = (0.05, 0.1, 0.2)
RECIPE = (
    *("--data", "market1501:{tree}", "--cohort", str(STUDENTS), "--arch", "resnet8"),
    *("--image-size", "32", "--epochs", "20"),
)
SETTINGS = {"flips and shifts": (), "neither": ("--no-augment",)}
SOFT = ("log_sum_exp", "mutual_information")
RULES = {
    "nearest": ("min", 0.1),
    "mean": ("mean", 0.1),
    **{f"{rule} {t}": (rule, t) for rule in SOFT for t in TEMPERATURES},
    "centroid": ("centroid", 0.1),
}
QUERIES = {1: "one drawing", TOGETHER: f"a set of {TOGETHER}"}
# what was asked for before anything was measured by these commands
ASKED = {
    ("3: mutual_information 0.05", "3: log_sum_exp 0.05"): 1.5,
    ("3: mutual_information 0.05", "3: nearest"): 5.0,
    ("3: centroid", "3: nearest"): 8.0,
    ("1: centroid", "1: 1 shot"): 7.0,
}


@dataclass(frozen=True)
class Arguments(Places):
    """Train every cohort that has no line yet, then print the tables."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order and the draws."""
    shared: Path = harness.SHARED.parents[1]
    """Folder with tools/omniglot_as_market1501.py and data/."""


class Draw(NamedTuple):
    """Indices of drawings; C characters.

    Attributes:
        gallery: (C, 5).
        alone: (N,) all others.
        together: (S, 3) of them, each row of one character.
    """

    gallery: NDArray[np.int64]
    alone: NDArray[np.int64]
    together: NDArray[np.int64]


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the runs, seed by seed."""
    for seed in args.seeds:
        for setting, choice in SETTINGS.items():
            flags = (*RECIPE, *choice)
            yield Job(setting, seed, flags, partial(measure, args.shared, flags, seed))


def measure(shared: Path, flags: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Train, embed the characters that were not learned, and search for them."""
    tree, run = folder / "tree", folder / "run"
    tool = shared / "tools" / "omniglot_as_market1501.py"
    subprocess.run([sys.executable, tool, tree], check=True, stdout=subprocess.DEVNULL)
    harness.train(run, [*(flag.format(tree=tree) for flag in flags), "--seed", str(seed)])
    found = []
    for student in range(STUDENTS):
        parts = [
            harness.embed(run, tree / part, folder / "features.npz", student)
            for part in ("query", "bounding_box_test")
        ]
        features, pids = (np.concatenate([p[key] for p in parts]) for key in ("features", "pids"))
        known = pids > 0  # no distractors, no junk
        found += scores(features[known], pids[known], seed)
    return {name: fmean(one[name] for one in found) for name in found[0]}


def draws(pids: NDArray[np.int64], seed: int) -> Iterator[Draw]:
    """Yield the draws of a seed, from the characters of N drawings (N,)."""
    for number in range(DRAWS):
        rng = np.random.default_rng([seed, number])
        mixed = [rng.permutation(np.flatnonzero(pids == pid)) for pid in np.unique(pids)]
        rest = [part[GALLERY:] for part in mixed]
        sets = [part[: len(part) // TOGETHER * TOGETHER].reshape(-1, TOGETHER) for part in rest]
        yield Draw(
            np.stack([part[:GALLERY] for part in mixed]),
            np.concatenate(rest),
            np.concatenate(sets),
        )


def scores(
    features: NDArray[np.float32], pids: NDArray[np.int64], seed: int
) -> Iterator[dict[str, float]]:
    """Yield the figures of each draw: rank-1, and how well strangers are told, in percent."""
    for draw in draws(pids, seed):

        def rank1(
            query: NDArray[np.int64],
            gallery: NDArray[np.int64],
            reduction: str,
            temperature: float = 0.1,
        ) -> float:
            ranking = rank_sets(
                features[query.reshape(-1)],
                features[gallery.reshape(-1)],
                pids[query.reshape(-1)],
                pids[gallery.reshape(-1)],
                q_sets=np.repeat(np.arange(len(query)), query[0].size),
                g_sets=np.repeat(np.arange(len(gallery)), gallery[0].size),
                reduction=reduction,
                temperature=temperature,
                protocol="all",
            )
            return 100 * float(ranking.cmc[0])

        found = {"1: 1 shot": rank1(draw.alone, draw.gallery[:, 0], "min")}
        for count, query in ((1, draw.alone), (TOGETHER, draw.together)):
            for name, rule in RULES.items():
                found[f"{count}: {name}"] = rank1(query, draw.gallery, *rule)
        yield found | strangers(features, pids, draw)


def strangers(
    features: NDArray[np.float32], pids: NDArray[np.int64], draw: Draw
) -> dict[str, float]:
    """Return how well two scores tell whether a query's character is in the gallery (AUROC).

    The gallery has every other character. The scores are that of the nearest drawing, and the
    largest pointwise mutual information of a set.
    """
    from sklearn.metrics import roc_auc_score

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    gallery, t, found = draw.gallery[::2], TEMPERATURES[0], {}
    for count, query in ((1, draw.alone[:, None]), (TOGETHER, draw.together)):
        inside = np.isin(pids[query[:, 0]], pids[gallery[:, 0]])
        distances = 1 - unit[query].astype(np.float64) @ unit[gallery.reshape(-1)].T
        images = distances.reshape(*query.shape, *gallery.shape)  # (S, count, sets, 5)
        rows = -t * np.log(np.exp(-images / t).mean(axis=3))
        by_score = {
            "nearest": -images.min(axis=(1, 2, 3)),
            SOFT[1]: [-information_distances(row, t).min() for row in rows],
        }
        for name, score in by_score.items():
            found[f"{count}: strangers by {name}"] = 100 * float(roc_auc_score(inside, score))
    return found


def cells(lines: Mapping[int, Any], name: str) -> str:
    """Return a figure's mean and error over the seeds; "-" where it was not measured."""
    return harness.mean_and_error(lines[s][name] for s in lines if name in lines[s]) or "-"


def of_setting(lines: Lines, setting: str) -> dict[int, Any]:
    """Return the lines of a setting by seed."""
    return {seed: line for (name, seed), line in lines.items() if name == setting}


def tables(lines: Lines) -> str:
    """Return the figures, and the differences that were asked for."""
    columns = ["1 shot", "nearest", "mean", *(f"{rule} 0.05" for rule in SOFT), "centroid"]
    rows, warm, strange, asked = [], [], [], []
    for setting in SETTINGS:
        mine = of_setting(lines, setting)
        if not mine:
            continue
        for count, query in QUERIES.items():
            names = [f"{count}: {column}" for column in columns]
            rows.append([setting, query, *(cells(mine, name) for name in names)])
            rest = [f"{count}: {rule} {t}" for rule in SOFT for t in TEMPERATURES]
            warm.append([setting, query, *(cells(mine, name) for name in rest)])
            both = [f"{count}: strangers by {name}" for name in ("nearest", SOFT[1])]
            strange.append([setting, query, *(cells(mine, name) for name in both)])
        for (ours, theirs), least in ASKED.items():
            difference = paired([line[ours] - line[theirs] for line in mine.values()])
            reached = "reached" if difference.mean >= least else "not reached"
            count, words = ours.split(": ")[0], [name.split(": ")[1] for name in (ours, theirs)]
            row = [setting, QUERIES[int(count)], " - ".join(words)]
            asked.append([*row, str(difference), f"{least:+}", reached])
    if not rows:
        return "Not measured yet."
    temperatures = [f"{rule} {t}" for rule in SOFT for t in TEMPERATURES]
    return "\n\n".join(
        [
            table(["augmented by", "query", *columns], rows),
            "Other temperatures:",
            table(["augmented by", "query", *temperatures], warm),
            "Differences, paired by seed (seeds above 0), and what was asked for beforehand:",
            table(["augmented by", "query", "difference", "measured", "asked", ""], asked),
            "AUROC in percent for whether the query's character is in the gallery at all:",
            table(["augmented by", "query", "nearest drawing", "largest information"], strange),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines))


if __name__ == "__main__":
    main()
