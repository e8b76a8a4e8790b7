"""``python -m dml_fast.select RUN``: rows to label, and labels to doubt, of a finished run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import tree
from run_cases import reconfigure
from selection_cases import CLASSES, blobs, select, table, train

from dml_fast.data.label_files import LabelFile
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained, open_data
from dml_fast.select import acquire, pool_scores
from dml_fast.selection.committee import Committee

HEADER = ["name", "score", "predicted", "probability"]
SUPERVISED = ("--unlabelled-share", "0")


@pytest.fixture(autouse=True)
def as_without_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process has given the logger a handler, which prints to another stderr."""
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("dml_fast"), "handlers", [])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 rows to train on, of which the last 30 have no label."""
    return blobs(tmp_path_factory.mktemp("rows") / "rows.npz", unlabelled=30)


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run", "--data", data, *SUPERVISED)


@pytest.fixture(scope="module")
def noisy(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the 18 rows with a label, 6 of which are wrong."""
    folder = tmp_path_factory.mktemp("noisy") / "run"
    return train(folder, "--data", data, *SUPERVISED, "--label-noise", "0.34", "--epochs", "6")


def logits_of(run: Path, rows: slice) -> Any:
    """(K, n, C) by each student's network alone, and the names of these training rows."""
    train_rows = open_data(Run.open(run), unlabelled=True).train
    x = torch.from_numpy(train_rows.views[0][rows])  # type: ignore[union-attr]
    trained = Trained.load(Run.open(run), "best")
    with torch.inference_mode():
        z = [trained.model(k)(x).numpy() for k in range(3)]
    return np.stack(z), list(train_rows.names)[rows]


