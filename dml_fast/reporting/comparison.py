"""Runs side by side as Markdown: a row for each run, and one for each setting over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dml_fast.config.files import NOT_A_SETTING
from dml_fast.errors import UserError
from dml_fast.reporting.markdown import plain, table
from dml_fast.reporting.plots import plot_curves, plot_groups
from dml_fast.runs.description import in_words
from dml_fast.runs.files import atomic_write, writing
from dml_fast.runs.folder import Run
from dml_fast.runs.history import (
    EpochLine,
    History,
    best_epoch,
    best_score,
    ensemble_score,
    images_per_s,
    mean_score,
    of_pairs,
    out_of_patience,
    score_of,
    unit,
    written,
)

_OWN_COLUMN = frozenset({"method", "architectures", "epochs", "changes"})


@dataclass(frozen=True)
class Entry:
    """One run in a comparison.

    Attributes:
        label: the run's name, which no other run in the comparison has.
        run: its folder.
        history: at least one line of metrics.
    """

    label: str
    run: Run
    history: History

    @cached_property
    def setting(self) -> tuple[tuple[str, Any], ...]:
        """All options in which two runs agree that differ only by chance."""
        config = self.run.config.settled(unlabelled=False)  # a run from before an option lacks it
        options = {k: v for k, v in config.to_dict().items() if k not in NOT_A_SETTING}
        changes = in_words(self.run.changes)  # of one that became longer
        return (*options.items(), ("architectures", config.architectures), ("changes", changes))

    @property
    def best(self) -> EpochLine:
        """The line of metrics of the epoch of ``best.pt``."""
        return self.history[best_epoch(self.history) - 1]

    @property
    def complete(self) -> bool:
        """Whether all epochs are done, or as many as ``--patience`` allowed."""
        config = self.run.config
        ended = out_of_patience(self.history, config.patience)
        return ended or len(self.history) >= config.total_epochs


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """Open runs, each once, under names that tell them apart.

    Raises:
        UserError: a path is no run, a run has no finished epoch yet, or runs are judged by
            different scores.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        run = Run.open(path)
        runs.setdefault(run.folder.resolve(), run)
    labels = _labels(list(runs))
    entries = []
    for (folder, run), label in zip(runs.items(), labels, strict=True):
        history = run.metrics()
        if not history:
            raise UserError(
                f"{folder} has no finished epoch to report: leave it out, or continue it with "
                f"python -m dml_fast.train --resume {folder}"
            )
        entries.append(Entry(label, run, history))
    names = ["error in px" if of_pairs(x.best) else score_of(x.best).name for x in entries]
    for entry, name in zip(entries, names, strict=True):
        if name != names[0]:
            raise UserError(
                f"{entries[0].label} is judged by {names[0]} and {entry.label} by {name}: "
                "report them apart"
            )
    return entries


def group(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Put runs together that differ only by their seeds.

    Returns:
        Runs by a label that says how a group differs from the others, in order of appearance.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.setting, []).append(entry)
    differing = _differing(list(groups))
    labelled = {}
    for setting, members in groups.items():
        options = dict(setting)
        words = [options["method"]]
        if "architectures" in differing:
            words.append(_cohort(options["architectures"]))
        rest = sorted(differing - {"method", "architectures"})
        labelled[" ".join([*words, *(_option(name, options) for name in rest)])] = members
    return labelled


def to_markdown(entries: Sequence[Entry]) -> str:
    """Return the comparison: a table of runs, and one of settings if any has several seeds."""
    differing = _differing([entry.setting for entry in entries]) - _OWN_COLUMN
    header = ["run", "method", "students", "epochs", "seed"]
    rows = [
        [
            plain(entry.label),
            *_what(entry),
            str(entry.run.config.seed),
            *_options(entry, differing),
            str(entry.best["epoch"]),
            written(entry.best, best_score(entry.best)),
            written(entry.best, mean_score(entry.best)),
            written(entry.best, ensemble_score(entry.best)),
            f"{images_per_s(entry.history):,.0f}",
        ]
        for entry in entries
    ]
    measured = ["best epoch", *_measured(entries[0]), _speed(entries)]
    parts = ["# Comparison of runs" if len(entries) > 1 else f"# {plain(entries[0].label)}"]
    parts.append(table([*header, *_column(differing), *measured], rows))
    what = f"Shares are the {score_of(entries[0].best).name} on the validation split, in the epoch "
    what += "with the highest mean of the students (that of `best.pt`); for the test split use "
    what += "`python -m dml_fast.evaluate RUN`"
    if of_pairs(entries[0].best):
        what = "Errors are those of displacements on the validation pairs, in the last epoch; for "
        what += "pairs that are aligned use `python -m dml_fast.evaluate RUN --data pairs:FILE.npz`"
    parts.append(f"{what}. {_per_second(entries)}")
    parts += [
        f"{plain(entry.label)} was changed by `--resume`: {in_words(entry.run.changes)}."
        for entry in entries
        if entry.run.changes
    ]
    # the same seed twice is the same run twice: it would make the error look smaller
    once = {(e.setting, e.run.config.seed): e for e in reversed(entries) if e.complete}
    finished = group(list(reversed(once.values())))
    if any(len(members) > 1 for members in finished.values()):
        parts += ["## Over seeds", _seeds(finished, differing)]
        note = "Mean ± standard error over n runs that differ only by seed."
        if unfinished := [plain(entry.label) for entry in entries if not entry.complete]:
            note += f" Left out because they are not finished: {', '.join(unfinished)}."
        parts.append(note)
    return "\n\n".join(parts) + "\n"


