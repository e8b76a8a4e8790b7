"""A measure of two bands of a scene, learned from roughly aligned pairs; errors in pixels.

    python -m benchmarks.neighbours.registration                     # what has no line yet
    python -m benchmarks.neighbours.registration --bands blue --seeds 0
    python -m benchmarks.neighbours.registration --table

Landsat 7 (`landsat.py`): 1,000 pairs of the upper rows, off by (3, 2) ± 1 pixels, teach; 60 windows
of 24 x 24 pixels of the lower rows are searched for within ± 8 pixels. Cohorts of two students, 352
steps of 32 crops. Rounds are one job, since each needs the one before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.neighbours import harness, landsat
from benchmarks.neighbours.harness import Job, Lines, Places, mean_and_error
from benchmarks.neighbours.landsat import Pairs
from dml_fast.eval.classification import evaluating
from dml_fast.eval.of_pairs import StudentsOfPairs
from dml_fast.eval.registration import climb, local_maxima, register
from dml_fast.reporting.markdown import table

NAME = "neighbours_registration"
NEAR = 1.5  # pixels: an optimum that is no farther off has found the place
BINS = (4, 8, 12, 16, 20, 24)
KEEP = (0.5, 0.7, 0.9, 0.95)
RECIPE = (
    *("--cohort", "2", "--arch", "displacement_16", "--search", "8", "--patch", "24"),
    *("--epochs", "11", "--epoch-steps", "32", "--batch-size", "32"),
    *("--optimizer", "adamw", "--lr", "0.003"),
)
ALONE = ("--method", "independent")
DITHER = ("--dither", "2.5")
RAW = "rough pairs, raw"
SYMMETRISED = "symmetrised"
DITHERED = "symmetrised and dithered"
ALIGNED = "truly aligned pairs (bound)"
INFORMATION = "mutual information, {} bins, no training"
NO_FLIPS = ", searched without flips"
SINGLE = {
    RAW: (*ALONE, "--no-symmetrise"),
    SYMMETRISED: ALONE,
    ALIGNED: ALONE,
}
ROUNDS = tuple(f"+ round {i}, {100 * keep:.0f} % kept" for i, keep in enumerate(KEEP, 1))
CHAINS = {"": (*ALONE,), ", dml": ("--method", "dml")}
"""How the students of the rounds learn: independently, or from one another."""

Surface = NDArray[np.floating]


class Bands(NamedTuple):
    """Two bands of the scene, and the seeds of their pairs, windows, weights and order."""

    first: int
    second: int
    seeds: tuple[int, ...]
    chains: tuple[str, ...]


BANDS = {
    "blue": Bands(0, 3, (0, 1, 2), ("", ", dml")),
    "green": Bands(1, 4, (3, 4, 5), ("",)),
}
BandName = Literal["blue", "green"]


@dataclass(frozen=True)
class Arguments(Places):
    """Train and register what has no line yet, then print the tables."""

    bands: tuple[BandName, ...] = ("blue", "green")
    """blue with near infrared; green with short-wave infrared 1, on which nothing was tried."""
    seeds: tuple[int, ...] = ()
    """Of the pairs, the windows, the weights and the order (none: 0 1 2; green: 3 4 5)."""
    shared: Path = harness.SHARED
    """Folder of landsat7_olinda.npz."""


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the jobs, seed by seed."""
    for name in args.bands:
        bands = BANDS[name]
        for seed in args.seeds or bands.seeds:
            scene = partial(landsat.read_bands, args.shared / "landsat7_olinda.npz", *bands[:2])
            yield Job(f"{name}, information", seed, (), partial(informed, scene, seed))
            for setting, choice in SINGLE.items():
                flags = (*RECIPE, *choice)
                run = partial(single, scene, setting, flags, seed)
                yield Job(f"{name}, {setting}", seed, flags, run)
            for chain in bands.chains:
                flags = (*RECIPE, *CHAINS[chain])
                run = partial(rounds, scene, chain, flags, seed)
                yield Job(f"{name}, rounds{chain}", seed, (*flags, *DITHER), run)


Scene = Callable[[], tuple[landsat.Floats, landsat.Floats]]


def informed(scene: Scene, seed: int, folder: Path) -> dict[str, object]:
    """Search the windows by mutual information, for each number of bins."""
    windows = landsat.windows(*scene(), seed)
    rows = {}
    for bins in BINS:
        surfaces = [
            landsat.information(a, b, bins) for a, b in zip(windows.a, windows.b, strict=True)
        ]
        rows[INFORMATION.format(bins)] = figures_of(surfaces, [*map(landsat.optimum, surfaces)])
    return {"rows": rows}


def single(
    scene: Scene, setting: str, flags: Sequence[str], seed: int, folder: Path
) -> dict[str, object]:
    """Train once, and search the windows, also without the flips."""
    bands = scene()
    windows = landsat.windows(*bands, seed)
    write_pairs(folder / "pairs.npz", landsat.rough_pairs(*bands, seed), setting == ALIGNED)
    train(folder, "run", flags, seed)
    rows = {setting: searched(folder / "run", windows)}
    rows[f"{setting}{NO_FLIPS}"] = searched_as_shown(folder / "run", windows)
    return {"rows": rows}


