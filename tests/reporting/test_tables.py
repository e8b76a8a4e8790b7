"""The tables on stdout: names in them are bytes and no markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dml_fast.foreign import shown
from dml_fast.reporting.console import PlainConsole, at_the_end, logger, set_up_logging
from dml_fast.reporting.tables import show_evaluation, show_run

ODD_NAMES = ["o [x]", "[/]", "[red]y", ":smile:", "caf\udce9", "a\tb\nc", "\x1b[31m", "$x^$"]
LINE: Any = {
    "epoch": 1,
    "images_per_s": 100.0,
    "students": [{"val_acc": 0.5}],
    "ensemble_val_acc": 0.6,
}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_runs_table_shows_names_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {**LINE, "students": [{"val_acc": 0.5, "arch": name}]}
    show_run([line], 1, Path("runs", name))  # type: ignore[list-item]
    out = capsys.readouterr().out
    assert f"written to {Path('runs', shown(name))}\n" in out
    assert f" {shown(name)} " in out


def test_a_runs_table_shows_f1_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    students = [{"val_acc": 0.5, "val_f1": 0.123, "arch": "mlp_64"}]
    line = {**LINE, "students": students, "ensemble_val_f1": 0.456}
    for f1 in (False, True):
        show_run([line], 1, Path("runs"), f1)  # type: ignore[list-item]
        out = capsys.readouterr().out
        assert [text in out for text in ("macro-F1", "12.3", "45.6")] == [f1] * 3


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_evaluations_table_shows_names_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = dict.fromkeys(("mAP", "rank1", "rank5", "rank10", "mINP"), 0.5)
    result = {
        "run": name,
        "checkpoint": "best",
        "epoch": 1,
        "data": f"folder:{name}",
        "split": "test",
        "images": 10,
        "unlabelled": 0,
        "device": "cpu",
        "precision": "fp32",
        "best_student": 0,
    }
    student = {"arch": name, "parameters": 5}
    measures = dict.fromkeys(("accuracy", "f1", "ece", "nll", "brier"), 0.5)
    accuracies = [{**student, "val_acc": 0.5, **measures}]
    ensemble = {f"ensemble_{key}": value for key, value in measures.items()}
    result["labelled"] = 10
    ensemble["confusions"] = [{"class": name, "as": "other", "rows": 3}]  # type: ignore[assignment]
    show_evaluation({**result, "students": accuracies, **ensemble})
    searched = [{**student, "val_mAP": 0.5, **shares}]
    how = {"protocol": "market1501", "reranked": False, "ranked_lists": name}
    counts = {"queries": 2, "gallery": 8, "n_valid": 1, **how}
    show_evaluation({**result, "students": searched, "ensemble": shares, **counts})
    out = capsys.readouterr().out
    assert out.count(f"split of folder:{shown(name)}; best.pt of {shown(name)}, epoch 1") == 2
    assert f"ensemble: {shown(name)}\n" in out
    assert out.count(f" {shown(name)} ") == 3
    assert f"together: {shown(name)} as other (3)\n" in out


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("terminal", ["", "1"])
def test_a_message_shows_names_as_they_are(
    name: str, terminal: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    for attribute in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, attribute, getattr(logger, attribute))
    set_up_logging(PlainConsole(stderr=True))
    logger.warning("continuing %s at step %d", name, 3)
    [line] = capsys.readouterr().err.splitlines()
    assert f"continuing {shown(name)} at step 3" in re.sub(r"\x1b\[[\d;]*m", "", line)


def test_an_error_at_the_end_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with at_the_end("curves.png", "again"):
        raise ValueError("\n  many\n lines of a parser")
    assert [record.message for record in caplog.records] == [
        "curves.png: not written (many); again"
    ]
