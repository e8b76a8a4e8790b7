"""The result of a comparison as ``compare.json`` and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from dml_fast.comparison.measures import (
    ACCURACY,
    CALIBRATION,
    RETRIEVAL,
    Measure,
    Measured,
)
from dml_fast.comparison.methods import Contestant
from dml_fast.comparison.statistics import Paired, paired
from dml_fast.config import flag
from dml_fast.reporting.markdown import plain, table


@dataclass(frozen=True)
class Result:
    """All runs of a comparison, by method and seed; the first method is the baseline.

    Attributes:
        contestants: M of them.
        seeds: S of them.
        figures: of each method, one for each seed.
        churn: of each method, of its students and of its ensemble, in 0..1; None where it was not
            measured.
    """

    contestants: tuple[Contestant, ...]
    seeds: tuple[int, ...]
    figures: Mapping[str, Sequence[Measured]]
    churn: Mapping[str, tuple[float, float] | None]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What was measured."""
        retrieval = self.contestants[0].config.retrieval
        return RETRIEVAL if retrieval else ACCURACY + CALIBRATION * self.calibrated

    @property
    def calibrated(self) -> bool:
        """Whether calibration was measured, as of rows of one class."""
        first = self.figures[self.names[0]][0]
        return CALIBRATION[0].key in first["measures"]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the methods."""
        return tuple(one.name for one in self.contestants)

    def values(self, name: str, measure: Measure) -> list[float]:
        """Return a measure of a method, one value for each seed."""
        return [one["measures"][measure.key] for one in self.figures[name]]

    def differences(self, name: str, measure: Measure) -> list[float]:
        """Return a method's values minus the baseline's, seed by seed."""
        pairs = zip(self.values(name, measure), self.values(self.names[0], measure), strict=True)
        return [mine - theirs for mine, theirs in pairs]


def to_json(result: Result) -> dict[str, Any]:
    """Return everything that was measured; shares are in 0..1, differences to the baseline."""
    methods = {}
    for one in result.contestants:
        changed = result.churn[one.name]
        methods[one.name] = {
            "options": one.config.to_dict(),
            "by_seed": dict(zip(map(str, result.seeds), result.figures[one.name], strict=True)),
            "mean": {m.key: fmean(result.values(one.name, m)) for m in result.measures},
            "churn": changed and dict(zip(("students", "ensemble"), changed, strict=True)),
            "differences": {
                m.key: paired(result.differences(one.name, m))._asdict() for m in result.measures
            }
            if one.name != result.names[0]
            else {},
        }
    return {"baseline": result.names[0], "seeds": list(result.seeds), "methods": methods}


def to_markdown(result: Result) -> str:
    """Return the tables, and a line for each difference that the seeds do not tell."""
    base, count = result.names[0], len(result.seeds)
    retrieval = result.contestants[0].config.retrieval
    score = "accuracy" if result.calibrated else "mAP"
    seeds = f"{count} seeds ({result.seeds[0]} to {result.seeds[-1]})" if count > 1 else "one seed"
    first, *others = ACCURACY if not retrieval else RETRIEVAL
    parts = [
        f"# {plain(result.contestants[0].config.data)}: {', '.join(map(plain, result.names))}",
        f"{seeds[0].upper()}{seeds[1:]}. Test {score} after the last epoch, in percent: nothing is "
        "selected on the test rows. *students* is the mean of all students, *best student* the one "
        "with the best validation score, *ensemble* the mean of their probabilities"
        + ("" if not retrieval else " (of embeddings: side by side)")
        + ".",
        _values(result, [first, *others]),
        f"Differences from {plain(base)}, paired by seed: mean, the 95 % interval (Student's t), "
        "and in how many seeds it is above 0. **Bold**: the interval leaves 0 out.",
        _differences(result, [first, *others]),
    ]
    if result.calibrated:
        parts += [
            "## Calibration and churn",
            "ECE: expected calibration error over 15 bins, in percent. NLL: negative "
            "log-likelihood, in nats. Churn: the share of test predictions, in percent, that "
            "change from one seed to another. Less is better.",
            _values(result, CALIBRATION, with_churn=True),
            f"Differences from {plain(base)}:",
            _differences(result, CALIBRATION),
        ]
    parts += ["## Cost", _cost(result)]
    if notes := _notes(result):
        parts += ["## What these seeds do not tell", notes]
    return "\n\n".join(parts) + "\n"


def cost_times(result: Result) -> str:
    """Return the median time of training, which no two machines have the same, as a table."""
    rows = []
    base = median(one["seconds"] for one in result.figures[result.names[0]])
    for name in result.names:
        seconds = median(one["seconds"] for one in result.figures[name])
        rows.append([plain(name), f"{seconds:.1f}", f"{seconds / base:.2f}" if base else ""])
    return table(["method", "training, s (median)", "of the first"], rows)


def _values(result: Result, measures: Sequence[Measure], with_churn: bool = False) -> str:
    header = ["method", *(m.title for m in measures)]
    rows = []
    for name in result.names:
        row = [plain(name)]
        row += [_shown(fmean(result.values(name, m)), m) for m in measures]
        if with_churn:
            changed = result.churn[name]
            row += ["", ""] if changed is None else [f"{100 * share:.2f}" for share in changed]
        rows.append(row)
    if with_churn:
        header += ["students' churn", "ensemble's churn"]
    return table(header, rows)


def _differences(result: Result, measures: Sequence[Measure]) -> str:
    rows = []
    for name in result.names[1:]:
        cells = (_difference(paired(result.differences(name, m)), m) for m in measures)
        rows.append([plain(name), *cells])
    return table(["method", *(m.title for m in measures)], rows)


def _difference(found: Paired, measure: Measure) -> str:
    scale, digits = (100, 2) if measure.percent else (1, 3)
    text = f"{scale * found.mean:+.{digits}f}"
    if found.seeds > 1:
        low, high = (f"{scale * end:+.{digits}f}" for end in (found.low, found.high))
        text = f"{text} [{low}, {high}]"
    if found.resolved:
        text = f"**{text}**"
    return f"{text} {found.wins}/{found.seeds}"


def _shown(value: float, measure: Measure) -> str:
    return f"{100 * value:.2f}" if measure.percent else f"{value:.3f}"


def _cost(result: Result) -> str:
    rows = []
    base = fmean(one["images"] for one in result.figures[result.names[0]])
    for one in result.contestants:
        figures = result.figures[one.name]
        images = fmean(figure["images"] for figure in figures)
        students = len(one.config.architectures)
        rows.append(
            [
                plain(one.name),
                str(students),
                f"{figures[0]['parameters']:,}",
                f"{images:,.0f}",
                f"{images / base:.2f}",
            ]
        )
    header = [
        "method",
        "students",
        "parameters of all",
        "rows x students trained on",
        "of the first",
    ]
    return table(header, rows) + (
        "\n\nTo use the ensemble costs all of its students, to use one student one network. "
        "`compare.json` has the seconds of each run."
    )


def _notes(result: Result) -> str:
    lines = []
    for name in result.names[1:]:
        for measure in (ACCURACY[0], ACCURACY[2]):
            found = paired(result.differences(name, measure))
            if found.resolved:
                continue
            what = f"- {plain(name)}, {measure.title}: "
            if found.seeds < 2:
                lines.append(f"{what}one seed tells nothing of a difference; {flag('seeds')} 5 may")
                continue
            half = 100 * (found.high - found.mean)
            enough = found.enough()
            lines.append(
                f"{what}{100 * found.mean:+.2f} points, but {found.seeds} seeds leave ±{half:.2f}; "
                + (
                    f"if it stays so, about {enough} seeds tell it from 0"
                    if enough
                    else "not even 1,000 seeds would tell so small a difference from 0"
                )
            )
    return "\n".join(lines)