def rounds(
    scene: Scene, chain: str, flags: Sequence[str], seed: int, folder: Path
) -> dict[str, object]:
    """Train with dither; then correct the pairs, keep the best and train anew, four times."""
    bands = scene()
    pairs, windows = landsat.rough_pairs(*bands, seed), landsat.windows(*bands, seed)
    write_pairs(folder / "pairs.npz", pairs, False)
    train(folder, "run-0", (*flags, *DITHER), seed)
    first = {**searched(folder / "run-0", windows), "pairs": right(pairs.error)}
    rows = {f"{DITHERED}{chain}": first}
    for i, (keep, name) in enumerate(zip(KEEP, ROUNDS, strict=True)):
        offsets = folder / f"offsets-{i}.tsv"
        pairs_right = corrected(folder / f"run-{i}", keep, offsets, pairs)
        train(folder, f"run-{i + 1}", (*flags, "--offsets", str(offsets)), seed)
        rows[f"{name}{chain}"] = {
            **searched(folder / f"run-{i + 1}", windows),
            "pairs": pairs_right,
        }
    after = corrected(folder / f"run-{len(KEEP)}", 1.0, folder / "offsets.tsv", pairs)
    rows[f"{ROUNDS[-1]}{chain}"]["all_pairs"] = after
    return {"rows": rows}


def write_pairs(path: Path, pairs: Pairs, aligned: bool) -> None:
    """Write pairs for ``--data pairs:``; ``aligned`` ones with their errors as known offsets."""
    known = {"offset": pairs.error} if aligned else {}
    np.savez(path, a=pairs.a, b=pairs.b, **known)


def train(folder: Path, name: str, flags: Sequence[str], seed: int) -> None:
    """Train a cohort on the folder's pairs."""
    data = ("--data", f"pairs:{folder / 'pairs.npz'}", "--seed", str(seed))
    harness.train(folder / name, [*flags, *data])


def corrected(run: Path, keep: float, out: Path, pairs: Pairs) -> float:
    """Correct the training pairs; return how many percent of those kept are now right."""
    options = ["--training-pairs", "--keep", str(keep), "--out", str(out)]
    harness.register(run, *options, "--checkpoint", "last")
    found = np.loadtxt(out, delimiter="\t", dtype=np.int64, ndmin=2, skiprows=1)
    return right(found[:, 1:] - pairs.error[found[:, 0]])


def right(offsets: NDArray[np.integer]) -> float:
    """Return how many percent of displacements (N, 2) are within 1.5 pixels."""
    return 100 * float((np.linalg.norm(offsets, axis=1) <= NEAR).mean())


def searched(folder: Path, windows: Pairs) -> dict[str, float]:
    """Search the windows by the cohort of a run, as it is after the last epoch."""
    by_checkpoint = {}
    for checkpoint in ("best", "last"):
        models = StudentsOfPairs.load(folder, checkpoint, "cpu").models
        found = [register(models, a, b) for a, b in zip(windows.a, windows.b, strict=True)]
        by_checkpoint[checkpoint] = figures_of([x.logits for x in found], [x.offset for x in found])
    check_command(folder, windows, found[0].offset)
    return {**by_checkpoint["last"], "best_epoch_error": by_checkpoint["best"]["error"]}


def searched_as_shown(folder: Path, windows: Pairs) -> dict[str, float]:
    """Search the windows by the cohort's own logits, without the four flips of `register`."""
    models = StudentsOfPairs.load(folder, "last", "cpu").models
    a, b = (torch.from_numpy(x)[:, None] for x in (windows.a, windows.b))
    with evaluating(models), torch.inference_mode():
        surfaces = torch.stack([model.displacements(a, b) for model in models]).sum(0).numpy()
    return figures_of(surfaces, [landsat.optimum(surface) for surface in surfaces])


def check_command(run: Path, windows: Pairs, offset: NDArray[np.integer]) -> None:
    """Let the command find the first window too."""
    files = run / "a.npy", run / "b.npy"
    for file, image in zip(files, (windows.a[0], windows.b[0]), strict=True):
        np.save(file, image)
    said = json.loads(harness.register(run, *map(str, files), "--checkpoint", "last", "--json"))
    if [said["rows"], said["columns"]] != offset.tolist():
        raise AssertionError(f"the command found {said} and the function {offset}")


def figures_of(
    surfaces: Sequence[Surface], optima: Sequence[NDArray[np.integer]]
) -> dict[str, float]:
    """Return the figures of surfaces over displacements, whose true maximum is in the middle.

    Returns:
        The mean distance of the optimum in pixels, how many percent are within 1.5 pixels, the mean
        optimum (rows, columns), the mean number of local maxima, and from how many percent of all
        starts hill climbing ends within 1.5 pixels.
    """
    search = surfaces[0].shape[0] // 2
    offsets = np.array(optima)
    distance = np.linalg.norm(offsets, axis=1)
    starts = [*np.ndindex(surfaces[0].shape)]
    reached = [
        np.linalg.norm(np.asarray(climb(surface, (r - search, c - search)))) <= NEAR
        for surface in surfaces
        for r, c in starts
    ]
    return {
        "error": float(distance.mean()),
        "within": right(offsets),
        "bias_rows": float(offsets[:, 0].mean()),
        "bias_columns": float(offsets[:, 1].mean()),
        "maxima": fmean(len(local_maxima(surface)) for surface in surfaces),
        "climbed": 100 * float(np.mean(reached)),
    }


