"""scikit-learn's digits, which are read without it."""

from __future__ import annotations

import gzip
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dml_fast.data import ImageSet, open_dataset
from dml_fast.data.readers import digits
from dml_fast.errors import UserError


def rows(images: ImageSet) -> set[bytes]:
    return {image.tobytes() for image in images.pixels}


def test_digits_are_the_real_ones_in_disjoint_stratified_parts() -> None:
    data = open_dataset("digits")
    parts = (data.train, data.val, data.test)
    assert data.test is not None
    assert [len(part) for part in parts] == [1168, 270, 359]
    source = load_digits()
    pairs = {
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), label)
        for image, label in zip(source.images, source.target, strict=True)
    }
    found = [
        (image.tobytes(), label)
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert len(found) == 1797 and set(found) == pairs
    # no digit occurs twice in the set, so this shows that no image is in two parts
    assert len(rows(data.train)) + len(rows(data.val)) + len(rows(data.test)) == 1797
    for part in parts:
        shares = np.bincount(part.labels) / len(part)
        np.testing.assert_allclose(shares, np.bincount(source.target) / 1797, atol=0.004)
        assert part.images.shape[1:] == (1, 8, 8) and part.images.max() == 255
    assert data.classes == tuple("0123456789") and (data.pad, data.flip) == (1, False)


def test_the_rows_are_those_that_scikit_learn_reads() -> None:
    ours, theirs = digits._rows(), load_digits()
    assert ours.dtype == theirs.images.dtype == np.float64
    np.testing.assert_array_equal(ours[:, :-1].reshape(-1, 8, 8), theirs.images)
    np.testing.assert_array_equal(ours[:, -1], theirs.target)


def test_the_fingerprint_is_that_of_saved_runs() -> None:
    plain = "35ae3af00795ab6868717b9805fa27096e0503ef3762dd742a460c84c5385e10"
    assert open_dataset("digits").fingerprint == plain
    noisy = "6b96327256b5b30be59c8e2b862a1a9bf9c9a7d2ea7fd6d2ec9e94b943cbc599"
    changed = open_dataset("digits", train_fraction=0.5, label_noise=0.2, seed=3)
    assert changed.fingerprint == noisy


def test_neither_scikit_learn_nor_a_decoder_is_imported() -> None:
    code = (
        "import sys; from dml_fast.data import open_dataset; open_dataset('digits'); "
        "print([m for m in ('torch', 'sklearn', 'scipy', 'PIL', 'simplejpeg') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize(
    "content",
    [None, gzip.compress(b"1,2\n"), gzip.compress(b"no,numbers"), b"no archive"],
    ids=["missing", "too short", "no numbers", "no archive"],
)
def test_a_file_that_is_missing_or_damaged_is_named(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(digits, "find_spec", lambda name: spec)
    path = tmp_path / "datasets" / "data" / "digits.csv.gz"
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"digits\.csv\.gz (cannot be read|is damaged)"):
        open_dataset("digits")


def test_without_scikit_learn_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="which is not installed: pip install scikit-learn"):
        open_dataset("digits")
