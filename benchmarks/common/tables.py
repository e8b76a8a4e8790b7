"""Tables of contestants, which lead with how each compares with the best baseline."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.common import clocks
from dml_fast.reporting.markdown import table

Row = dict[str, Any]  # of a report: a contestant's name, and its figures or why it has none


class Column(NamedTuple):
    """A key of the rows, its heading, and how its values are shown."""

    key: str
    heading: str
    factor: float = 1
    style: str = ".4g"


BEST = Column("best_over_this", "best/this", style=".2f")
BEST_IN_GRAPH = Column("best_over_this_in_graph", "best/this in a graph", style=".2f")
STARVED = (
    "Timed before 2026-11-28, when the device could wait for the host inside the measured "
    "interval: the host's time is in these figures, so ratios will be others elsewhere."
)
NAIVE = Column("naive_over_this", "naive/this", style=".2f")


def best(rows: Sequence[Row], is_baseline: Callable[[str], bool], key: str) -> Row | None:
    """Return the baseline of the least time under that key; None if none was timed."""
    timed = [row for row in rows if row.get(key) is not None and is_baseline(row["name"])]
    return min(timed, key=lambda row: float(row[key]), default=None)


def compared(rows: Sequence[Row], is_baseline: Callable[[str], bool]) -> list[Row]:
    """Return the rows with the best baseline's time over theirs, eager and in a graph."""
    found = [dict(row) for row in rows]
    for column, key in ((BEST, "median_ms"), (BEST_IN_GRAPH, "graph_ms")):
        fastest = best(rows, is_baseline, key)
        for row in found:
            if fastest is not None and row.get(key):
                row[column.key] = fastest[key] / row[key]
    return found


def describe(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return a table of those that were timed, and a list of the others with the reasons.

    Columns without a value are left out.
    """
    timed = [row for row in rows if "median_ms" in row]
    shown = [column for column in columns if any(row.get(column.key) is not None for row in timed)]
    cells = [
        [row["name"], *(_cell(row.get(column.key), column) for column in shown)] for row in timed
    ]
    missing = [
        f"- {row['name']}: {row.get('left_out') or 'FAILED, ' + row['failed']}"
        for row in rows
        if "median_ms" not in row
    ]
    lines = [table(["contestant", *(column.heading for column in shown)], cells)]
    return "\n".join([*lines, *(["", "Not timed:", *missing] if missing else [])])


def remarks(result: dict[str, Any]) -> list[str]:
    """Return what a reader must know of a result's timing: who waited for the host, and clocks."""
    found = [STARVED] if is_starved(result) else []
    exposed = [row["name"] for row in result["contestants"] if row.get("hidden", 1) < 0.5]
    if exposed:
        found.append(
            f"These wait for the device or queue too much for it, so their times contain the "
            f"host's: {', '.join(exposed)}."
        )
    if "clocks" in result:
        found.append(clocks.describe(result["clocks"]))
    return found


def prose(text: str) -> str:
    """Return a paragraph in lines of a page's width, none of which begins with a name's plus."""
    text = text.replace(" + ", "\0+\0")
    lines = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def is_starved(result: dict[str, Any]) -> bool:
    """Whether it is of a GPU, from before the stopwatch read clocks and let the device sleep."""
    timed = [row for row in result["contestants"] if "median_ms" in row]
    return "clocks" not in result and any(row.get("kernels") is not None for row in timed)


def _cell(value: float | None, column: Column) -> str:
    return "-" if value is None else format(value * column.factor, column.style)