def best_bins(lines: Lines, bands: str) -> str:
    """Return the row of the number of bins with the least mean error."""
    names = [INFORMATION.format(bins) for bins in BINS]
    return min(
        names, key=lambda name: fmean(harness.figures(lines, f"{bands}, {name}", "error").values())
    )


def rows_of(lines: Lines, bands: str) -> list[list[str]]:
    """Return the rows of a table: what was measured of two bands."""
    names = [RAW, f"{RAW}{NO_FLIPS}", SYMMETRISED, f"{SYMMETRISED}{NO_FLIPS}"]
    for chain in CHAINS:
        names += [f"{name}{chain}" for name in (DITHERED, *ROUNDS)]
    names.append(ALIGNED)
    if harness.figures(lines, f"{bands}, {INFORMATION.format(8)}", "error"):
        names = [*dict.fromkeys([INFORMATION.format(8), best_bins(lines, bands)]), *names]
    rows = []
    for name in names:
        setting = f"{bands}, {name}"
        errors = harness.figures(lines, setting, "error")
        if not errors:
            continue
        bias = " ".join(f"{x:+.1f}" for x in bias_of(lines, setting))
        within, maxima, climbed = (
            mean_and_error(harness.figures(lines, setting, figure).values())
            for figure in ("within", "maxima", "climbed")
        )
        each = " ".join(f"{errors[seed]:.2f}" for seed in sorted(errors))
        mean = f"{fmean(errors.values()):.2f}"
        pairs = [x["pairs"] for key, x in lines.items() if key[0] == setting and "pairs" in x]
        kept = mean_and_error(pairs)
        rows.append([name, kept, mean, each, within, bias, maxima, climbed])
    return rows


def bias_of(lines: Lines, setting: str) -> list[float]:
    """Return the optimum (rows, columns), the mean of windows and seeds."""
    return [
        fmean(harness.figures(lines, setting, name).values())
        for name in ("bias_rows", "bias_columns")
    ]


def tables(lines: Lines) -> str:
    """Return a table for each two bands, and what was wanted of the first."""
    found = harness.flat(lines)
    parts = []
    header = [
        "trained on",
        "of these right, %",
        "error, px",
        "by seed",
        "within 1.5 px, %",
        "bias, px",
    ]
    for bands in BANDS:
        if rows := rows_of(found, bands):
            text = table([*header, "local maxima", "climbing succeeds, %"], rows)
            parts.append(
                f"{bands.capitalize()} and {landsat.NAMES[BANDS[bands].second]}:\n\n{text}"
            )
    return "\n\n".join([*parts, *wanted(found)]) or "Not measured yet."


def wanted(lines: Lines) -> list[str]:
    """Say of each figure that was asked for before the experiment whether it was reached."""

    def mean(name: str, figure: str) -> float:
        return fmean(harness.figures(lines, f"blue, {name}", figure).values())

    def length(name: str) -> float:
        return float(np.hypot(*bias_of(lines, f"blue, {name}")))

    if not all(
        harness.figures(lines, f"blue, {x}", "error") for x in (RAW, SYMMETRISED, ROUNDS[-1])
    ):
        return []
    fewer = 1 - mean(DITHERED, "maxima") / mean(RAW, "maxima")
    shown = length(f"{RAW}{NO_FLIPS}")
    oftener = mean(DITHERED, "climbed") / mean(RAW, "climbed")
    ratio = mean(ROUNDS[-1], "error") / mean(DITHERED, "error")
    before, after = (mean(*of) for of in ((DITHERED, "pairs"), (ROUNDS[-1], "all_pairs")))
    goals = [
        ("bias of raw, px", length(RAW), ">= 1.5", length(RAW) >= 1.5),
        ("the same, searched without flips", shown, ">= 1.5", shown >= 1.5),
        ("bias of symmetrised, px", length(SYMMETRISED), "<= 0.7", length(SYMMETRISED) <= 0.7),
        ("fewer local maxima of dithered than of raw, %", 100 * fewer, ">= 25", fewer >= 0.25),
        ("climbing succeeds, dithered / raw", oftener, ">= 3", oftener >= 3),
        ("error after four rounds / before", ratio, "<= 0.6", ratio <= 0.6),
        ("training pairs within 1.5 px before, %", before, "0", before == 0),
        ("training pairs within 1.5 px after four rounds, %", after, ">= 85", after >= 85),
    ]
    rows = [[what, f"{x:.2f}", goal, "yes" if met else "no"] for what, x, goal, met in goals]
    return [table(["of the first two bands", "measured", "wanted", "reached"], rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines))


if __name__ == "__main__":
    main()
