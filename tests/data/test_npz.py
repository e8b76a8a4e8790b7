"""Arrays in .npy files: read whole, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mutations import mutations, outcome

from dml_fast.data.npz import array_in
from dml_fast.errors import UserError


def read(path: Path) -> np.ndarray:
    return array_in(path, "save it with numpy.save")


@pytest.mark.parametrize("dtype", ["u1", ">i2", "f4", "?"])
def test_an_array_is_read(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(12).reshape(3, 4) * 7).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    found = read(tmp_path / "x.npy")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_a_damaged_array_is_read_whole_or_refused(tmp_path: Path) -> None:
    """There is no checksum: other numbers are not seen, other sizes are."""
    path = tmp_path / "x.npy"
    np.save(path, np.arange(40, dtype="f4").reshape(5, 8))
    whole, results = path.read_bytes(), 0
    for damaged in mutations(whole, 200):
        path.write_bytes(damaged)
        if (found := outcome(lambda: read(path))) is not None:
            results += 1
            assert not found.dtype.hasobject
            assert found.nbytes <= len(damaged)
    assert 0 < results < 200


def test_what_is_no_such_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"damaged .*allow_pickle.*: save it with numpy\.save"):
        read(path)
    np.save(path, np.zeros(9))
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"damaged .it has another shape than its data"):
        read(path)
    monkeypatch.setattr("dml_fast.data.npz.available_bytes", lambda: 200)
    with pytest.raises(UserError, match=r"x\.npy has an array of 0\.0 GB, more than half"):
        read(path)
    with pytest.raises(UserError, match=r"cannot be read .*: save it with"):
        read(tmp_path / "no.npy")
