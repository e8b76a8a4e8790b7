"""Does mutual learning help? The same cohorts with and without it, paired by seed.

    python -m benchmarks.compare_methods run --task digits --out DIR
    python -m benchmarks.compare_methods run --task cifar10 --data folder:DIR --out DIR
    python -m benchmarks.compare_methods run --task market1501 --data market1501:DIR --out DIR
    python -m benchmarks.compare_methods table --out DIR

Each run is the ordinary command line in its own process; finished runs are not repeated. The table
reads the accuracy (of identities the mAP) on the test set after the last epoch: nothing
is selected on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import tyro

from benchmarks.common.paired import paired

METHODS = {
    "independent": ["--method", "independent"],
    "dml": ["--method", "dml"],
    "dml + warm-up": ["--method", "dml", "--kl-warmup", "{half}"],
}


class Task(NamedTuple):
    """A recipe, and what is compared with it.

    Attributes:
        arch: of every student.
        epochs: of every run.
        options: further flags.
        noises: shares of wrong labels.
        methods: of `METHODS`.
    """

    arch: str
    epochs: int
    options: tuple[str, ...] = ()
    noises: tuple[float, ...] = (0.0, 0.3)
    methods: tuple[str, ...] = tuple(METHODS)


TASKS = {
    # 1,168 x 0.3425 = 400 training images
    "digits400": Task("resnet32", 40, ("--train-fraction", "0.3425")),
    "digits": Task("resnet32", 15),
    # 50,000 x 0.96 x 0.104167 = 5,000 training images, 2,000 to validate
    "cifar10": Task(
        "resnet8", 12, ("--amp", "--val-fraction", "0.04", "--train-fraction", "0.104167")
    ),
    "market1501": Task(
        "resnet8", 20, ("--amp", "--image-size", "32"), (0.0,), ("independent", "dml")
    ),
}


@dataclass(frozen=True)
class Run:
    """Train every cohort of a comparison."""

    task: Literal["digits", "digits400", "cifar10", "market1501"]
    """Which data and recipe."""
    out: Path
    """Folder of the run folders."""
    data: str = "digits"
    """What --data is."""
    seeds: int = 5
    """Seeds 0, 1, ..."""
    cohort: int = 2
    """Students."""
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes at a time, of one thread each."""


@dataclass(frozen=True)
class Table:
    """Evaluate the finished runs on the test set and print the comparison as Markdown."""

    out: Path
    """Folder of the run folders."""
    save: Path | None = None
    """Also write each run's accuracies there, as JSON."""


def commands(args: Run) -> Iterator[tuple[Path, list[str]]]:
    """(run folder, command) of each run, seed by seed."""
    task = TASKS[args.task]
    for seed in range(args.seeds):
        for noise in task.noises:
            for name in task.methods:
                folder = args.out / f"{args.task}-{name.replace(' + ', '-')}-noise{noise}-s{seed}"
                half = str(task.epochs / 2)
                yield (
                    folder,
                    [
                        *(sys.executable, "-m", "dml_fast.train", "--data", args.data),
                        *("--cohort", str(args.cohort), "--arch", task.arch),
                        *("--epochs", str(task.epochs), "--seed", str(seed)),
                        *("--label-noise", str(noise), "--out", str(folder)),
                        *task.options,
                        *(flag.format(half=half) for flag in METHODS[name]),
                    ],
                )


def run(args: Run) -> None:
    """Train what is not yet there, ``jobs`` at a time."""
    todo = [(f, c) for f, c in commands(args) if not (f / "student_0.safetensors").exists()]
    args.out.mkdir(parents=True, exist_ok=True)

    def train(item: tuple[Path, list[str]]) -> None:
        folder, command = item
        if (folder / "last.pt").exists():
            command = [*command[:3], "--resume", str(folder)]
        with open(args.out / f"{folder.name}.log", "a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        print(folder.name, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(train, todo))


def scores(folder: Path) -> dict[str, float]:
    """In percent on the test set, accuracy or mAP: the students' mean and the ensemble."""
    cached = folder / "test.json"
    if not cached.exists():
        command = [sys.executable, "-m", "dml_fast.evaluate", str(folder)]
        output = subprocess.run(
            [*command, "--checkpoint", "last", "--json"], check=True, capture_output=True, text=True
        ).stdout
        cached.write_text(output)
    result = json.loads(cached.read_text())
    if "ensemble" not in result:
        students = [100 * student["accuracy"] for student in result["students"]]
        return {"students": mean(students), "ensemble": 100 * result["ensemble_accuracy"]}
    found = {}
    for key, suffix in (("mAP", ""), ("rank1", "_rank1")):
        found[f"students{suffix}"] = mean(100 * s[key] for s in result["students"])
        found[f"ensemble{suffix}"] = 100 * result["ensemble"][key]
    return found


def table(args: Table) -> None:
    """Print one row per method: accuracy, and difference from independent, paired by seed."""
    runs: dict[tuple[str, float, str], dict[int, dict[str, float]]] = {}
    finished = sorted(path.parent for path in args.out.glob("*/student_0.safetensors"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(scores, finished))
    for folder in finished:
        config = json.loads((folder / "config.json").read_text())["config"]
        name = config["method"] + (" + warm-up" if config["kl_warmup"] else "")
        key = (folder.name.split("-")[0], config["label_noise"], name)
        runs.setdefault(key, {})[config["seed"]] = scores(folder)
    if args.save:
        rows = [
            {"data": data, "label_noise": noise, "method": method, "seed": seed, **score}
            for (data, noise, method), by_seed in sorted(runs.items())
            for seed, score in sorted(by_seed.items())
        ]
        args.save.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["data", "wrong labels", "method", "seeds", "students, %", "ensemble, %"]
    columns += ["students - independent", "ensemble - independent"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    order = list(METHODS)
    for data, noise, method in sorted(runs, key=lambda key: (*key[:2], order.index(key[2]))):
        by_seed = runs[data, noise, method]
        base = runs[data, noise, "independent"]
        seeds = sorted(by_seed.keys() & base.keys())
        what = ("students", "ensemble")
        cells = [f"{mean(by_seed[s][name] for s in seeds):.2f}" for name in what]
        cells += [
            paired([by_seed[s][name] - base[s][name] for s in seeds]).difference for name in what
        ]
        if method == "independent":
            cells[2:] = ["", ""]
        print(f"| {data} | {noise:.0%} | {method} | {len(seeds)} | {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Train the cohorts of a comparison, or print its table."""
    chosen = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=argv)
    run(chosen) if isinstance(chosen, Run) else table(chosen)


if __name__ == "__main__":
    main()
