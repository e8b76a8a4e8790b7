"""``select --simulate``: rounds as a person would do them, ended anywhere, and refusals."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from market_cases import make_market
from PIL import Image
from selection_cases import CLASSES, blobs, select, table

from dml_fast import cli
from dml_fast.distributed.launch import Launch
from dml_fast.eval.of_run import evaluate_run
from dml_fast.machine import locked
from dml_fast.rng import derive_seed
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained
from dml_fast.selection.rounds import Rounds
from dml_fast.selection.simulation import _Loop
from dml_fast.train import main as train_main

TRAINING = "--arch mlp_8,mlp_8,mlp_8 --batch-size 8 --epochs 2 --epoch-steps 5 --device cpu"
LOOP = ("--simulate", "--start", "6", "--acquire", "5", "--rounds", "2", "--seed", "3")


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Training sets the logger up again; other tests of this process look at it."""
    logging.getLogger("dml_fast").propagate = True


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return blobs(tmp_path_factory.mktemp("rows") / "rows.npz")


@pytest.fixture(scope="module")
def done(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop") / "rounds"
    assert simulate(data, folder) == 0
    return folder


def simulate(data: str, folder: Path, *options: object) -> int:
    return select(*LOOP, "--data", data, *TRAINING.split(), "--out", folder, *options)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def labels_of(folder: Path, number: int) -> dict[str, str]:
    header, *rows = table(folder / f"labels-{number:02d}.tsv")
    assert header == ["name", "class"]
    return dict(rows)


def test_each_round_has_the_labels_of_the_one_before_and_those_it_asked_for(done: Path) -> None:
    lines = lines_of(done)
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["labels"] for line in lines] == [6, 11, 16]
    assert [len(line["acquired"]) for line in lines] == [5, 5, 0]
    for number, line in enumerate(lines):
        labels = labels_of(done, number)
        assert len(labels) == line["labels"]
        assert labels == {name: CLASSES[int(name.split()[1]) % 3] for name in labels}
        assert not labels.keys() & set(line["acquired"])
        if number:
            assert [*labels] == [*labels_of(done, number - 1), *lines[number - 1]["acquired"]]


def test_each_round_is_a_run_whose_last_checkpoint_was_tested(done: Path) -> None:
    for number, line in enumerate(lines_of(done)):
        run = done / f"round-{number:02d}"
        found = evaluate_run(run, checkpoint="last", device="cpu")
        assert found["images"] == 12
        assert [s["accuracy"] for s in found["students"]] == line["test_acc"]
        assert [s["f1"] for s in found["students"]] == line["test_f1"]
        assert found["ensemble_accuracy"] == line["ensemble_test_acc"]
        assert found["ensemble_f1"] == line["ensemble_test_f1"]
        config = Run.open(run).config
        assert config.unlabelled_share == 0
        assert Trained.load(Run.open(run), "last").step == 10  # whatever the number of labels
        assert Trained.load(Run.open(run), "last").facts.classes == CLASSES


