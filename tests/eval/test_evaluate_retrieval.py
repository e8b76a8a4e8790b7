"""A re-identification cohort from the command line: trained, resumed, evaluated, exported."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blank_curves import drawn
from market_cases import make_market, save
from PIL import Image
from retrieval_cases import as_json, embeddings, oracle, refusal, set_oracle

from dml_fast import cli, report
from dml_fast.data import RetrievalSet, open_dataset
from dml_fast.eval import rank_sets
from dml_fast.evaluate import main
from dml_fast.export import main as export
from dml_fast.runs.weights import load_student
from dml_fast.train import main as train

OPTIONS = (
    "--arch resnet8,mobilenet_v1 --epochs 2 --batch-size 16 --image-size 0 --device cpu "
    "--val-fraction 0.25 --triplet-weight 0.5 --random-erasing 0.5 --label-smoothing 0.1"
)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_market(tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="module")
def folder(market: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retrieval") / "run"
    with drawn():
        assert not train([*OPTIONS.split(), "--data", f"market1501:{market}", "--out", str(path)])
    return path


@pytest.mark.slow
def test_each_epoch_has_the_map_and_rank_1_of_students_and_ensemble(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        for student in line["students"]:
            assert 0 < student["val_mAP"] <= 1 and 0 <= student["val_rank1"] <= 1
            assert student["triplet"] >= 0
            whole = student["ce"] + student["kl"] + 0.5 * student["triplet"]
            assert student["loss"] == pytest.approx(whole, rel=1e-5)
        assert 0 < line["ensemble_val_mAP"] <= 1 and 0 <= line["ensemble_val_rank1"] <= 1
    assert (folder / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "val"])
def test_scores_are_those_of_an_independent_evaluation(
    folder: Path, market: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_dataset(f"market1501:{market}", val_fraction=0.25)
    images = getattr(data, split)
    result = as_json(capsys, folder, "--split", split, "--checkpoint", "last", "--batch-size", 7)
    found = [*result["students"], result["ensemble"]]
    for scores, f in zip(found, embeddings(folder, images), strict=True):
        expected = oracle(f, images)
        assert 0 < expected["mAP"] < 1  # else there is little to compare
        assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    q = images.queries
    assert (result["queries"], result["gallery"]) == (q, len(images) - q)


def test_the_best_checkpoint_gives_the_scores_of_its_epoch(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = as_json(capsys, folder, "--split", "val")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    line = max(lines, key=lambda row: sum(s["val_mAP"] for s in row["students"]))
    assert result["epoch"] == line["epoch"]
    assert [s["mAP"] for s in result["students"]] == [s["val_mAP"] for s in line["students"]]
    assert [s["rank1"] for s in result["students"]] == [s["val_rank1"] for s in line["students"]]
    assert result["ensemble"]["mAP"] == line["ensemble_val_mAP"]


@pytest.mark.slow
def test_a_run_in_bf16_is_evaluated_as_it_was_validated(
    market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Depthwise convolutions, which a CPU computes in fp32, included."""
    out = tmp_path / "run"
    options = [*OPTIONS.split(), "--arch", "mobilenet_v1,mobilenet_v1", "--epochs", "1", "--amp"]
    assert train([*options, "--data", f"market1501:{market}", "--out", str(out)]) == 0
    line = json.loads((out / "metrics.jsonl").read_text())
    result = as_json(capsys, out, "--split", "val")
    assert [s["mAP"] for s in result["students"]] == [s["val_mAP"] for s in line["students"]]