def test_next_rows_are_unlabelled_ones_best_first(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "next.tsv"
    assert select(run, "--acquire", 5, "--how", "topk", "--out", out) == 0
    z, names = logits_of(run, slice(18, 48))
    scores = pool_scores(z).mutual_information
    header, *rows = table(out)
    assert header == HEADER
    chosen = acquire(scores, 5, how="topk")
    assert [row[0] for row in rows] == [names[i] for i in chosen]
    mean = torch.from_numpy(z).double().softmax(-1).mean(0).numpy()
    for (_, score, predicted, probability), i in zip(rows, chosen, strict=True):
        assert float(score) == pytest.approx(scores[i], rel=1e-4)
        assert predicted == CLASSES[mean[i].argmax()]
        assert float(probability) == pytest.approx(mean[i].max(), rel=1e-4)


@pytest.mark.parametrize("score", ["entropy", "margin"])
def test_other_scores(run: Path, tmp_path: Path, score: str) -> None:
    out = tmp_path / "next.tsv"
    assert select(run, "--acquire", 4, "--score", score, "--how", "topk", "--out", out) == 0
    z, names = logits_of(run, slice(18, 48))
    best = acquire(getattr(pool_scores(z), score), 4, how="topk")
    assert [row[0] for row in table(out)[1:]] == [names[i] for i in best]


def test_a_draw_is_repeated_by_its_seed(run: Path, tmp_path: Path) -> None:
    found = {}
    for case in ("--seed 1", "--seed 1 ", "--seed 2", "--score random", "--score random --seed 3"):
        out = tmp_path / "next.tsv"
        assert select(run, "--acquire", 8, *case.split(), "--out", out) == 0
        found[case] = [row[0] for row in table(out)[1:]]
    assert found["--seed 1"] == found.pop("--seed 1 ")
    assert len({tuple(names) for names in found.values()}) == 4


@pytest.mark.slow
def test_a_draw_does_not_depend_on_which_other_rows_have_a_label(
    run: Path, data: str, tmp_path: Path
) -> None:
    """So a row that was drawn early and left unlabelled is still early."""
    more = tmp_path / "labels.tsv"
    more.write_text("".join(f"row {i}\t{CLASSES[i % 3]}\n" for i in range(10)))
    fewer = train(tmp_path / "run", "--data", data, *SUPERVISED, "--labels", str(more))
    names = []
    for folder, count in ((run, 30), (fewer, 38)):
        random = ("--score", "random", "--how", "topk", "--acquire", count)
        assert select(folder, *random, "--out", tmp_path / "next.tsv") == 0
        names.append([row[0] for row in table(tmp_path / "next.tsv")[1:]])
    assert names[0] == [name for name in names[1] if name in names[0]]


def test_more_than_the_pool_holds_is_all_of_it(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert select(run, "--acquire", 99, "--out", tmp_path / "next.tsv") == 0
    assert "99 rows were asked for and there are 30: all are chosen" in caplog.text
    names = {row[0] for row in table(tmp_path / "next.tsv")[1:]}
    assert names == {f"row {i}" for i in range(18, 48)}


def test_rows_on_the_standard_output(run: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert select(run, "--acquire", 2, "--out", "-") == 0
    output, words = capfdbinary.readouterr()
    assert len(output.decode().splitlines()) == 3
    assert words.decode().startswith("2 of 30 rows without a label, by mutual_information, power;")


def test_what_was_written_is_said(run: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "next.tsv"
    assert select(run, "--acquire", 2, "--checkpoint", "last", "--out", out) == 0
    line = f"wrote {out}: 2 of 30 rows without a label, by mutual_information, power; 3 students; "
    assert capfd.readouterr().out == f"{line}last.pt of {run}; fp32 on cpu\n"


@pytest.mark.slow
def test_names_stand_in_one_line(tmp_path: Path) -> None:
    """A tab in a file's name is escaped, as --labels reads it."""
    images = tree(tmp_path / "images")
    (images / "train" / "unlabelled").mkdir()
    for path in (images / "test" / "class 1").iterdir():
        shutil.copy(path, images / "train" / "unlabelled" / f"a\t{path.name}")
    options = ("--data", f"folder:{images}", "--arch", "resnet8,resnet8", *SUPERVISED)
    folder = train(tmp_path / "run", *options)
    assert select(folder, "--acquire", 3, "--out", tmp_path / "next.tsv") == 0
    chosen = table(tmp_path / "next.tsv")[1:]
    assert all(len(row) == 4 for row in chosen)
    assert all(row[0].startswith("train/unlabelled/a\\t") for row in chosen)
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"{row[0]}\tclass 1\n" for row in chosen))
    names = open_data(Run.open(folder), unlabelled=True).train.names
    assert (LabelFile(labels, ("class 0", "class 1")).of(names) == 1).sum() == 3


def test_students_that_give_no_numbers(run: Path) -> None:
    committee = Committee.load(Run.open(run), "best", device="cpu")
    train_rows, pool = open_data(Run.open(run), unlabelled=True).train, np.arange(18, 48)
    two = Committee(
        run=committee.run,
        trained=committee.trained,
        models=committee.models[1:],
        precision=committee.precision,
        batch_size=7,
    ).ask(train_rows, pool)
    with torch.no_grad():
        next(committee.models[0].parameters()).fill_(torch.nan)
    three = committee.ask(train_rows, pool)
    np.testing.assert_allclose(three.scores.entropy, two.scores.entropy, rtol=1e-5)
    np.testing.assert_array_equal(three.predicted, two.predicted)
    for model in committee.models:
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
    none = committee.ask(train_rows, pool)
    assert (none.predicted == -1).all()
    assert np.isnan([*none.scores, none.probability]).all()


def test_rows_that_nobody_can_score_are_written_without_numbers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Committee.ask

    def without_the_first(self: Committee, part: Any, rows: Any) -> Any:
        found = ask(self, part, rows)
        for values in (*found.scores, found.probability):
            values[0] = np.nan
        found.predicted[0] = -1
        return found

    monkeypatch.setattr(Committee, "ask", without_the_first)
    assert select(run, "--acquire", 30, "--out", tmp_path / "next.tsv") == 0
    assert table(tmp_path / "next.tsv")[-1] == ["row 18", "", "", ""]


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 16])
def test_suspects_are_the_most_doubtful_labels(
    noisy: Path, tmp_path: Path, capfd: Any, count: int
) -> None:
    out = tmp_path / "suspects.tsv"
    assert select(noisy, "--suspects", "--acquire", count, "--out", out) == 0
    z, names = logits_of(noisy, slice(0, 18))
    train_rows = open_data(Run.open(noisy)).train
    mean = torch.from_numpy(z).double().softmax(-1).mean(0).numpy()
    confidence = mean[np.arange(18), train_rows.labels]
    others = mean.copy()
    others[np.arange(18), train_rows.labels] = 0
    chosen = np.argsort(confidence - others.max(1), kind="stable")[:count]
    assert (others.max(1) < confidence)[chosen].any() == (count > 9)
    header, *rows = table(out)
    assert header == ["name", "label", "label_probability", "predicted", "probability"]
    assert [row[0] for row in rows] == [names[i] for i in chosen]
    assert [row[1] for row in rows] == [CLASSES[train_rows.labels[i]] for i in chosen]
    assert [row[3] for row in rows] == [CLASSES[mean[i].argmax()] for i in chosen]
    np.testing.assert_allclose([float(row[2]) for row in rows], confidence[chosen], rtol=1e-4)
    wrong = train_rows.labels != np.arange(18) % 3
    assert wrong.sum() == 6
    hits = int(wrong[chosen].sum())
    assert (
        f"labels that are not the data's own: {hits} of the {count} chosen ({hits / count:.1%}), "
        "6 of all 18 (33.3%)"
    ) in capfd.readouterr().out


