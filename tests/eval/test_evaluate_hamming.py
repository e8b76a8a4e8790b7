"""``evaluate --hamming`` of runs with a hash head, and the codes that other commands give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from market_cases import make_market
from retrieval_cases import as_json, refusal
from vector_cases import CLASSES, two_views

from dml_fast.data import RetrievalSet, VectorSet
from dml_fast.eval import RankingResult, rank_distances
from dml_fast.evaluate import main
from dml_fast.export import main as export
from dml_fast.predict import main as predict
from dml_fast.runs import checkpoint
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import open_data
from dml_fast.runs.weights import load_student
from dml_fast.train import main as train

pytestmark = pytest.mark.usefixtures("as_without_training")

HASH = ["--head", "hash", "--bits", "12", "--mihash-bins", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two students that read two views, with some training rows without a label."""
    folder = tmp_path_factory.mktemp("hamming")
    data = two_views(folder / "rows.npz")
    options = ["--arch", "mlp_8", "--views", "levels", "--labels-per-class", "20", "--epochs", "4"]
    where = ["--data", f"vectors:{data}", "--out", str(folder / "run")]
    assert train([*options, "--batch-size", "16", *HASH, *where]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def plain(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without codes."""
    path = tmp_path_factory.mktemp("plain") / "run"
    options = ["--arch", "mlp_8", "--views", "levels", "--epochs", "1", "--device", "cpu"]
    assert train([*options, "--data", Run.open(vectors).config.data, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned identities."""
    folder = tmp_path_factory.mktemp("market")
    data = make_market(folder / "market")
    options = ["--arch", "resnet8", "--epochs", "1", "--batch-size", "16", "--image-size", "0"]
    where = ["--data", f"market1501:{data}", "--out", str(folder / "run")]
    assert train([*options, "--val-fraction", "0.25", *HASH, *where]) == 0
    return folder / "run"


def bits_of(run: Path, student: int, rows: torch.Tensor) -> np.ndarray:
    """The bits of a student at the run's end, (N, b) bool, without the code that packs them."""
    net, _ = load_student(run / f"student_{student}.safetensors")
    with torch.no_grad():
        return net.norm(net.project(net.backbone(rows))).numpy() > 0  # type: ignore[operator]


def expected(queries: np.ndarray, gallery: np.ndarray, *labels: Any, **how: Any) -> RankingResult:
    distances = (queries[:, None] != gallery[None]).sum(-1).astype(np.float64)
    return rank_distances(distances, *labels, ties="expected", **how)


def check_scores(found: dict[str, float], wanted: RankingResult) -> None:
    means = {"mAP": wanted.mAP, "mINP": wanted.mINP, "rank1": wanted.cmc[0]}
    assert 0.2 < wanted.mAP < 1 and wanted.n_tied > 0
    assert {name: found[name] for name in means} == pytest.approx(means, abs=1e-9)


@pytest.mark.parametrize(("split", "others"), [("test", ["train", "val"]), ("val", ["train"])])
def test_classes_search_among_training_and_validation_rows(
    vectors: Path, split: str, others: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(vectors)
    data = open_data(run)
    parts: dict[str, Any] = {name: getattr(data, name) for name in ("train", "val", "test")}
    labels = np.concatenate([parts[name].labels for name in others])
    known = labels >= 0
    assert (~known).sum() > 0
    result = as_json(capsys, vectors, "--hamming", "--split", split, "--checkpoint", "last")
    assert result["unlabelled"] == (~known).sum()
    assert (result["queries"], result["gallery"]) == (len(parts[split]), known.sum())
    assert result["images"] == len(parts[split]) and result["bits"] == 12
    bits = []
    for k in range(2):
        rows = {name: torch.from_numpy(parts[name].views[k]) for name in parts}
        gallery = torch.cat([rows[name] for name in others])[torch.from_numpy(known)]
        bits.append((bits_of(vectors, k, rows[split]), bits_of(vectors, k, gallery)))
    sides = [np.concatenate(side, axis=1) for side in zip(*bits, strict=True)]
    how = {"protocol": "all"}
    for found, (q, g) in zip(
        [*result["students"], result["ensemble"]], [*bits, sides], strict=True
    ):
        check_scores(found, expected(q, g, parts[split].labels, labels[known], **how))


def test_identities_search_in_their_gallery(
    market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = Run.open(market), tmp_path / "new" / "codes.npz"
    images = open_data(run, split="test").test
    assert isinstance(images, RetrievalSet) and images.cams is not None
    result = as_json(capsys, market, "--hamming", "--checkpoint", "last", "--codes", out)
    assert result["codes"] == str(out) and result["protocol"] == "market1501"
    q = images.queries
    facts = run.facts
    shape = (1, -1, 1, 1)
    mean, std = np.reshape(facts.mean, shape), np.reshape(facts.std, shape)
    pixels = torch.from_numpy(((images.pixels / 255 - mean) / std).astype(np.float32))
    bits = [bits_of(market, k, pixels) for k in range(2)]
    labels = (images.labels[:q], images.labels[q:], images.cams[:q], images.cams[q:])
    with np.load(out) as codes:
        arrays = {name: codes[name] for name in codes.files}
    assert arrays["bits"] == 12 and "classes" not in arrays
    for found, name, b in zip(
        [*result["students"], result["ensemble"]],
        ["0", "1", "ensemble"],
        [*bits, np.concatenate(bits, axis=1)],
        strict=True,
    ):
        check_scores(found, expected(b[:q], b[q:], *labels, junk_pid=-1))
        np.testing.assert_array_equal(arrays[f"query_codes_{name}"], np.packbits(b[:q], axis=1))
        np.testing.assert_array_equal(arrays[f"gallery_codes_{name}"], np.packbits(b[q:], axis=1))
    for part, rows in (("query", slice(q)), ("gallery", slice(q, None))):
        assert (arrays[f"{part}_pids"] == images.labels[rows]).all()
        assert (arrays[f"{part}_cams"] == images.cams[rows]).all()
        assert arrays[f"{part}_names"].tolist() == list(images.names[rows])


def test_validation_measures_codes(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the cosine of +1 and -1; among equal distances it takes one order."""
    [line] = [json.loads(line) for line in (market / "metrics.jsonl").read_text().splitlines()]
    result = as_json(capsys, market, "--split", "val")
    assert [s["mAP"] for s in result["students"]] == [s["val_mAP"] for s in line["students"]]
    found = as_json(capsys, market, "--split", "val", "--hamming")
    assert found["ensemble"]["mAP"] == pytest.approx(line["ensemble_val_mAP"], abs=0.1)


def test_an_exported_program_gives_the_same_codes(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "codes.npz"
    as_json(capsys, vectors, "--hamming", "--codes", out)
    test = open_data(Run.open(vectors)).test
    assert isinstance(test, VectorSet)
    arguments = [str(vectors), "--student", "1", "--format", "pt2", "--out"]
    assert export([*arguments, str(tmp_path / "s.pt2")]) == 0
    assert "largest difference of logits and codes" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "s.pt2").module()
    logits, codes = program(torch.from_numpy(test.views[1]))
    assert logits.shape == (len(test), 3) and codes.dtype == torch.uint8
    with np.load(out) as arrays:
        np.testing.assert_array_equal(codes.numpy(), arrays["query_codes_1"])
        np.testing.assert_array_equal(arrays["query_labels"], test.labels)
        assert arrays["classes"].tolist() == list(CLASSES)
        assert arrays["query_names"].tolist() == list(test.names)


def test_predicted_features_are_codes_that_evaluate_ranks(
    market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(Run.open(market).config.data.partition(":")[2])
    files = [tmp_path / f"{folder}.npz" for folder in ("query", "bounding_box_test")]
    for path in files:
        assert predict([str(market), str(data / path.stem), *common(path)]) == 0
    with np.load(files[0]) as query:
        assert query["features"].dtype == np.uint8 and query["features"].shape == (5, 3)
        assert query["bits"] == 24
    capsys.readouterr()
    features = ["--features", *map(str, files), "--json"]
    assert main([*features, "--metric", "hamming"]) == 0
    ranked = json.loads(capsys.readouterr().out)
    result = as_json(capsys, market, "--hamming")
    assert ranked["n_valid"] == result["n_valid"]
    words = refusal(capsys, *features)
    assert "query.npz holds codes of bits" in words and "give --metric hamming" in words


def common(path: Path) -> list[str]:
    return ["--student", "ensemble", "--features", str(path), "--device", "cpu"]


def test_the_table_says_what_searched_among_what(
    vectors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = as_json(capsys, vectors, "--hamming")
    assert main([str(vectors), "--hamming"]) == 0
    printed = capsys.readouterr().out
    assert "codes of 12 bits by Hamming distance, test split, %" in printed
    assert f"60 rows of the test split of {result['data']}" in printed
    assert f"which search among the {result['gallery']} of train and val;" in printed
    assert f"{result['unlabelled']} without a label are left out" in printed
    for scores in (*result["students"], result["ensemble"]):
        assert f"{100 * scores['mAP']:.2f}" in printed


def test_a_student_without_finite_codes_is_left_out(
    vectors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = Path(shutil.copytree(vectors, tmp_path / "run"))
    out = tmp_path / "codes.npz"
    for students in ([0], [0, 1]):
        state = checkpoint.load(copy / "best.pt")
        for k in students:
            state["students"][k]["model"]["norm.weight"][0] = torch.nan
        (copy / "best.pt").unlink()
        torch.save(state, copy / "best.pt")
        if len(students) == 1:
            assert main([str(copy), "--hamming", "--codes", str(out)]) == 0
            assert "student 0's codes are not finite: it is left out" in caplog.text
            with np.load(out) as arrays:
                assert "query_codes_0" not in arrays
                assert (arrays["query_codes_ensemble"] == arrays["query_codes_1"]).all()
    assert "no student gives codes" in refusal(capsys, copy, "--hamming")


def test_what_does_not_go_together_is_refused(
    vectors: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, words in (
        ((plain, "--hamming"), f"the students of {plain} have a head of kind linear"),
        ((vectors, "--codes", "c.npz"), "--codes c.npz goes with --hamming: add that"),
        ((vectors, "--hamming", "--codes", "c.txt"), "--codes c.txt does not end in .npz"),
        ((vectors, "--hamming", "--codes", tmp_path / "file" / "c.npz"), "cannot be written"),
        ((vectors, "--hamming", "--rerank"), "--rerank goes with embeddings and not with --hamm"),
        ((vectors, "--hamming", "--protocol", "all"), "learned classes: leave it out"),
        ((vectors, "--hamming", "--ranked-lists", 2), "learned classes: leave it out"),
        (("--features", "a.npz", "b.npz", "--hamming"), "has none: give --metric hamming"),
    ):
        assert words in refusal(capsys, *arguments)
