from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dml_fast.foreign import shown
from dml_fast.reporting.plots import groups_figure, plot_curves, plot_groups, run_figure

KEYS = ("val_acc", "train_acc", "loss", "ce", "kl")


def a_history(students: int = 2, epochs: int = 3, offset: float = 0.0) -> list[dict[str, Any]]:
    """Numbers that are all different, so that a swap shows."""
    return [
        {
            "epoch": e + 1,
            "images_per_s": 100.0,
            "students": [
                {"arch": f"net{k}"}
                | {key: 0.1 + offset + 0.1 * e + 0.01 * k + 0.001 * i for i, key in enumerate(KEYS)}
                for k in range(students)
            ],
            "ensemble_val_acc": 0.2 + offset + 0.1 * e,
        }
        for e in range(epochs)
    ]


def test_each_students_line_is_its_own() -> None:
    history = a_history(students=3, epochs=4)
    figure = run_figure("a run", history)
    for axis, key in zip(figure.axes, KEYS, strict=False):
        for k in range(3):
            line = axis.lines[k]
            assert list(line.get_xdata()) == [1, 2, 3, 4]
            assert list(line.get_ydata()) == [row["students"][k][key] for row in history]
    ensemble = figure.axes[0].lines[3]
    assert list(ensemble.get_ydata()) == [row["ensemble_val_acc"] for row in history]
    colours = [line.get_color() for line in figure.axes[0].lines[:4]]
    assert len(set(colours)) == 4


def test_legend_gives_the_accuracies_of_the_best_epoch() -> None:
    history = a_history()
    history[1]["students"][0]["val_acc"] = 0.9876
    legend = run_figure("a run", history).axes[5].get_legend()
    assert "2" in legend.get_title().get_text()
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["98.8%  student 0: net0", "21.0%  student 1: net1", "30.0%  ensemble"]


def test_groups_show_mean_and_range_over_runs_and_students() -> None:
    figure = groups_figure({"a": [a_history(), a_history(offset=0.3)], "b": [a_history(epochs=1)]})
    mean = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(mean, [0.255, 0.355, 0.455], atol=1e-12)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [0.1, 0.61], atol=1e-12)
    ensemble = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(ensemble, [0.35, 0.45, 0.55], atol=1e-12)


def test_a_student_that_does_not_train_leaves_a_gap() -> None:
    history = a_history()
    for key in ("loss", "ce", "kl", "train_acc"):
        history[0]["students"][1][key] = None
    values = run_figure("distill", history).axes[2].lines[1].get_ydata()
    assert math.isnan(values[0]) and values[1] == history[1]["students"][1]["loss"]


def test_no_mutual_term_is_said_rather_than_drawn() -> None:
    history = a_history()
    for line in history:
        for student in line["students"]:
            student["kl"] = 0.0
    axis = run_figure("independent", history).axes[4]
    assert not axis.lines and [text.get_text() for text in axis.texts] == ["none"]


@pytest.mark.parametrize(("students", "epochs"), [(1, 1), (12, 40), (30, 2)])
def test_legend_lies_within_its_own_cell(students: int, epochs: int) -> None:
    history = a_history(students, epochs)
    for line in history:
        for student in line["students"]:
            student["arch"] = "W" * 40
    figure = run_figure("a run", history)
    figure.canvas.draw()
    legend = figure.axes[5].get_legend().get_window_extent()
    page = figure.bbox
    assert legend.x1 <= page.x1 and legend.y0 >= page.y0
    panels = [axis.get_window_extent() for axis in figure.axes]
    assert not any(legend.overlaps(panel) for panel in panels[:5])
    assert max(p.width for p in panels) < 1.01 * min(p.width for p in panels)


ODD_NAMES = [
    "out $b_$",
    "$x^$",
    r"\frac",
    "caf\udce9",
    "a\nb\tc",
    "[x] :smile:",
    "\x1b[31m",
    "\x00",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_drawn_as_they_are(name: str) -> None:
    history = a_history()
    for line in history:
        line["students"][0]["arch"] = name
    single = run_figure(name, history)
    several = groups_figure({name: [history], "b": [a_history()]})
    for figure in (single, several):
        figure.canvas.draw()
        texts = [*figure.texts, *figure.axes[5].get_legend().get_texts()]
        assert not any(text.get_parse_math() for text in texts)
    [title] = single.texts
    labels = [text.get_text() for text in several.axes[5].get_legend().get_texts()]
    assert title.get_text() == shown(name)
    assert any(label.endswith(f"  {shown(name)}") for label in labels)


def test_the_callers_settings_of_matplotlib_do_not_enter() -> None:
    with matplotlib.rc_context({"text.usetex": True, "axes.formatter.use_mathtext": True}):
        run_figure("a_run", a_history()).canvas.draw()  # there may be no LaTeX


shares = st.none() | st.floats(0, 1)
losses = st.none() | st.sampled_from([math.nan, math.inf, 0.0]) | st.floats(0, 1e38)


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(st.data())
def test_any_metrics_can_be_drawn(data: st.DataObject) -> None:
    history = a_history(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)))
    for line in history:
        for student in line["students"]:
            student.update({key: data.draw(losses) for key in KEYS[2:]})
            student["train_acc"] = data.draw(shares)
            student["val_acc"] = data.draw(st.floats(0, 1))
    run_figure("a run", history).canvas.draw()
    groups_figure({"a": [history], "b": [a_history()]}).canvas.draw()


@pytest.mark.slow
def test_files_are_whole_pngs_and_nothing_else_is_left(tmp_path: Path) -> None:
    plot_curves(tmp_path / "one.png", {"a run": a_history()})
    plot_curves(tmp_path / "two.png", {"a": a_history(), "b": a_history(offset=0.1)})
    plot_groups(tmp_path / "groups.png", {"a": [a_history()] * 2, "b": [a_history()]})
    for name in ("one", "two", "groups"):
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert image.width > 1000 and image.getextrema()[0] != (255, 255)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyError):
        plot_curves(path, {"a run": [{"epoch": 1, "students": [{"val_acc": 0.5}]}]})
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_neither_torch_nor_pyplots_global_state_is_loaded() -> None:
    code = (
        "import sys, dml_fast.reporting.plots; "
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
