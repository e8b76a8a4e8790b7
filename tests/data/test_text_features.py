"""Features of text: against scikit-learn's own pipeline, stored bit for bit, and damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from mutations import mutations, outcome
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from text_pairs import text_pairs
from threadpoolctl import threadpool_limits

from dml_fast.data.feature_files import Columns, arrays_of, arrays_to_bytes
from dml_fast.data.features import Features, load_features
from dml_fast.data.readers.text import read_rows
from dml_fast.data.text_features import TextFeatures, edges, word_pairs
from dml_fast.errors import UserError

LEVELS = ("words", "chars", "args", "pairs", "edges")


def save(features: Features, folder: Path) -> Path:
    for name, data in features.files().items():
        (folder / name).write_bytes(data)
    return folder


def some(columns: Columns, rows: slice) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Columns:
    return read_rows([text_pairs(tmp_path_factory.mktemp("text") / "p.tsv")]).texts


@pytest.fixture(scope="module")
def fitted(pairs: Columns) -> TextFeatures:
    return TextFeatures.fit(some(pairs, slice(280)), LEVELS, 12, "p.tsv")


def test_words_are_those_of_scikit_learn(pairs: Columns) -> None:
    texts = list(pairs["arg1"])
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
        TruncatedSVD(20, random_state=0),
    )
    expected = pipeline.fit_transform(texts[:280])
    scale = expected.std(axis=0)
    features = TextFeatures.fit({"text": pairs["arg1"][:280]}, ["words"], 20, "")
    [train] = features.transform({"text": pairs["arg1"][:280]})
    [rest] = features.transform({"text": pairs["arg1"][280:]})
    np.testing.assert_allclose(train, expected / scale, atol=2e-3)
    np.testing.assert_allclose(rest, pipeline.transform(texts[280:]) / scale, atol=2e-3)


def test_stored_features_are_the_same_bit_for_bit(
    pairs: Columns, fitted: TextFeatures, tmp_path: Path
) -> None:
    again = load_features(save(fitted, tmp_path))
    assert again.digest == fitted.digest and again.names == LEVELS
    new = some(pairs, slice(280, None))
    for mine, theirs in zip(fitted.transform(new), again.transform(new), strict=True):
        assert mine.dtype == np.float32 and len(mine) == 120
        assert np.array_equal(mine, theirs)
    for name, data in again.files().items():
        assert data == (tmp_path / name).read_bytes()


def test_a_row_does_not_depend_on_the_others(pairs: Columns, fitted: TextFeatures) -> None:
    together, alone = (fitted.transform(some(pairs, s)) for s in (slice(400), slice(7, 8)))
    for many, one in zip(together, alone, strict=True):
        assert np.array_equal(many[7:8], one)
    assert [view.shape for view in fitted.transform(some(pairs, slice(0)))] == [
        (0, view.shape[1]) for view in together
    ]


def test_training_rows_have_deviation_one(pairs: Columns, fitted: TextFeatures) -> None:
    for view in fitted.transform(some(pairs, slice(280))):
        np.testing.assert_allclose(view.std(axis=0), 1, atol=1e-3)


def test_args_are_both_arguments_their_product_and_difference(
    pairs: Columns, fitted: TextFeatures
) -> None:
    level = fitted.levels[LEVELS.index("args")]
    view = level.transform(pairs) * level.scale
    a, b, product, difference = np.split(view, 4, axis=1)
    assert a.shape == (400, 6)  # half of --dim
    np.testing.assert_allclose(product, a * b, atol=1e-6)
    np.testing.assert_allclose(difference, np.abs(a - b), atol=1e-6)
    swapped = level.transform({"arg1": pairs["arg2"], "arg2": pairs["arg1"]}) * level.scale
    np.testing.assert_allclose(swapped[:, :6], b, atol=1e-6)


def test_pairs_and_edges_by_hand() -> None:
    assert word_pairs(("B a. a", "C")) == [".|c", "a|c", "b|c"]
    assert edges(("One two", "x")) == [
        *("1 first: one", "1 first: two", "1 first: one two"),
        *("1 last: one", "1 last: two", "1 last: one two"),
        *("2 first: x", "2 last: x"),
    ]
    assert "1 last: c d" in edges(("a b c d", "x")) and "1 first: c d" not in edges(("a b c d", ""))


def test_fewer_dimensions_are_said(caplog: pytest.LogCaptureFixture) -> None:
    texts = np.array(["red green", "green blue", "blue red", "red"] * 3, dtype=object)
    with caplog.at_level(logging.INFO):
        [view] = TextFeatures.fit({"text": texts}, ["words"], 200, "").transform({"text": texts})
    [line] = caplog.messages
    assert f"level words has {view.shape[1]} dimensions and not 200" in line
    assert 1 <= view.shape[1] <= 4 and np.isfinite(view).all()


def test_no_terms_and_missing_columns_are_refused(fitted: TextFeatures) -> None:
    texts = np.array(["red", "green"], dtype=object)
    with pytest.raises(UserError, match=r"t.tsv has no words that occur in 2 of its training rows"):
        TextFeatures.fit({"text": texts}, ["words"], 5, "t.tsv")
    with pytest.raises(UserError, match="the rows have no column arg1: give them with arg1 and ar"):
        fitted.transform({"text": texts})


def test_damaged_files_are_refused_or_the_digest_differs(pairs: Columns, tmp_path: Path) -> None:
    features = TextFeatures.fit(some(pairs, slice(60)), ["args", "edges"], 3, "")
    save(features, tmp_path)
    refused = 0
    for name in features.files():
        path = tmp_path / name
        whole = path.read_bytes()
        for damaged in mutations(whole, 100):
            path.write_bytes(damaged)
            found = outcome(lambda: load_features(tmp_path))
            refused += found is None
            if found is not None and found.digest == features.digest:
                assert np.array_equal(found.transform(pairs)[0], features.transform(pairs)[0])
        path.write_bytes(whole)
    assert refused > 100
    assert load_features(tmp_path).digest == features.digest


def test_arrays_that_do_not_fit_are_refused(fitted: TextFeatures, tmp_path: Path) -> None:
    save(fitted, tmp_path)
    arrays = arrays_of(tmp_path)
    wrong = {
        "kind": np.array("images"),
        "columns": np.array(["text"]),
        "levels": np.array(["words", "words"]),
        "words.idf": arrays["words.idf"][:-1],
        "words.components": arrays["words.components"].astype(np.float64),
        "args.scale": arrays["args.scale"][:6],
        "edges.scale": np.zeros_like(arrays["edges.scale"]),
        "pairs.idf": np.full_like(arrays["pairs.idf"], np.nan),
    }
    for name, array in wrong.items():
        (tmp_path / "features.npz").write_bytes(arrays_to_bytes(arrays | {name: array}))
        with pytest.raises(UserError, match=r"features.npz is damaged"):
            load_features(tmp_path)
    objects = tmp_path / "features.npz"
    np.savez(objects, kind=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"features.npz is damaged .*pickle"):
        load_features(tmp_path)
    save(fitted, tmp_path)
    words = json.loads((tmp_path / "vocabulary.json").read_text())
    words["pairs"][0] = words["pairs"][1]
    (tmp_path / "vocabulary.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="level pairs has a term twice"):
        load_features(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"vocabulary.json cannot be read"):
        load_features(tmp_path)


def test_the_number_of_threads_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 800, (1500, 8))
    texts = np.array([" ".join(f"w{w}" for w in row) for row in words], dtype=object)
    digests = set()
    for threads in (1, 2):
        with threadpool_limits(threads):
            digests.add(TextFeatures.fit({"text": texts}, ["words"], 100, "").digest)
    assert len(digests) == 1