def test_a_round_asks_for_the_rows_that_select_would(done: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", "last", "--acquire", 5, "--seed", derive_seed(3, "round", 1))
    assert select(done / "round-01", *options, "--out", tmp_path / "next.tsv") == 0
    chosen = [row[0] for row in table(tmp_path / "next.tsv")[1:]]
    assert chosen == lines_of(done)[1]["acquired"]


def test_the_picture(done: Path) -> None:
    with Image.open(done / "rounds.png") as picture:
        assert picture.size > (600, 400)
        assert len(picture.convert("RGB").getcolors(2**20) or ()) > 50


@pytest.mark.slow
def test_the_start_does_not_depend_on_the_score(done: Path, data: str, tmp_path: Path) -> None:
    """So that selectors are compared by pairs."""
    options = ("--score", "random", "--rounds", 1, "--how", "topk")
    assert simulate(data, tmp_path / "other", *options) == 0
    assert labels_of(tmp_path / "other", 0) == labels_of(done, 0)
    first, other = lines_of(done)[0], lines_of(tmp_path / "other")[0]
    assert other["acquired"] != first["acquired"]
    assert other | {"acquired": ()} == first | {"acquired": ()}


@pytest.mark.slow
def test_a_round_is_the_run_that_its_labels_give(tmp_path: Path) -> None:
    """On images; features of vectors are fitted once for all rounds."""
    options = "--arch resnet8,resnet8 --batch-size 8 --epochs 2 --epoch-steps 3 --device cpu"
    few = (*options.split(), "--train-fraction", "0.1", "--seed", "3")
    rounds = tmp_path / "rounds"
    assert select(*LOOP, "--rounds", 1, *few, "--out", rounds) == 0
    by_hand = tmp_path / "run"
    labels = ("--labels", str(rounds / "labels-01.tsv"), "--unlabelled-share", "0")
    sequential = ("--executor", "sequential", "--out", str(by_hand))
    assert cli.run(train_main, [*few, *labels, *sequential]) == 0
    for k in range(2):
        name = f"student_{k}.safetensors"
        assert (by_hand / name).read_bytes() == (rounds / "round-01" / name).read_bytes()


@pytest.mark.slow
def test_the_pool_ends_before_the_rounds(data: str, tmp_path: Path, capfd: Any) -> None:
    options = ("--start", 40, "--acquire", 6, "--rounds", 9)
    assert simulate(data, tmp_path / "rounds", *options) == 0
    lines = lines_of(tmp_path / "rounds")
    assert [line["labels"] for line in lines] == [40, 46, 48]
    error = capfd.readouterr().err
    assert "6 rows were asked for and there are 2: all are chosen" in error
    assert "every row has a label: 7 rounds are left out" in error


def test_rows_whose_label_nobody_knows_are_left_alone(tmp_path: Path) -> None:
    data = blobs(tmp_path / "rows.npz", unlabelled=30)
    options = ("--start", 6, "--acquire", 20, "--rounds", 3)
    assert simulate(data, tmp_path / "rounds", *options) == 0
    assert [line["labels"] for line in lines_of(tmp_path / "rounds")] == [6, 18]


def test_unlabelled_rows_may_teach_where_the_score_allows_it(data: str, tmp_path: Path) -> None:
    options = ("--unlabelled-share", 0.5, "--score", "margin", "--rounds", 1)
    assert simulate(data, tmp_path / "rounds", *options) == 0
    run = Run.open(tmp_path / "rounds" / "round-01")
    assert run.config.unlabelled_share == 0.5
    assert lines_of(tmp_path / "rounds")[1]["labels"] == 11


class Killed(BaseException):
    """As SIGKILL: nothing after it happens."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["trained", "before the line", "after the line", "drawing"])
def test_a_loop_that_ended_between_two_steps_goes_on(
    done: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "rounds"
    write, calls = Rounds.write_lines, []

    def kill(*_: object) -> Any:
        raise Killed

    def kill_at_the_second(self: Rounds, lines: Any) -> None:
        calls.append(0)
        if place == "after the line":
            write(self, lines)
        if len(calls) == 2:
            raise Killed
        if place == "before the line":
            write(self, lines)

    with monkeypatch.context() as patch:
        if place == "trained":
            patch.setattr(_Loop, "_judge", kill)
        elif place == "drawing":
            patch.setattr(_Loop, "_draw", kill)
        else:
            patch.setattr(Rounds, "write_lines", kill_at_the_second)
        with pytest.raises(Killed):
            simulate(data, folder)
    shutil.move(folder, tmp_path / "moved")  # which is no other simulation
    assert simulate(data, tmp_path / "moved") == 0
    for name in ("rounds.jsonl", "labels-00.tsv", "labels-01.tsv", "labels-02.tsv"):
        assert (tmp_path / "moved" / name).read_bytes() == (done / name).read_bytes()


def test_a_finished_loop_is_only_drawn_again(done: Path, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "rounds"
    shutil.copytree(done, folder)
    (folder / "rounds.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    assert simulate(data, folder) == 0
    assert (folder / "rounds.png").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def refused(words: str, capfd: Any, *options: object) -> None:
    capfd.readouterr()
    assert select(*options) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rounds", "3"), "--rounds is 3 and the rounds in"),
        (("--acquire", "6"), "--acquire is 6 and the rounds in"),
        (("--start", "7"), "--start is 7 and"),
        (("--score", "margin"), "were begun with mutual_information: give --score"),
        (("--how", "topk"), "--how is topk"),
        (("--lr", "0.2"), "--lr is 0.2"),
        (("--seed", "4"), "--seed is 4"),
    ],
)
def test_options_may_not_change(
    done: Path, data: str, capfd: Any, options: tuple[str, ...], words: str
) -> None:
    before = (done / "rounds.jsonl").read_bytes()
    refused(words, capfd, *LOOP, "--data", data, *TRAINING.split(), "--out", done, *options)
    assert (done / "rounds.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--labels", "a.tsv"), "--labels means nothing with --simulate"),
        (("--labels-per-class", "2"), "--labels-per-class means nothing with --simulate"),
        (("--label-noise", "0.2"), "--label-noise means nothing with --simulate"),
        (("--start", "49"), "has 48 training rows with a label: give at most that"),
        (("--start", "0"), "--start is 0"),
        (("--acquire", "0"), "--acquire is 0"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--unlabelled-share", "0.5"), "towards 0: give --score margin"),
        (("--arch", "mlp_8", "--cohort", "1", "--method", "independent"), "give --score margin"),
        (("--no-simulate",), "exclude each other"),
        (("--arch", "resnet8"), "resnet8"),
    ],
)
def test_bad_options(
    data: str, tmp_path: Path, capfd: Any, options: tuple[str, ...], words: str
) -> None:
    out = tmp_path / "rounds"
    refused(words, capfd, *LOOP, "--data", data, *TRAINING.split(), "--out", out, *options)
    assert not (out / "rounds.jsonl").exists()


def test_no_folder(data: str, capfd: Any) -> None:
    refused("give it with --out", capfd, *LOOP, "--data", data, *TRAINING.split())


def test_data_that_cannot_be_compared(tmp_path: Path, capfd: Any) -> None:
    split = np.array(["train"] * 48 + ["val"] * 24)
    data = blobs(tmp_path / "rows.npz", split=split)
    out = tmp_path / "rounds"
    refused("has no test split", capfd, *LOOP, "--data", data, *TRAINING.split(), "--out", out)
    people = f"market1501:{make_market(tmp_path / 'market')}"
    refused("has identities", capfd, *LOOP, "--data", people, "--cohort", 2, "--out", out)


def test_several_processes(
    data: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Launch(rank=0, size=2, local_rank=0, local_size=2, restarts=0, agent_store=False)
    monkeypatch.setattr(Launch, "from_environment", lambda: two)
    out = ("--out", tmp_path / "rounds")
    refused("there are 2: start one", capfd, *LOOP, "--data", data, *TRAINING.split(), *out)


def test_folders_that_are_taken(done: Path, data: str, tmp_path: Path, capfd: Any) -> None:
    command = (*LOOP, "--data", data, *TRAINING.split(), "--out")
    refused("holds a run: give another folder", capfd, *command, done / "round-00")
    (tmp_path / "file").touch()
    refused("cannot be written", capfd, *command, tmp_path / "file")
    with locked(done, lambda: None):
        refused("another process works on the rounds in", capfd, *command, done)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("rounds.jsonl", ("{", "["), "is damaged"),
        ("rounds.jsonl", ('"round": 1', '"round": 2'), "its line 2 is of round 2"),
        ("rounds.jsonl", ('"row ', '"column '), "no row of the data is called"),
        ("rounds.jsonl", ('"labels": 11', '"labels": "11"'), "labels is '11'"),
        ("simulation.json", ('"plan"', '"plane"'), "has no plan"),
        ("simulation.json", ('"start"', '"begin"'), "is damaged"),
        ("simulation.json", ('"batch_size"', '"batch"'), "unknown key 'batch'"),
    ],
)
def test_damaged_files_are_named(
    done: Path,
    data: str,
    tmp_path: Path,
    capfd: Any,
    name: str,
    change: tuple[str, str],
    words: str,
) -> None:
    folder = tmp_path / "rounds"
    shutil.copytree(done, folder)
    text = (folder / name).read_text()
    assert change[0] in text
    (folder / name).write_text(text.replace(*change))
    command = (*LOOP, "--data", data, *TRAINING.split(), "--out", folder)
    refused(words, capfd, *command)