def test_suspects_where_no_label_is_known_to_be_wrong(
    run: Path, tmp_path: Path, capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert select(run, "--suspects", "--acquire", 50, "--out", tmp_path / "all.tsv") == 0
    assert "labels that are not" not in capfd.readouterr().out
    assert "50 rows were asked for and there are 18: all are chosen" in caplog.text
    assert len(table(tmp_path / "all.tsv")) == 19


def refused(words: str, capfd: Any, *options: object) -> None:
    assert select(*options) == 2
    error = capfd.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_run_of_which_every_row_has_a_label(tmp_path: Path, capfd: Any) -> None:
    folder = train(tmp_path / "run", "--data", blobs(tmp_path / "rows.npz"))
    refused("has a label, so there is none to choose", capfd, folder, "--out", tmp_path / "a.tsv")
    assert not (tmp_path / "a.tsv").exists()


@pytest.mark.slow
def test_one_student_cannot_disagree(data: str, tmp_path: Path, capfd: Any) -> None:
    alone = ("--arch", "mlp_8", "--cohort", "1", "--method", "independent")
    folder = train(tmp_path / "run", "--data", data, *SUPERVISED, *alone)
    out = tmp_path / "next.tsv"
    refused("has one: give --score margin", capfd, folder, "--out", out)
    assert select(folder, "--score", "margin", "--out", out) == 0


@pytest.mark.slow
def test_students_that_were_trained_to_agree_on_the_pool(
    data: str, tmp_path: Path, capfd: Any
) -> None:
    """See 0.6: their mutual information is what training brings down."""
    folder = train(tmp_path / "run", "--data", data)
    assert Run.open(folder).config.unlabelled_share == 0.67
    out = tmp_path / "next.tsv"
    refused("towards 0: give --score margin", capfd, folder, "--out", out)
    assert select(folder, "--score", "margin", "--out", out) == 0
    assert len(table(out)) == 21


@pytest.mark.slow
def test_rows_that_got_a_label_since_are_left_out(data: str, tmp_path: Path, capfd: Any) -> None:
    """A person has labelled some rows of the last choice, and not trained again."""
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"row {i}\t{CLASSES[i % 3]}\n" for i in range(12)))
    folder = train(tmp_path / "run", "--data", data, *SUPERVISED, "--labels", str(labels))
    with labels.open("a") as file:
        file.write("row 20\tash\nrow 47\tcedar\n")
    assert select(folder, "--acquire", 50, "--out", tmp_path / "next.tsv") == 0
    names = {row[0] for row in table(tmp_path / "next.tsv")[1:]}
    assert names == {f"row {i}" for i in range(12, 48)} - {"row 20", "row 47"}
    assert (
        f"2 rows have a label in {labels} since the run was trained: left out"
        in capfd.readouterr().err
    )
    labels.unlink()
    assert select(folder, "--acquire", 50, "--out", tmp_path / "next.tsv") == 0
    assert len(table(tmp_path / "next.tsv")) == 37


@pytest.mark.slow
def test_data_that_have_changed(tmp_path: Path, capfd: Any) -> None:
    data = blobs(tmp_path / "rows.npz", unlabelled=30)
    folder = train(tmp_path / "run", "--data", data, *SUPERVISED)
    blobs(tmp_path / "rows.npz", unlabelled=20)
    refused("or train again with the new ones", capfd, folder, "--out", tmp_path / "next.tsv")


def test_a_run_that_learned_identities(run: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    reconfigure(folder, data="market1501:somewhere")
    refused("learned identities", capfd, folder, "--out", tmp_path / "next.tsv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "a.tsv"), "give the folder of a run, or --simulate"),
        (("RUN",), "give --out FILE.tsv"),
        (("RUN", "--acquire", "0", "--out", "a.tsv"), "--acquire is 0"),
        (("RUN", "--seed", "-1", "--out", "a.tsv"), "--seed is -1"),
        (("RUN", "--batch-size", "0", "--out", "a.tsv"), "--batch-size is 0"),
        (("RUN", "--suspects", "--score", "margin", "--out", "a.tsv"), "--score means nothing"),
        (("RUN", "--suspects", "--how", "topk", "--out", "a.tsv"), "--how means nothing"),
        (("RUN", "--out", "FOLDER"), "cannot be written"),
        (("RUN", "--checkpoint", "previous", "--device", "cuda:99", "--out", "a"), "cuda"),
        (("FOLDER", "--out", "a.tsv"), "is not a run folder"),
    ],
)
def test_bad_arguments(
    run: Path, tmp_path: Path, capfd: Any, options: tuple[str, ...], words: str
) -> None:
    places = {"RUN": run, "FOLDER": tmp_path}
    refused(words, capfd, *(places.get(option, option) for option in options))
