"""``python -m dml_fast.report`` on a trained run and on variations of its files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import pytest
from PIL import Image

from dml_fast import cli
from dml_fast.config.files import from_mapping
from dml_fast.errors import UserError
from dml_fast.report import main
from dml_fast.reporting.comparison import group, read_entries
from dml_fast.reporting.markdown import table
from dml_fast.train import main as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "first"
    options = "--arch resnet8 --cohort 2 --epochs 2 --train-fraction 0.1 --device cpu"
    assert train([*options.split(), "--out", str(path)]) == 0
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "first"))


def vary(run: Path, name: str, add: float = 0.0, **options: Any) -> Path:
    """Another run: its options changed, and ``add`` on top of its validation accuracies.

    Where the options ask for other students, it has those, all with the first one's scores.
    """
    path = run.parent / name
    shutil.copytree(run, path)
    description = json.loads((path / "config.json").read_text())
    assert options.keys() <= description["config"].keys()
    description["config"] |= options
    archs = from_mapping(description["config"], "").architectures
    lines = history(path)
    for parent in (description, *lines):
        if [student["arch"] for student in parent["students"]] != list(archs):
            parent["students"] = [parent["students"][0] | {"arch": arch} for arch in archs]
    (path / "config.json").write_text(json.dumps(description))
    for line in lines:
        line["ensemble_val_acc"] += add
        for student in line["students"]:
            student["val_acc"] += add
    write(path, lines)
    return path


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """Each table as a list of rows by column name."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        cells = [[c.strip() for c in line.strip("| \n").split(" | ")] for line in block.split("\n")]
        found.append([dict(zip(cells[0], row, strict=True)) for row in cells[2:-1]])
    return found


def best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return max(lines, key=lambda line: sum(s["val_acc"] for s in line["students"]))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_one_run_is_reported_into_its_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "curves.png").unlink()
    markdown = printed(capsys, run)
    [[row]] = tables(markdown)
    lines = history(run)
    line = best(lines)
    assert row == {
        "run": "first",
        "method": "dml",
        "students": "2 x resnet8",
        "epochs": "2",
        "seed": "0",
        "best epoch": str(line["epoch"]),
        "best student, %": f"{100 * max(s['val_acc'] for s in line['students']):.2f}",
        "mean student, %": f"{100 * fmean(s['val_acc'] for s in line['students']):.2f}",
        "ensemble, %": f"{100 * line['ensemble_val_acc']:.2f}",
        "images/s": f"{median(row['images_per_s'] for row in lines):,.0f}",
    }
    assert (run / "report.md").read_text().startswith(markdown)
    with Image.open(run / "curves.png") as image:
        image.load()


def test_seeds_are_averaged_with_their_standard_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.parent / "new" / "folder"
    runs = [
        run,
        vary(run, "second", add=0.01, seed=1, out="elsewhere", log_every=3),
        vary(run, "third", add=0.04, seed=2),
        vary(run, "warm", add=0.02, kl_warmup=5.0),
    ]
    single, seeds = tables(printed(capsys, *runs, "--out", out))
    assert [row["run"] for row in single] == ["first", "second", "third", "warm"]
    assert [row["options"] for row in single] == ["kl_warmup=0"] * 3 + ["kl_warmup=5"]
    assert [row["seeds"] for row in seeds] == ["0, 1, 2", "0"]
    base = 100 * best(history(run))["ensemble_val_acc"]
    values = [base, base + 1, base + 4]
    error = stdev(values) / 3**0.5
    assert seeds[0]["ensemble, %"] == f"{fmean(values):.2f} ± {error:.2f}"
    assert seeds[0]["n"] == "3" and "±" not in seeds[1]["ensemble, %"]
    assert {path.name for path in out.iterdir()} == {"curves.png", "report.md"}


def test_unfinished_runs_and_repeated_seeds_do_not_enter_the_means(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = vary(run, "stopped", add=0.5, seed=7)
    write(stopped, history(stopped)[:1])
    runs = [run, run / "config.json", vary(run, "again"), vary(run, "other", seed=1), stopped]
    markdown = printed(capsys, *runs, "--out", run.parent / "out")
    single, seeds = tables(markdown)
    assert [row["run"] for row in single] == ["first", "again", "other", "stopped"]
    assert single[-1]["epochs"] == "1 of 2"
    assert seeds[0]["seeds"] == "0, 1" and "0.00" in seeds[0]["mean student, %"].split("±")[1]
    assert "not finished: stopped." in markdown


def test_groups_have_a_label_each(run: Path) -> None:
    mixed = vary(run, "mixed", arch="resnet8,resnet14")
    runs = [
        run,
        vary(run, "listed", arch="resnet8,resnet8", cohort=0, seed=3),  # the same setting
        vary(run, "three", cohort=3),
        mixed,
        vary(run, "noisy", label_noise=0.3),
        vary(run, "alone", method="independent"),
    ]
    labels = {
        label: [entry.label for entry in entries]
        for label, entries in group(read_entries(runs)).items()
    }
    assert labels == {
        "dml 2 x resnet8 label_noise=0": ["first", "listed"],
        "dml 3 x resnet8 label_noise=0": ["three"],
        "dml resnet8 + resnet14 label_noise=0": ["mixed"],
        "dml 2 x resnet8 label_noise=0.3": ["noisy"],
        "independent 2 x resnet8 label_noise=0": ["alone"],
    }


def test_runs_that_were_computed_differently_are_one_setting(run: Path) -> None:
    how = {"executor": "threads", "data_threads": 1, "loader": "fallback", "backend": "gloo"}
    runs = [run, *(vary(run, name, seed=1, **{name: value}) for name, value in how.items())]
    [(label, members)] = group(read_entries(runs)).items()
    assert label == "dml"
    assert [entry.label for entry in members] == ["first", *how]


def test_a_run_on_pairs_is_reported_apart(run: Path) -> None:
    other = vary(run, "pairs")
    lines = history(other)
    for line in lines:
        line["ensemble_val_error_px"] = 1.0
        for student in line["students"]:
            student["val_error_px"] = 2.0
    write(other, lines)
    with pytest.raises(UserError, match="pairs is judged by error in px and first by accuracy"):
        read_entries([other, run])


def test_folders_of_one_name_are_told_apart(run: Path) -> None:
    for parent in ("a", "b"):
        shutil.copytree(run, run.parent / parent / "run")
    entries = read_entries([run.parent / "a" / "run", run.parent / "b" / "run", run])
    assert [entry.label for entry in entries] == ["a/run", "b/run", "first"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "is not a run folder"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no finished epoch"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epo'), "is damaged"),
        (lambda run: (run / "config.json").write_text("[]"), "is damaged"),
        (lambda run: (run / "report.md").mkdir(), "cannot be written"),
    ],
)
def test_what_cannot_be_reported_is_named(
    run: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    capsys.readouterr()
    assert cli.run(main, [str(run)]) == 2
    assert message in capsys.readouterr().err


def test_at_least_one_run_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, []) == 2
    assert "no run was named" in capsys.readouterr().err


def test_a_table_lines_up_and_keeps_its_columns() -> None:
    lines = table(["name", "n"], [["a|b", "1"], ["c", "20"]]).splitlines()
    assert lines == ["| name |  n |", "|------|---:|", "| a\\|b |  1 |", "| c    | 20 |"]
