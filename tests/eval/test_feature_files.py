"""Features in files: ranked from the command line; damaged, odd and missing arrays."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutations, outcome
from ranking_cases import Case, check
from retrieval_cases import as_json, refusal

from dml_fast.errors import UserError
from dml_fast.eval import RankingResult, rank_features, rank_hamming, rerank
from dml_fast.eval.feature_files import FeatureFile, rank_files
from dml_fast.evaluate import main


def feature_files(
    folder: Path, counts: tuple[int, int] = (12, 40), **changes: Any
) -> tuple[Path, Path]:
    """Queries and a gallery of Gaussian features, and of their signs as codes."""
    rng = np.random.default_rng(0)
    paths = []
    for name, count in zip("qg", counts, strict=True):
        pids = rng.integers(0, 5, count)
        centres = np.random.default_rng(1).standard_normal((5, 16))
        features = (centres[pids] + 1.5 * rng.standard_normal((count, 16))).astype(np.float32)
        arrays = {"features": features, "pids": pids, "cams": rng.integers(0, 3, count)}
        arrays |= {key: change(arrays) for key, change in changes.items()}
        paths.append(folder / f"{name}.npz")
        np.savez(paths[-1], **{k: v for k, v in arrays.items() if v is not None})
    return paths[0], paths[1]


def test_anybodys_features_are_ranked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = feature_files(tmp_path)
    q, g = (np.load(path) for path in paths)
    labels = (q["pids"], g["pids"], q["cams"], g["cams"])
    for metric in ("cosine", "euclidean"):
        for rank, flag in ((rank_features, ()), (rerank, ("--rerank",))):
            expected = rank(q["features"], g["features"], *labels, metric=metric)
            result = as_json(capsys, "--features", *paths, "--metric", metric, *flag)
            assert result == json.loads(expected.to_json())
    expected = rank_features(q["features"], g["features"], *labels, protocol="cuhk03")
    result = as_json(capsys, "--features", *paths, "--protocol", "cuhk03")
    assert result["cmc"] == expected.cmc.tolist()
    assert main(["--features", *map(str, paths)]) == 0
    assert "mAP (trapezoid)" in capsys.readouterr().out
    codes = feature_files(
        tmp_path, features=lambda a: np.packbits(a["features"] > 0, axis=1), cams=lambda a: None
    )
    q, g = (np.load(path) for path in codes)
    options = ["--metric", "hamming", "--protocol", "all"]
    expected = rank_hamming(q["features"], g["features"], q["pids"], g["pids"], protocol="all")
    assert as_json(capsys, "--features", *codes, *options)["mAP"] == expected.mAP


def test_feature_files_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    q, g = feature_files(tmp_path)
    bad = tmp_path / "bad.npz"

    def refused(*more: object) -> str:
        return refusal(capsys, "--features", q, bad, *more)

    assert "bad.npz does not exist: give two .npz files" in refused()
    bad.write_bytes(g.read_bytes()[:100])
    assert "bad.npz is damaged" in refused()
    np.save(tmp_path / "bad.npy", np.zeros(3))
    (tmp_path / "bad.npy").rename(bad)
    assert "is one array" in refused()
    np.savez(bad, feats=np.zeros((3, 16)))
    assert "has feats and no features and no pids" in refused()
    np.savez(bad, features=np.array([{}], dtype=object), pids=np.zeros(1, int))
    assert "is damaged (ValueError: Object arrays cannot be loaded" in refused()
    np.savez(bad, features=np.zeros((3, 16), np.float32), names=np.array(["a", "b", "c"]))
    assert "bad.npz has no pids: without identities nothing can be scored" in refused()
    np.savez(bad, features=np.zeros((3, 16), np.float32), pids=np.zeros(3, int))
    assert "bad.npz has no cams: add the array cams" in refused()
    np.savez(bad, features=np.zeros((3, 16), bool), pids=np.zeros(3, int))
    assert "bad.npz has features of shape (3, 16) and type bool" in refused()
    np.savez(bad, features=np.zeros(3), pids=np.zeros(3, int))
    assert "bad.npz has features of shape (3,) and type float64" in refused()
    for key, array in (("pids", np.zeros(2, int)), ("cams", np.zeros((3, 1), int))):
        arrays = {"pids": np.zeros(3, int), "cams": np.zeros(3, int)} | {key: array}
        np.savez(bad, features=np.zeros((3, 16)), **arrays)
        assert f"{key} in --features {bad} has shape" in refused()
    np.savez(bad, features=np.zeros((3, 15), np.float32), pids=np.zeros(3, int))
    assert "16 features and gallery 15" in refused("--protocol", "all")
    g.replace(bad)
    q2 = dict(np.load(q))
    q2["features"][4] = np.nan
    np.savez(q, **q2)
    assert "NaN in 1 of its 12 rows, first in row 4" in refused()


def test_a_search_that_finds_nothing_is_refused_with_options_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_camera = feature_files(tmp_path, cams=lambda a: np.zeros_like(a["pids"]))
    said = refusal(capsys, "--features", *one_camera)
    assert "same camera as all gallery images" in said and said.endswith("or --protocol all")
    few = feature_files(tmp_path, counts=(4, 16), cams=lambda a: None)
    said = refusal(capsys, "--features", *few, "--protocol", "all", "--rerank")
    assert "compares each image with its 20 nearest" in said and "only 20 images" in said
    enough = feature_files(tmp_path, counts=(4, 17), cams=lambda a: None)
    as_json(capsys, "--features", *enough, "--protocol", "all", "--rerank")


@pytest.mark.parametrize("protocol", ["market1501", "cuhk03", "all"])
def test_identities_of_all_types_give_the_oracles_scores(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    protocol: str,
) -> None:
    """Junk (-1) is nearest and would take a third from mAP; 0 is a distractor."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 8))
    g_pids = np.repeat([-1, 0, 1, 2, 3], [5, 5, 3, 3, 3])
    q_pids = np.array([1, 2, 3, 1])
    q, g = (centres[p] + rng.standard_normal((len(p), 8)) for p in (q_pids, g_pids))
    g[:5] = q[[0, 1, 2, 3, 0]]
    case = Case(q_pids, g_pids, np.zeros(4, int), rng.integers(0, 2, len(g)) % 2)
    lengths = [np.linalg.norm(f, axis=1, keepdims=True) for f in (q, g)]
    dist = 1 - (q / lengths[0]) @ (g / lengths[1]).T
    expected: RankingResult | None = None
    for kind in ("int64", "int8", "uint8", "uint16", "uint64", "U", "U30", "S", "S30"):
        for path, features, pids, cams in (
            (tmp_path / "q.npz", q, case.q_pids, case.q_cams),
            (tmp_path / "g.npz", g, case.g_pids, case.g_cams),
        ):
            np.savez(path, features=features, pids=pids.astype(kind), cams=cams.astype(kind))
        caplog.clear()
        paths = (tmp_path / "q.npz", tmp_path / "g.npz")
        result = as_json(capsys, "--features", *paths, "--protocol", protocol)
        assert [r.getMessage() for r in caplog.records] == [
            "5 of 19 gallery items are junk (identity -1): left out"
        ]
        if expected is None:
            expected = rank_files(*paths, metric="cosine", protocol=protocol, reranked=False)
            check(expected, dist, case, protocol=protocol)
        assert result == json.loads(expected.to_json())


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path: Path, compressed: bool) -> None:
    """250 damaged copies of each kind of archive."""
    path = feature_files(tmp_path)[1]
    arrays = dict(np.load(path))
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    whole = FeatureFile.read(path)
    read = 0
    for changed in mutations(path.read_bytes(), 250, seed=compressed):
        path.write_bytes(changed)
        found = outcome(lambda: FeatureFile.read(path))
        if found is not None:
            read += 1
            assert found.features.tobytes() == whole.features.tobytes()
            assert found.pids.tobytes() == whole.pids.tobytes()
            assert found.cams is None or found.cams.tobytes() == whole.cams.tobytes()
    assert 0 < read < 125


def npy(header: str, data: bytes) -> bytes:
    """One array's file with any header; version 1.0."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 4), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 4), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1e3, 4), }",
        "{'descr': '<q9', 'fortran_order': False, 'shape': (2, 4), }",
        "{'descr': ('<f8', (2,)), 'fortran_order': 1, 'shape': (2, 2), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 4), }",
        "{'descr': '<f8', 'shape': (2, 4), }",
        "((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((",
        "'",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "x.npz"
    pids = BytesIO()
    np.save(pids, np.array([1, 2]))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("features.npy", npy(header, np.zeros((2, 4)).tobytes()))
        archive.writestr("pids.npy", pids.getvalue())
    assert outcome(lambda: FeatureFile.read(path)) is None


def test_an_archive_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = feature_files(tmp_path)[1]
    monkeypatch.setattr("dml_fast.data.npz.available_bytes", lambda: 2_000)
    with pytest.raises(UserError, match="more than half of the free memory"):
        FeatureFile.read(path)
