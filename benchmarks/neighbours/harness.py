"""What the experiments of this folder share: public commands, one JSON line a run, paired tables.

An experiment is a list of `Job`s. `finish` measures those that have no line yet and appends a line
for each: a killed experiment, started again, goes on. Commands run in this process, so that torch
is imported once. Each job has a folder of its own, deleted when its line is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime, timezone
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.machine import commit, cpu_name
from dml_fast.comparison.statistics import paired
from dml_fast.reporting.markdown import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared" / "data" / "neighbours"

Line = Mapping[str, Any]
Lines = Mapping[tuple[str, int], Line]


class Job(NamedTuple):
    """One run of a setting with a seed.

    Attributes:
        setting: its name, the first part of the key of its line.
        seed: the second part.
        options: the flags that make the setting; a line that was measured with others is refused.
        measure: from the job's folder, which may be there from a killed attempt, to figures.
    """

    setting: str
    seed: int
    options: tuple[str, ...]
    measure: Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Places:
    """Where an experiment keeps its lines and its runs."""

    out: Path = RESULTS
    """Folder of the JSON lines."""
    work: Path = Path(tempfile.gettempdir()) / "dml_fast_neighbours"
    """Folder for runs, each deleted when its line is written."""
    table: bool = False
    """Only print the tables of the lines that are there."""


def finish(jobs: Iterable[Job], path: Path, work: Path) -> None:
    """Measure the jobs that have no line in a file yet, one after the other.

    Args:
        jobs: in the order in which to run them.
        path: the file of JSON lines; it is appended to.
        work: folder in which each job gets a folder.

    Raises:
        ValueError: a line was measured with other options.
    """
    done = read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        if (line := done.get(job[:2])) is not None:
            if line["options"] != [*job.options]:
                raise ValueError(
                    f"{path} has {job.setting}, seed {job.seed}, with other options "
                    f"({' '.join(line['options'])}): give another --out"
                )
            continue
        folder = work / f"{path.stem}-{re.sub(r'[^a-z0-9.]+', '-', job.setting.lower())}-{job.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        figures = job.measure(folder)
        line = {
            "setting": job.setting,
            "seed": job.seed,
            **figures,
            "options": [*job.options],
            "seconds": round(time.monotonic() - start, 1),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "cpu": f"{os.cpu_count()}-core {cpu_name()}",
        }
        append(path, line)
        shutil.rmtree(folder)
        shown = {k: round(v, 2) for k, v in figures.items() if isinstance(v, int | float)}
        print(job.setting, job.seed, shown, f"{line['seconds']} s", flush=True)


def lines_of(jobs: Iterable[Job], name: str, places: Places) -> Lines:
    """Measure the jobs that have no line yet, unless only tables are wanted; return all lines."""
    path = places.out / f"{name}.jsonl"
    if not places.table:
        finish(jobs, path, places.work)
    return read(path)


def read(path: Path) -> dict[tuple[str, int], Line]:
    """Return the lines of a file by (setting, seed); what a killed process left half is no line."""
    if not path.exists():
        return {}
    whole = path.read_text().rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return {(line["setting"], line["seed"]): line for line in lines}


def append(path: Path, line: Line) -> None:
    """Add a line at the end, after cutting off half a line."""
    with open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(line).encode() + b"\n")


def train(folder: Path, options: Sequence[str]) -> None:
    """Run ``python -m dml_fast.train`` in this process; a killed run is continued."""
    from dml_fast import train as command

    if (folder / "last.pt").exists():
        arguments = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        arguments = [*options, "--out", str(folder)]
    _printed(command.main, arguments)


def evaluate(folder: Path, *options: str) -> dict[str, Any]:
    """Return what ``python -m dml_fast.evaluate`` prints of the students of the last epoch."""
    from dml_fast import evaluate as command

    arguments = [str(folder), "--checkpoint", "last", "--json", *options]
    result: dict[str, Any] = json.loads(_printed(command.main, arguments))
    return result


def embed(folder: Path, images: Path, out: Path, student: int) -> dict[str, NDArray[Any]]:
    """Return what ``python -m dml_fast.predict --features`` writes, of the last epoch."""
    from dml_fast import predict as command

    choice = ["--checkpoint", "last", "--student", str(student), "--features", str(out)]
    _printed(command.main, [str(folder), str(images), *choice])
    with np.load(out) as arrays:
        return dict(arrays)


def register(folder: Path, *options: str) -> str:
    """Return what ``python -m dml_fast.register`` prints."""
    from dml_fast import register as command

    return _printed(command.main, [str(folder), *options])


def simulate(folder: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """Run ``python -m dml_fast.select --simulate`` and return its lines, one a round."""
    from dml_fast import select as command

    _printed(command.main, ["--simulate", *options, "--out", str(folder)])
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def _printed(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> str:
    """Call a command, and return what it printed.

    Raises:
        SystemExit: it was stopped.
    """
    with redirect_stdout(StringIO()) as shown:
        code = main(arguments)
    if code:
        sys.exit(code)
    return shown.getvalue()


def accuracies(result: Mapping[str, Any]) -> dict[str, float]:
    """Return percentages: the mean of the students, and the ensemble."""
    students = [100 * student["accuracy"] for student in result["students"]]
    return {"students": fmean(students), "ensemble": 100 * result["ensemble_accuracy"]}


def figures(lines: Lines, setting: str, name: str) -> dict[int, float]:
    """Return one figure of a setting by seed."""
    return {seed: line[name] for (key, seed), line in lines.items() if key == setting}


def flat(lines: Lines) -> dict[tuple[str, int], Line]:
    """Return a line for each row of a table, where a job of several has them in ``rows``.

    The setting of such a line is what stands before the comma, the rest is the job's name.
    """
    found: dict[tuple[str, int], Line] = {}
    for (setting, seed), line in lines.items():
        prefix = setting.partition(",")[0]
        rows = {f"{prefix}, {name}": row for name, row in line.get("rows", {}).items()}
        found.update({(name, seed): row for name, row in (rows or {setting: line}).items()})
    return found


def mean_and_error(values: Iterable[float]) -> str:
    """Return mean ± standard error, or the only value, or nothing."""
    found = [*values]
    if len(found) < 2:
        return f"{found[0]:.1f}" if found else ""
    return f"{fmean(found):.1f} ± {stdev(found) / len(found) ** 0.5:.1f}"


def difference(lines: Lines, setting: str, base: str, name: str) -> str:
    """Return a figure's difference of two settings, paired by seed; "" where there is no pair."""
    ours, theirs = figures(lines, setting, name), figures(lines, base, name)
    both = sorted(ours.keys() & theirs.keys())
    return str(paired([ours[seed] - theirs[seed] for seed in both])) if both else ""


