"""The tables that commands print to stdout: a run's at its end, and an evaluation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from dml_fast.foreign import shown
from dml_fast.reporting.console import PlainConsole
from dml_fast.runs.description import in_words
from dml_fast.runs.history import (
    ACCURACY,
    LABELS,
    MAP,
    EpochLine,
    History,
    ensemble_score,
    images_per_s,
    of_pairs,
    percent,
    pixels,
    score_of,
)

# columns of a retrieval's table, by their keys in the result
_SHARES = {"mAP": "mAP", "rank1": "rank-1", "rank5": "rank-5", "rank10": "rank-10", "mINP": "mINP"}


def show_run(
    history: History, best: int, folder: Path, f1: bool = False, rows: str = "images"
) -> None:
    """Print a finished run: the last and the best epoch of each student and of the ensemble.

    Args:
        history: all lines of metrics.
        best: the epoch of ``best.pt``, from 1.
        folder: the run's.
        f1: whether macro-F1 of the best epoch is shown too.
        rows: what the rows are called.
    """
    last, top = history[-1], history[best - 1]
    if of_pairs(last):
        _show_run_of_pairs(last)
    else:
        _show_run_of_shares(last, top, best, f1)
    _say(
        f"{images_per_s(history):,.0f} {rows}/s (median epoch; every student sees each "
        f"{rows.removesuffix('s')})\n"
        f"written to {shown(folder)}"
    )


def _show_run_of_pairs(last: EpochLine) -> None:
    table = _table(
        ("student", "architecture", "error, px"), title="Validation, last epoch: rough pairs"
    )
    for k, student in enumerate(last["students"]):
        table.add_row(str(k), shown(student["arch"]), pixels(student["val_error_px"]))
    table.add_row("ensemble", ACCURACY.ensemble, pixels(last["ensemble_val_error_px"]))
    _print(table, width=72)


def _show_run_of_shares(last: EpochLine, top: EpochLine, best: int, f1: bool) -> None:
    score = score_of(last)
    table = _table(
        ("student", "architecture", "last epoch", "best epoch", *["its macro-F1"] * f1),
        title=f"Validation {score.name}, % (best: epoch {best})",
    )
    for k, (now, then) in enumerate(zip(last["students"], top["students"], strict=True)):
        arch = shown(now["arch"])
        shares = [now[score.key], then[score.key], *[then.get("val_f1")] * f1]
        table.add_row(str(k), arch, *(percent(share, 1) for share in shares))
    shares = [ensemble_score(last), ensemble_score(top), *[top.get("ensemble_val_f1")] * f1]
    table.add_row("ensemble", score.ensemble, *(percent(share, 1) for share in shares))
    _print(table, width=72)


def show_evaluation(result: Mapping[str, Any]) -> None:
    """Print the result of `dml_fast.eval.of_run.evaluate_run`."""
    if "ensemble_accuracy" in result:
        _show_accuracies(result)
    elif "ensemble_mAP" in result:
        _show_labels(result)
    elif "bits" in result:
        _show_codes(result)
    else:
        _show_retrieval(result)


def _show_accuracies(result: Mapping[str, Any]) -> None:
    split = result["split"]
    if registers := "ensemble_error_px" in result:
        rows = [[pixels(s["val_error_px"]), *_errors(s)] for s in result["students"]]
        ensemble = [ACCURACY.ensemble, "", "", *_errors(result, "ensemble_")]
        columns = ["validation, px", "right, %", "within 1.5 px, %", "error, px"]
    else:
        rows = [[percent(s["val_acc"]), *_measures(s)] for s in result["students"]]
        ensemble = [ACCURACY.ensemble, "", "", *_measures(result, "ensemble_")]
        columns = ["validation, %", f"{split}, %", "macro-F1, %", "ECE, %", "NLL", "Brier"]
    _show_students(result, columns, rows, ensemble, f"{split} split" if registers else None)
    _show_facts(result, "pairs" if registers else _rows_or_images(result))
    if registers:
        return
    if left_out := result["unlabelled"]:
        _say(f"{left_out:,} of them have no label and are left out of the shares")
    if worst := result["confusions"]:
        pairs = (f"{shown(p['class'])} as {shown(p['as'])} ({p['rows']})" for p in worst)
        _say(f"most often confused, by all students together: {', '.join(pairs)}")


def _show_labels(result: Mapping[str, Any]) -> None:
    """Print how well labels are told that do not exclude each other."""

    def cells(scores: Mapping[str, Any], prefix: str = "") -> list[str]:
        return [percent(scores[prefix + name]) for name in ("mAP", "exact")]

    rows = [[percent(s["val_mAP"]), *cells(s)] for s in result["students"]]
    columns = ["validation mAP", "mAP", "all labels right"]
    ensemble = [LABELS.ensemble, "", "", *cells(result, "ensemble_")]
    _show_students(result, columns, rows, ensemble, f"{result['split']} split, %")
    _show_facts(result, "images")
    if absent := result["absent"]:
        names = ", ".join(map(shown, absent[:5])) + (", ..." if len(absent) > 5 else "")
        _say(f"{len(absent)} classes that no image has are left out of the means ({names})")


def _errors(scores: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return how far displacements of pairs are from the true ones as cells."""
    shares = [percent(scores[prefix + name]) for name in ("accuracy", "within_1.5px")]
    return [*shares, f"{scores[prefix + 'error_px']:.2f}"]


