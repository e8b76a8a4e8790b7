"""Searches by other protocols, and without cameras: trained, validated and evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from market_cases import make_market
from retrieval_cases import as_json, embeddings, oracle, refusal

from dml_fast import cli
from dml_fast.data import RetrievalSet, open_dataset
from dml_fast.train import main as train

OPTIONS = (
    "--arch resnet8 --epochs 1 --batch-size 16 --image-size 0 --device cpu --val-fraction 0.25"
)


def trained(market: Path, out: Path, *more: str) -> Path:
    arguments = [*OPTIONS.split(), "--data", f"market1501:{market}", "--out", str(out), *more]
    assert train(arguments) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], market: Path, *more: str) -> str:
    capsys.readouterr()
    out = market / "run"
    arguments = [*OPTIONS.split(), "--data", f"market1501:{market}", "--out", str(out), *more]
    assert cli.run(train, arguments) == 2
    assert not out.exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "camera_rule" not in last and "k1" not in last
    return last


@pytest.fixture(scope="module")
def one_camera(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    market = make_market(tmp_path_factory.mktemp("market"), cameras=(1,), first=0)
    return market, trained(market, market / "run", "--val-protocol", "all")


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_run_without_cameras_is_evaluated_as_it_was_validated(
    one_camera: tuple[Path, Path], split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    market, folder = one_camera
    data = open_dataset(f"market1501:{market}", val_fraction=0.25, camera_rule=False)
    images = getattr(data, split)
    result = as_json(capsys, folder, "--split", split, "--checkpoint", "last")
    assert result["protocol"] == "all" and result["n_valid"] == result["queries"]
    found = [*result["students"], result["ensemble"]]
    for scores, f in zip(found, embeddings(folder, images), strict=True):
        expected = oracle(f, images, camera_rule=False)
        assert 0 < expected["mAP"] < 1
        assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    if split == "val":
        line = json.loads((folder / "metrics.jsonl").read_text())
        assert [s["val_mAP"] for s in line["students"]] == [s["mAP"] for s in result["students"]]


def test_a_run_is_ranked_by_the_protocol_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    market = make_market(tmp_path)
    folder = trained(market, tmp_path / "run")
    images = open_dataset(f"market1501:{market}", val_fraction=0.25).test
    assert isinstance(images, RetrievalSet)
    both = embeddings(folder, images)[-1]
    results = {
        name: as_json(capsys, folder, "--protocol", name, "--checkpoint", "last")
        for name in ("auto", "market1501", "cuhk03", "all")
    }
    assert results["auto"] == results["market1501"]
    for name, rule in (("market1501", True), ("all", False)):
        expected = oracle(both, images, camera_rule=rule)
        scores = results[name]["ensemble"]
        assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-6)
        assert results[name]["protocol"] == name
    cuhk, usual = results["cuhk03"]["ensemble"], results["market1501"]["ensemble"]
    assert cuhk["mAP"] == usual["mAP"] and cuhk["rank1"] > usual["rank1"]
    assert results["all"]["ensemble"]["mAP"] != usual["mAP"]


def test_a_set_whose_names_have_no_cameras_is_learned_and_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    market = make_market(tmp_path, cameras=(None,))
    folder = trained(market, tmp_path / "run")
    printed = "".join(map("".join, capsys.readouterr()))
    said = " ".join(printed.split())
    assert said.count("no file's name has a camera (_c1): cameras do not matter to searches") == 1
    lists = tmp_path / "lists.png"
    result = as_json(capsys, folder, "--ranked-lists", 2, "--out", lists)
    assert result["protocol"] == "all" and lists.stat().st_size > 1000
    assert as_json(capsys, folder, "--protocol", "cuhk03")["protocol"] == "cuhk03"
    other = make_market(tmp_path / "other", learned=2, shots=3, cameras=(None,))
    assert as_json(capsys, folder, "--data", f"market1501:{other}")["queries"] == 5


def test_what_cannot_be_searched_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_market(tmp_path / "one", cameras=(1,))
    assert "give --val-protocol all" in refused(capsys, one)
    assert refused(capsys, one, "--val-fraction", "0").endswith("or --val-protocol all")
    gallery = make_market(tmp_path / "gallery", test_cameras=(1,))
    said = refused(capsys, gallery)
    assert "query and bounding_box_test: no query has a valid match" in said
    assert said.endswith("or --val-protocol all")
    capsys.readouterr()
    assert cli.run(train, ["--val-protocol", "all", "--out", str(tmp_path / "x")]) == 2
    assert "--val-protocol means nothing with --data digits" in capsys.readouterr().err


def test_what_cannot_be_searched_is_refused_before_evaluation(
    one_camera: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = one_camera
    said = refusal(capsys, folder, "--protocol", "market1501")
    assert "same camera as all gallery images" in said and said.endswith("or --protocol all")
    few = make_market(tmp_path, learned=2, searched=2, shots=3)
    said = refusal(capsys, folder, "--data", f"market1501:{few}", "--rerank")
    assert "--rerank compares each image with its 20 nearest" in said and "only 8 images" in said
    said = refusal(capsys, folder, "--data", f"market1501:{few}", "--split", "val")
    assert said.endswith("(here --val-fraction is as the run was trained)")
    for path in (tmp_path / "query").iterdir():
        path.rename(path.with_name(f"7{path.name}"))
    said = refusal(capsys, folder, "--data", f"market1501:{few}")
    assert "none of the queries' identities is in the gallery" in said


def test_a_run_that_learned_classes_has_no_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {"--epochs": 1, "--train-fraction": 0.1, "--arch": "resnet8"}
    arguments = [str(x) for pair in options.items() for x in pair]
    assert train([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    assert "--protocol ranks, and" in refusal(capsys, out, "--protocol", "all")


def test_a_run_of_before_this_option_is_evaluated_by_market1501s_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(make_market(tmp_path), tmp_path / "run")
    now = as_json(capsys, folder)
    path = folder / "config.json"
    text = json.loads(path.read_text())
    del text["config"]["val_protocol"]
    path.write_text(json.dumps(text))
    assert as_json(capsys, folder) == now and now["protocol"] == "market1501"
    assert np.isfinite(now["ensemble"]["mAP"])
