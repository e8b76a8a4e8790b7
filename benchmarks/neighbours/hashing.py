"""Binary codes of images: learned with mutual information, and their neighbours. mAP in percent.

    python -m benchmarks.neighbours.hashing                      # what has no line yet
    python -m benchmarks.neighbours.hashing --tasks digits --seeds 0
    python -m benchmarks.neighbours.hashing --table

Test images search the training and validation images; ties count as the mean over their orders.
Cohorts are two ResNet-8 with mutual learning. ITQ and random hyperplanes are fitted to the gallery.
The codes of an ensemble are those of its students, side by side.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from benchmarks.neighbours import harness, mihash_alone
from benchmarks.neighbours.codes import Bits, Coder, itq, random_hyperplanes
from benchmarks.neighbours.harness import Job, Lines, Places
from dml_fast.data import ImageSet, open_dataset
from dml_fast.ranking.codes import rank_hamming
from dml_fast.ranking.features import rank_features

NAME = "neighbours_hashing"
BITS, COHORT = 32, 2
RECIPE = ("--cohort", str(COHORT), "--arch", "resnet8", "--optimizer", "adamw", "--lr", "0.01")
HASH = ("--head", "hash", "--bits", str(BITS))
BASE = "cross-entropy through tanh codes"
HEADS = {
    "MIHash, 16 bins, and cross-entropy": (*HASH, "--mihash-weight", "1", "--mihash-bins", "16"),
    "MIHash, 32 bins, and cross-entropy": (*HASH, "--mihash-weight", "1", "--mihash-bins", "32"),
    BASE: (*HASH, "--mihash-weight", "0"),
}
LINEAR = "linear head"
CODERS: dict[str, Callable[[NDArray[Any], int, int], Coder]] = {
    "ITQ": itq,
    "random hyperplanes": random_hyperplanes,
}
EXACT = "features as floats, cosine"


class Task(NamedTuple):
    """Data, and how long to train on it.

    Attributes:
        data: for ``--data``; ``{folder}`` stands for the job's folder.
        epochs: of batches of 64.
    """

    data: str
    epochs: int


TASKS = {"digits": Task("digits", 30), "fashion": Task("folder:{folder}/images", 8)}
ROWS = (
    *HEADS,
    *(f"{coder} on features" for coder in CODERS),
    *(f"{coder} on pixels" for coder in CODERS),
    EXACT,
)


@dataclass(frozen=True)
class Arguments(Places):
    """Train and rank what has no line yet, then print the tables."""

    tasks: tuple[Literal["digits", "fashion"], ...] = ("digits", "fashion")
    """Which data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order and the random directions."""
    shared: Path = harness.SHARED
    """Folder of fashion8k.tar.xz."""


def jobs(args: Arguments) -> Iterator[Job]:
    """Yield the jobs, seed by seed, so that a killed experiment has whole pairs."""
    for task in args.tasks:
        for seed in args.seeds:
            recipe = (*RECIPE, "--epochs", str(TASKS[task].epochs))
            for head in HEADS:
                flags = (*recipe, *HEADS[head])
                run = partial(hashed, task, args.shared, flags, seed)
                yield Job(f"{task}, {head}", seed, flags, run)
            flags = (*recipe, "--head", "linear")
            run = partial(coded, task, args.shared, flags, seed)
            yield Job(f"{task}, {LINEAR}", seed, flags, run)
            if task == "digits":
                yield from mihash_alone.jobs(seed)


def trained(task: str, shared: Path, flags: Sequence[str], seed: int, folder: Path) -> Path:
    """Write the images, train a cohort, and return its run."""
    write_images(task, shared, folder / "images")
    data = TASKS[task].data.format(folder=folder)
    harness.train(folder / "run", [*flags, "--data", data, "--seed", str(seed)])
    return folder / "run"


def hashed(
    task: str, shared: Path, flags: Sequence[str], seed: int, folder: Path
) -> dict[str, float]:
    """Train codes, and rank by them."""
    run = trained(task, shared, flags, seed, folder)
    result = harness.evaluate(run, "--hamming")
    students = [100 * student["mAP"] for student in result["students"]]
    return {"students": fmean(students), "ensemble": 100 * result["ensemble"]["mAP"]}


def coded(
    task: str, shared: Path, flags: Sequence[str], seed: int, folder: Path
) -> dict[str, object]:
    """Train features; rank by them, by codes of them, and by codes of pixels."""
    run, images = trained(task, shared, flags, seed, folder), folder / "images"
    gallery, queries = read_images(images / "train"), read_images(images / "test")
    labels = (queries.labels, gallery.labels)
    embedded = [
        [features(run, folder, split, k) for split in (queries, gallery)] for k in range(COHORT)
    ]
    exact = [rank_features(*pair, *labels, protocol="all").mAP for pair in embedded]
    together = [np.concatenate([unit(pair[i]) for pair in embedded], axis=1) for i in range(2)]
    rows: dict[str, dict[str, float]] = {
        EXACT: {
            "students": 100 * fmean(exact),
            "ensemble": 100 * rank_features(*together, *labels, protocol="all").mAP,
        }
    }
    for name, coder in CODERS.items():
        codes = [
            [coder(pair[1], BITS, seed + 1000 * k)(x) for x in pair]
            for k, pair in enumerate(embedded)
        ]
        both = [np.concatenate([pair[i] for pair in codes], axis=1) for i in range(2)]
        rows[f"{name} on features"] = {
            "students": fmean(mean_precision(pair, labels) for pair in codes),
            "ensemble": mean_precision(both, labels),
        }
        short, long = (
            [coder(gallery.pixels, bits, seed)(x.pixels) for x in (queries, gallery)]
            for bits in (BITS, COHORT * BITS)
        )
        rows[f"{name} on pixels"] = {
            "students": mean_precision(short, labels),
            "ensemble": mean_precision(long, labels),
        }
    return {"rows": rows}


class Images(NamedTuple):
    """N images of a folder of classes.

    Attributes:
        folder: where they are.
        names: N paths.
        pixels: (N, D) float64, from 0 to 1.
        labels: (N,) int64, the number of the class in the order of names.
    """

    folder: Path
    names: list[str]
    pixels: NDArray[np.float64]
    labels: NDArray[np.int64]


def write_images(task: str, shared: Path, folder: Path) -> None:
    """Write the images as PNG, ``train/CLASS/NAME.png`` and ``test/CLASS/NAME.png``."""
    shutil.rmtree(folder, ignore_errors=True)
    if task == "fashion":
        with tarfile.open(shared / "fashion8k.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        return
    data = open_dataset("digits")
    for split, part in (("train", data.train), ("train", data.val), ("test", data.test)):
        assert isinstance(part, ImageSet)
        rows = zip(part.names, part.images, part.labels, strict=True)
        for name, image, label in rows:
            path = folder / split / str(label) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image)[0]).save(path)


def read_images(folder: Path) -> Images:
    """Read a folder of classes."""
    paths = sorted(folder.glob("*/*.png"))
    classes = sorted({path.parent.name for path in paths})
    pixels = np.stack([np.asarray(Image.open(path), np.float64).ravel() / 255 for path in paths])
    labels = np.array([classes.index(path.parent.name) for path in paths])
    return Images(folder, [str(path) for path in paths], pixels, labels)


def features(run: Path, folder: Path, images: Images, student: int) -> NDArray[np.float64]:
    """Return a student's embeddings (N, D), in the order of the images."""
    found = harness.embed(run, images.folder, folder / "features.npz", student)
    place = {name: index for index, name in enumerate(found["names"].tolist())}
    return found["features"][[place[name] for name in images.names]].astype(np.float64)


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale each row to length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mean_precision(codes: Sequence[Bits], labels: Sequence[NDArray[np.int64]]) -> float:
    """Return the mAP in percent of (queries, gallery)."""
    packed = [np.packbits(bits, axis=1) for bits in codes]
    return 100 * rank_hamming(*packed, *labels, protocol="all", ties="expected").mAP


def tables(lines: Lines) -> str:
    """Return a table for each task, and one of MIHash alone."""
    found, parts = harness.flat(lines), []
    for task in TASKS:
        settings = [f"{task}, {row}" for row in ROWS]
        base = f"{task}, {BASE}"
        parts.append(
            harness.comparison(found, settings, ("students", "ensemble"), lambda _, b=base: b)
        )
    return "\n\n".join([*parts, mihash_alone.table_of(lines)])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    lines = harness.lines_of(jobs(args), NAME, args)
    print(tables(lines))


if __name__ == "__main__":
    main()