def write_report(entries: Sequence[Entry], folder: Path) -> str:
    """Write ``curves.png`` and ``report.md``.

    Args:
        entries: at least one.
        folder: where to write; it is created if it does not exist.

    Returns:
        The Markdown.

    Raises:
        UserError: the folder cannot be written to.
    """
    markdown = to_markdown(entries)
    with writing(f"the report in {folder}", "give another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        if len(entries) == 1:
            plot_curves(folder / "curves.png", {entries[0].label: entries[0].history})
        else:
            histories = {k: [e.history for e in v] for k, v in group(entries).items()}
            plot_groups(folder / "curves.png", histories)
        with atomic_write(folder / "report.md") as file:
            file.write(f"{markdown}\n![Curves](curves.png)\n".encode())
    return markdown


def _seeds(groups: Mapping[str, Sequence[Entry]], differing: set[str]) -> str:
    """Return the table of settings."""
    rows = []
    speed = _speed([entry for members in groups.values() for entry in members])
    for members in groups.values():
        seeds = ", ".join(str(entry.run.config.seed) for entry in members)
        row = [*_what(members[0]), *_options(members[0], differing), seeds, str(len(members))]
        getters: tuple[Callable[[Entry], float], ...] = (
            lambda entry: best_score(entry.best),
            lambda entry: mean_score(entry.best),
            lambda entry: ensemble_score(entry.best) or 0.0,
        )
        scale = 1 if of_pairs(members[0].best) else 100
        row += [_mean_and_error([scale * get(entry) for entry in members], 2) for get in getters]
        row.append(_mean_and_error([images_per_s(entry.history) for entry in members], 0))
        rows.append(row)
    header = ["method", "students", "epochs", *_column(differing), "seeds", "n"]
    first = next(iter(groups.values()))[0]
    return table([*header, *_measured(first), speed], rows)


def _measured(entry: Entry) -> list[str]:
    """Return the titles of the scores' columns."""
    return [f"{who}, {unit(entry.best)}" for who in ("best student", "mean student", "ensemble")]


def _per_second(entries: Sequence[Entry]) -> str:
    name = _speed(entries).removesuffix("s/s")
    article = "an" if name == "image" else "a"
    return (
        f"{name.capitalize()}s per second: median epoch, {article} {name} counted once for all "
        "students."
    )


def _speed(entries: Sequence[Entry]) -> str:
    """Return the title of the column of speeds."""
    names = {entry.run.config.row_name for entry in entries}
    return f"{names.pop() if len(names) == 1 else 'rows'}/s"


def _what(entry: Entry) -> list[str]:
    config, done = entry.run.config, len(entry.history)
    epochs = str(done) if entry.complete else f"{done} of {config.total_epochs}"
    return [config.method, plain(_cohort(config.architectures)), epochs]


def _cohort(names: Sequence[str]) -> str:
    """Return ``4 x resnet32``, or the names of a mixed cohort."""
    return f"{len(names)} x {names[0]}" if len(set(names)) == 1 else " + ".join(names)


def _option(name: str, options: Mapping[str, Any]) -> str:
    value = options[name]
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def _options(entry: Entry, differing: set[str]) -> list[str]:
    """Return a cell with the options that differ among runs and have no column, if any do."""
    options = dict(entry.setting)
    words = (plain(_option(name, options)) for name in sorted(differing))
    return [" ".join(words)] if differing else []


def _column(differing: set[str]) -> list[str]:
    return ["options"] if differing else []


def _differing(settings: Sequence[tuple[tuple[str, Any], ...]]) -> set[str]:
    """Return the names of options that differ among the settings."""
    return {name for setting in settings for name, _ in set(setting) ^ set(settings[0])}


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest end of each folder's path that no other folder shares."""
    labels = []
    for folder in folders:
        for depth in range(1, len(folder.parts) + 1):
            ends = [other.parts[-depth:] for other in folders]
            if ends.count(folder.parts[-depth:]) == 1:
                break
        labels.append("/".join(folder.parts[-depth:]))
    return labels


def _mean_and_error(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    error = stdev(values) / sqrt(len(values))
    return f"{fmean(values):,.{digits}f} ± {error:,.{digits}f}"