@pytest.mark.slow
def test_the_table_and_the_ranked_lists(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "lists.png"
    result = as_json(capsys, folder, "--rerank")
    plain = as_json(capsys, folder)
    assert result["reranked"] and not plain["reranked"]
    assert result["ensemble"]["mAP"] != plain["ensemble"]["mAP"]
    assert main([str(folder), "--rerank", "--ranked-lists", "3", "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    for scores in (*result["students"], result["ensemble"]):
        assert f"{100 * scores['mAP']:.2f}" in printed and f"{100 * scores['rank5']:.2f}" in printed
    assert "5 queries, re-ranked" in printed and str(picture) in printed
    assert min(Image.open(picture).size) > 200


def test_a_place_for_the_picture_that_cannot_be_is_known_before(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dml_fast.eval.of_run.evaluate_retrieval", None)
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "new" / "a.png", Path("/proc/nowhere/a.png")):
        said = refusal(capsys, folder, "--ranked-lists", 2, "--out", out)
        assert f"{out} cannot be written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("glyph")])
def test_a_picture_that_fails_does_not_lose_the_scores(
    error: Exception,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("dml_fast.reporting.ranked_lists.lists_figure", fail)
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    out = tmp_path / "lists.png"
    result = as_json(capsys, folder, "--ranked-lists", 2, "--out", out)
    assert result["ranked_lists"] is None and result["ensemble"]["mAP"] > 0
    assert f"{out}: not written" in caplog.text
    assert not list(tmp_path.iterdir())


def test_another_markets_identities_are_searched_for_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_market(tmp_path, learned=4, searched=8)
    result = as_json(capsys, folder, "--data", f"market1501:{tmp_path}")
    assert result["queries"] == 8
    assert "learned identities: give data with identities" in refusal(
        capsys, folder, "--data", "digits"
    )


@pytest.mark.slow
def test_a_report_of_runs_that_learn_identities(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(folder), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda row: sum(s["val_mAP"] for s in row["students"]))
    assert "mAP" in text and f" {100 * best['ensemble_val_mAP']:.2f} |" in text
    digits = tmp_path / "digits"
    options = "--arch resnet8 --epochs 1 --train-fraction 0.1 --device cpu"
    assert train([*options.split(), "--out", str(digits)]) == 0
    capsys.readouterr()
    assert cli.run(report.main, [str(folder), str(digits), "--out", str(tmp_path)]) == 2
    assert "judged by mAP and digits by accuracy: report them apart" in capsys.readouterr().err


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other identities, with several queries of one camera, and three distractors."""
    path = make_market(tmp_path_factory.mktemp("album"), learned=4, searched=8)
    for frame, (pid, cam) in enumerate([(101, 1), (101, 1), (102, 1), (103, 2), (103, 2)], 900):
        save(path / "query", pid, cam, frame)
    for frame in (910, 911):
        save(path / "bounding_box_test", 0, 2, frame)
    return path


@pytest.mark.parametrize(
    ("options", "how", "t", "protocol"),
    [
        ("", "centroid", 0.05, "market1501"),
        ("--reduction mutual_information", "mutual_information", 0.05, "market1501"),
        ("--reduction mutual_information --temperature 0.4 --protocol all",
         "mutual_information", 0.4, "all"),
    ],
)  # fmt: skip
def test_sets_are_searched_for_as_by_loops(
    options: str, how: str, t: float, protocol: str, folder: Path, album: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    images = open_dataset(f"market1501:{album}", val_fraction=0.25).test
    assert isinstance(images, RetrievalSet)
    arguments = (folder, "--data", f"market1501:{album}", "--checkpoint", "last", "--sets")
    result = as_json(capsys, *arguments, *options.split())
    for scores, f in zip(
        [*result["students"], result["ensemble"]],
        embeddings(folder, images, unit=how != "centroid"),
        strict=True,
    ):
        expected = set_oracle(f, images, how, t, camera_rule=protocol != "all")
        assert 0 < expected["mAP"] < 1
        assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert result["protocol"] == protocol and result["n_valid"] == 9
    assert result["sets"] == {
        "reduction": how,
        "temperature": None if how == "centroid" else t,
        "queries": 9,
        "gallery": 8 + 3,
    }


def test_the_table_of_sets(folder: Path, album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"market1501:{album}"
    assert main([str(folder), "--data", data, "--sets", "--reduction", "log_sum_exp"]) == 0
    printed = capsys.readouterr().out
    assert "sets by log_sum_exp at temperature 0.05, %" in printed
    assert "(13 queries in 9 sets, 44 gallery in 11 sets)" in printed
    assert as_json(capsys, folder)["sets"] is None


def test_a_gallery_of_one_set_is_told_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    make_market(tmp_path, learned=4, searched=1)
    next((tmp_path / "bounding_box_test").glob("0000_*")).unlink()
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    rule = ["--sets", "--reduction", "mutual_information"]
    result = as_json(capsys, folder, "--data", f"market1501:{tmp_path}", *rule)
    assert result["sets"]["gallery"] == 1
    assert "the gallery is one set" in caplog.text
    assert not [w for w in recwarn if "one set" in str(w.message)]


def test_sets_of_a_run_that_was_validated_by_cuhk03(
    folder: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    written = (run / "config.json").read_text()
    (run / "config.json").write_text(written.replace('"market1501"', '"cuhk03"'))
    state = torch.load(run / "best.pt", weights_only=True)
    config = state["config"].replace('"market1501"', '"cuhk03"')
    torch.save({**state, "config": config}, run / "best.pt")
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)
    with caplog.at_level(logging.INFO, "dml_fast"):
        result = as_json(capsys, run, "--data", f"market1501:{album}", "--sets")
    assert result["protocol"] == "market1501"
    assert "sets are ranked by protocol market1501: cuhk03 counts one image" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--reduction centroid --temperature 0.1 --sets", "--temperature means nothing with"),
        ("--reduction mean", "--reduction goes with --sets: add that, or leave it out"),
        ("--temperature 0.1", "--temperature goes with --sets: add that, or leave it out"),
        ("--sets --reduction mean --temperature 0", "--temperature is 0.0: give a number above 0"),
        ("--sets --temperature nan", "--temperature is nan: give a number above 0"),
        ("--sets --rerank", "--rerank ranks single images, and --sets sets of them"),
        ("--sets --ranked-lists 2", "--ranked-lists ranks single images, and --sets sets of them"),
        ("--sets --hamming", "--hamming ranks single images, and --sets sets of them"),
        ("--sets --protocol cuhk03", "--protocol cuhk03 counts one image of each identity"),
        ("--sets --split train", "the train split has no queries: give --split test or val"),
    ],
)
def test_what_does_not_go_with_sets(
    options: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, folder, *options.split())


@pytest.mark.parametrize("kind", ["pt2", "safetensors"])
def test_what_is_exported_gives_embeddings(
    folder: Path, market: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"student.{kind}"
    options = ["--student", "0", "--checkpoint", "last", "--format", kind, "--out", str(out)]
    assert export([str(folder), *options]) == 0
    assert "largest difference of embeddings" in capsys.readouterr().out
    if kind == "safetensors":
        assert load_student(out)[1]["task"] == "retrieval"
        return
    data = open_dataset(f"market1501:{market}", val_fraction=0.25)
    assert isinstance(data.test, RetrievalSet)
    mean, std = (np.reshape(v, (1, -1, 1, 1)) for v in (data.mean, data.std))
    x = torch.from_numpy(((data.test.images / 255 - mean) / std).astype(np.float32))
    f = torch.export.load(out).module()(x).detach().double().numpy()
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    np.testing.assert_allclose(f, embeddings(folder, data.test)[0], atol=1e-5)
    q, pids, cams = data.test.queries, data.test.labels, data.test.cams
    rule = {"reduction": "mutual_information", "temperature": 0.05, "junk_pid": -1}
    ranked = rank_sets(
        f[:q], f[q:], pids[:q], pids[q:], cams[:q], cams[q:], g_sets=pids[q:],
        q_sets=[10 * pid + cam for pid, cam in zip(pids[:q], cams[:q], strict=True)], **rule,
    )  # fmt: skip
    options = ["--checkpoint", "last", "--sets", "--reduction", "mutual_information"]
    assert ranked.mAP == pytest.approx(as_json(capsys, folder, *options)["students"][0]["mAP"])


def test_a_diverged_student_is_left_out_and_the_others_still_search(
    folder: Path, market: Path
) -> None:
    from dml_fast.data.loaders import evaluation_batches
    from dml_fast.engine.precision import Precision
    from dml_fast.eval.retrieval import evaluate_retrieval

    data = open_dataset(f"market1501:{market}", val_fraction=0.25)
    assert isinstance(data.val, RetrievalSet)
    models = [load_student(path)[0] for path in sorted(folder.glob("student_?.safetensors"))]
    models[0].neck.running_mean.fill_(torch.nan)  # type: ignore[union-attr,operator]

    def found(some: list[torch.nn.Module]) -> Any:
        batches = evaluation_batches(
            data.val, batch_size=9, mean=data.mean, std=data.std, device="cpu"
        )
        precision = Precision(torch.device("cpu"))
        return evaluate_retrieval(some, batches, data.val, precision)  # type: ignore[arg-type]

    both, alone = found(models), found(models[1:])
    assert both.students[0] is None
    assert both.students[1].mAP == alone.students[0].mAP == both.ensemble.mAP
    none = found(models[:1])
    assert none.students == (None,) and none.ensemble is None


def test_arguments_that_do_not_go_together(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = (tmp_path / "q.npz", tmp_path / "g.npz")
    assert "give the folder of a run, or --features" in refusal(capsys)
    assert "give the folder of a run, or --features" in refusal(
        capsys, folder, "--features", *paths
    )
    assert "--ranked-lists goes with a run" in refusal(
        capsys, "--features", *paths, "--ranked-lists", 2
    )
    assert "--sets goes with a run" in refusal(capsys, "--features", *paths, "--sets")
    assert "--reduction goes with --sets" in refusal(
        capsys, "--features", *paths, "--reduction", "min"
    )
    assert "--metric goes with --features" in refusal(capsys, folder, "--metric", "euclidean")
    assert "--ranked-lists is -1" in refusal(capsys, folder, "--ranked-lists", -1)
    assert "has no queries: give --split test or val" in refusal(capsys, folder, "--split", "train")
    digits = tmp_path / "digits"
    options = "--arch resnet8 --epochs 1 --train-fraction 0.1 --device cpu"
    assert train([*options.split(), "--out", str(digits)]) == 0
    assert "--rerank ranks, and" in refusal(capsys, digits, "--rerank")
    assert "--sets ranks, and" in refusal(capsys, digits, "--sets")
    assert "learned classes: give data with classes" in refusal(
        capsys, digits, "--data", json.loads((folder / "config.json").read_text())["config"]["data"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-instances 3", "--num-instances is 3 and --batch-size 64"),
        ("--triplet-weight 1 --num-instances 0", "needs several images of an identity"),
        ("--image-size 16x", "give pixels (64), or height x width (128x64)"),
        ("--image-size 0x16", "give pixels (64), or height x width (128x64)"),
        ("--image-size 60000x60000", "choose a smaller --image-size or use fewer images"),
        ("--data-threads 99999999999999999999", "give a whole number from 0 to 1024"),
        ("--random-erasing 2", "--random-erasing is 2.0: give a number from 0 to 1"),
        ("--batch-size 128", "needs 32 identities to train on"),
        ("--pretrained timm --arch resnet8", "--pretrained timm has no weights for resnet8"),
    ],
)
def test_options_that_cannot_work(
    market: Path, options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    where = ["--data", f"market1501:{market}", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.run(train, [*where, *options.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_identities_options_mean_nothing_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(train, ["--triplet-weight", "1", "--out", str(tmp_path / "run")]) == 2
    assert "--triplet-weight means nothing with --data digits" in capsys.readouterr().err