def comparison(
    lines: Lines, settings: Iterable[str], names: Sequence[str], base: Callable[[str], str]
) -> str:
    """Return a Markdown table: a row for each measured setting, with its paired differences.

    Args:
        lines: from `read`.
        settings: in the order of the rows.
        names: of the figures, two columns each.
        base: from a setting to the one that it is compared with; to itself for a baseline.
    """
    header = ["setting", "seeds", *names]
    header += [f"{name}, difference (wins)" for name in names]
    rows = []
    for setting in settings:
        seeds, other = len(figures(lines, setting, names[0])), base(setting)
        if not seeds:
            continue
        row = [setting, str(seeds)]
        row += [mean_and_error(figures(lines, setting, name).values()) for name in names]
        differences = [difference(lines, setting, other, name) for name in names]
        rows.append(row + (["" for _ in names] if other == setting else differences))
    return table(header, rows) if rows else "Not measured yet."


def origin(lines: Lines, command: str) -> str:
    """Say where figures come from: command, machines, dates, commits."""
    if not lines:
        return f"Command: `{command}`."
    days = sorted({line["date"][:10] for line in lines.values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    machines = " and ".join(sorted({line["cpu"] for line in lines.values()}))
    commits = ", ".join(sorted({str(line["commit"]).partition("-")[0] for line in lines.values()}))
    text = f"`{command}`; {machines}; {when}; commit {commits}."
    return "\n".join(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False))