def _measures(scores: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return accuracy, macro-F1 and calibration as cells."""
    shares = [percent(scores[prefix + name]) for name in ("accuracy", "f1", "ece")]
    return shares + [f"{scores[prefix + name]:.3f}" for name in ("nll", "brier")]


def _show_retrieval(result: Mapping[str, Any]) -> None:
    columns = ["val. mAP", *_SHARES.values()]
    keys = ("val_mAP", *_SHARES)
    rows = [[percent(s[key]) for key in keys] for s in result["students"]]
    scores = [percent(result["ensemble"][key]) for key in _SHARES]
    sets = result.get("sets")
    title = f"{result['split']} split{', ' + _rule(sets) if sets else ''}, %"
    _show_students(result, columns, rows, [MAP.ensemble, "", "", *scores], title)
    how = "re-ranked, " if result["reranked"] else ""
    if result["protocol"] != "market1501":
        how = f"protocol {result['protocol']}, {how}"
    of_queries, of_gallery = (
        f" in {sets[part]:,} sets" if sets else "" for part in ("queries", "gallery")
    )
    counts = f"{result['queries']:,} queries{of_queries}, {how}{result['gallery']:,} gallery"
    _show_facts(result, f"images ({counts}{of_gallery})")
    _show_search(result)


def _show_codes(result: Mapping[str, Any]) -> None:
    """Print how well codes find, and what searched among what."""
    key = "val_mAP" if "val_mAP" in result["students"][0] else "val_acc"
    columns = ["val. mAP" if key == "val_mAP" else "val. accuracy", *_SHARES.values()]
    rows = [[percent(s[name]) for name in (key, *_SHARES)] for s in result["students"]]
    scores = [percent(result["ensemble"][name]) for name in _SHARES]
    bits = result["bits"]
    title = f"codes of {bits} bits by Hamming distance, {result['split']} split, %"
    _show_students(result, columns, rows, ["codes side by side", "", "", *scores], title)
    if key == "val_mAP":
        how = "" if result["protocol"] == "market1501" else f"protocol {result['protocol']}, "
        counts = f"{result['queries']:,} queries, {how}{result['gallery']:,} gallery"
        _show_facts(result, f"images ({counts})")
    else:
        parts = " and ".join(name for name in ("train", "val") if name != result["split"])
        among = f", which search among the {result['gallery']:,} of {parts}"
        _show_facts(result, _rows_or_images(result), among)
    _show_search(result)
    if result["unlabelled"]:
        _say(f"{result['unlabelled']:,} without a label are left out")
    if result["codes"]:
        _say(f"codes: {shown(result['codes'])}")


def _show_search(result: Mapping[str, Any]) -> None:
    """Print what a search left out, and where its picture is."""
    sets = result.get("sets")
    items = "sets of queries" if sets else "queries"
    if missing := (sets or result)["queries"] - result["n_valid"]:
        _say(f"{missing:,} {items} without a valid match are left out of the means")
    if result["ranked_lists"]:
        _say(f"ranked lists of the ensemble: {shown(result['ranked_lists'])}")


def _rows_or_images(result: Mapping[str, Any]) -> str:
    return "rows" if result["data"].startswith(("text:", "vectors:")) else "images"


def _rule(sets: Mapping[str, Any]) -> str:
    """Return how sets were compared, in words."""
    at = f" at temperature {sets['temperature']:g}" if sets["temperature"] is not None else ""
    return f"sets by {sets['reduction']}{at}"


def _show_students(
    result: Mapping[str, Any],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    ensemble: Sequence[str],
    title: str | None = None,
) -> None:
    """Print one row for each student, the best one marked, and one for the ensemble.

    Args:
        result: with ``students`` and ``best_student``.
        columns: what the shares are.
        cells: of each student.
        ensemble: the last row's cells, from the second on.
        title: above the table.
    """
    table = _table(("student", "architecture", "parameters", *columns), title)
    for k, (student, row) in enumerate(zip(result["students"], cells, strict=True)):
        mark = "* " if k == result["best_student"] else ""
        name, size = shown(student["arch"]), f"{student['parameters']:,}"
        table.add_row(f"{mark}{k}", name, size, *row)
    table.add_row("ensemble", *ensemble)
    _print(table, width=120)


def _show_facts(result: Mapping[str, Any], images: str, more: str = "") -> None:
    """Print what was evaluated on what; ``images`` says what the images are."""
    whose = "averages of weights in " if result.get("weights") == "ema" else ""
    _say(
        f"{result['images']:,} {images} of the {result['split']} split of {shown(result['data'])}"
        f"{more}; {whose}{result['checkpoint']}.pt of {shown(result['run'])}, "
        f"epoch {result['epoch']}; {result['precision']} on {result['device']}\n"
        "* best on the validation split in that epoch"
    )
    if changes := result.get("changes"):
        _say(f"--resume has changed the run: {in_words(changes)}")


def _table(columns: Sequence[str], title: str | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in columns:
        justify: Literal["left", "right"] = "left" if name == "architecture" else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    return table


def _print(table: Table, width: int) -> None:
    """Print at the terminal's width, or ``width`` where a narrower table would lose its figures."""
    console = PlainConsole()
    console.width = max(console.width, width)
    console.print(table)


def _say(text: str) -> None:
    PlainConsole().print(text, soft_wrap=True)
