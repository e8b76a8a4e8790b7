"""Files of pairs and of their offsets: what is read, and what is refused in one sentence."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutations, outcome
from pair_cases import MARGIN, SIZE, SMALL, make_pairs

from dml_fast.data import PairSet, open_dataset, open_every_pair
from dml_fast.data.offset_files import offsets_in, offsets_text
from dml_fast.errors import UserError

WIDE = SIZE + 2 * MARGIN


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.integers(0, 255, (120, SIZE, SIZE)).astype(np.uint8),
        "b": rng.normal(size=(120, WIDE, WIDE)),
        "offset": rng.integers(-6, 7, (120, 2)),
    }


def opened(path: Path, **options: Any) -> tuple[PairSet, PairSet]:
    data = open_dataset(f"pairs:{path}", **{**SMALL, **options})
    assert isinstance(data.train, PairSet)
    assert isinstance(data.val, PairSet)
    return data.train, data.val


@pytest.mark.parametrize("kind", ["u1", "i2", "u8", "f2", "f4", "f8", "?"])
def test_pairs_are_read_and_split(tmp_path: Path, arrays: dict[str, Any], kind: str) -> None:
    arrays["a"] = arrays["a"] > 100 if kind == "?" else arrays["a"].astype(kind)
    np.savez(tmp_path / "p.npz", **arrays)
    data = open_dataset(f"pairs:{tmp_path / 'p.npz'}", val_fraction=0.25, **SMALL)
    assert (data.name, len(data.classes), data.test) == ("p", 49, None)
    assert data.inputs[0].shape == (1, 1, 12, 3)
    assert isinstance(data.train, PairSet)
    assert isinstance(data.val, PairSet)
    assert (len(data.train), len(data.val)) == (90, 30)
    names = [int(name) for part in (data.train, data.val) for name in part.names]
    assert sorted(names) == list(range(120))
    for part in (data.train, data.val):
        rows = [int(name) for name in part.names]
        np.testing.assert_array_equal(part.a, arrays["a"][rows].astype(np.float32))
        np.testing.assert_array_equal(part.b, arrays["b"][rows].astype(np.float32))
        np.testing.assert_array_equal(part.offset, arrays["offset"][rows])
    again = open_dataset(f"pairs:{tmp_path / 'p.npz'}", val_fraction=0.25, seed=1, **SMALL)
    assert [*again.val.names] == [*data.val.names]  # the same for every seed


def test_a_file_without_offsets_has_none(tmp_path: Path, arrays: dict[str, Any]) -> None:
    del arrays["offset"]
    np.savez(tmp_path / "p.npz", **arrays)
    every = open_every_pair(f"pairs:{tmp_path / 'p.npz'}", seed=0, **SMALL)
    assert len(every) == 120
    assert not every.offset.any()


def test_the_fingerprint_is_of_all_that_is_learned(tmp_path: Path, arrays: dict[str, Any]) -> None:
    def fingerprint(**options: Any) -> str:
        np.savez(tmp_path / "p.npz", **arrays)
        return open_dataset(f"pairs:{tmp_path / 'p.npz'}", **{**SMALL, **options}).fingerprint

    found = [fingerprint(), fingerprint(search=2), fingerprint(seed=1)]
    assert fingerprint() == found[0]
    (tmp_path / "o.tsv").write_text("".join(f"{k}\t0\t1\n" for k in range(0, 120, 2)))
    found.append(fingerprint(offsets=str(tmp_path / "o.tsv")))
    kept = fingerprint(offsets=str(tmp_path / "o.tsv"), unlabelled=True)
    assert kept == found[-1]  # pairs that are only kept do not count
    for name in ("a", "b", "offset"):
        arrays[name].flat[0] = 3 if arrays[name].flat[0] != 3 else 4
        found.append(fingerprint())
    assert len(set(found)) == len(found)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no b": ({"b": None}, "has 'a', 'offset', and no b: save with numpy.savez"),
    "another array": ({"y": np.zeros(120)}, "'y', which is none of a, b, offset: leave it out"),
    "flat": ({"a": np.zeros((120, 16))}, r"a of shape \(120, 16\) and type float64: save real"),
    "complex": ({"b": np.zeros((120, 32, 32), complex)}, "type complex128: save real numbers"),
    "text": ({"a": np.full((120, 16, 16), "1")}, "type <U1: save real numbers"),
    "objects": ({"a": np.full((120, 16, 16), None)}, "is damaged .*allow_pickle"),
    "none": ({"a": np.zeros((0, 16, 16))}, r"a of shape \(0, 16, 16\)"),
    "fewer b": ({"b": np.zeros((119, 32, 32))}, "has 120 images in a and 119 in b: give as many"),
    "not square": ({"b": np.zeros((120, 32, 30))}, "16 x 16 pixels in a and 32 x 30 in b: b must"),
    "odd": ({"b": np.zeros((120, 31, 31))}, "31 x 31 in b: b must be wider .* twice one margin"),
    "smaller": ({"b": np.zeros((120, 14, 14))}, "14 x 14 in b: b must be wider and higher"),
    "margin": (
        {"b": np.zeros((120, 28, 28))},
        "a margin of 6 pixels, and --search 3 needs 7: give a wider margin, or --search 2",
    ),
    "small": (
        {"a": np.zeros((120, 11, 16)), "b": np.zeros((120, 27, 32))},
        "11 x 16 pixels in a .* --patch is 12: give --patch 11 or less",
    ),
    "not finite": (
        {"b": np.where(np.arange(120)[:, None, None] == 7, np.inf, np.ones((120, 32, 32)))},
        "pair 7 has a number in b that is no finite float32 number: leave it out",
    ),
    "too large": ({"a": np.full((120, 16, 16), 1e39)}, "pair 0 .* leave 120 such pairs out"),
    "offsets": ({"offset": np.zeros((120, 2))}, "offset of shape .* type float64: save whole"),
    "one offset": ({"offset": np.zeros(2, int)}, r"offset of shape \(2,\)"),
    "beyond": (
        {"offset": np.pad([[0, -7]], ((4, 115), (0, 0)))},
        "pair 4 has the offset 0,-7, and the margin of 8 pixels leaves room for 6: leave it out",
    ),
    "far beyond": ({"offset": np.full((120, 2), 2**64 - 1, np.uint64)}, "leaves room for 6"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused(
    tmp_path: Path, arrays: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    found = {name: array for name, array in (arrays | change).items() if array is not None}
    np.savez(tmp_path / "p.npz", **found)
    with pytest.raises(UserError) as refused:
        opened(tmp_path / "p.npz")
    assert re.search(message, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "side", "square"), [("a", 12, "12 x 12"), ("b", 18, "18 x 18")])
def test_a_crop_of_equal_pixels_is_refused_by_its_pair(
    tmp_path: Path, arrays: dict[str, Any], name: str, side: int, square: str
) -> None:
    arrays[name][3, 2 : 2 + side, 4 : 4 + side] = 9
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(UserError, match=rf"pair 3 has a square of {square} equal pixels in {name}"):
        opened(tmp_path / "p.npz")
    arrays[name][3, 2, 4] = 8
    np.savez(tmp_path / "p.npz", **arrays)
    opened(tmp_path / "p.npz")


def test_a_pair_too_small_for_the_search_is_told_what_fits(
    tmp_path: Path, arrays: dict[str, Any]
) -> None:
    small = {"a": arrays["a"][:, :12, :12], "b": arrays["b"][:, :28, :28]}  # a margin of 8
    np.savez(tmp_path / "p.npz", **small)
    message = "too small to show crops of 12 pixels displaced by up to 4: give a margin wider by 1"
    options = {"search": 4, "patch": 12}
    np.savez(tmp_path / "q.npz", a=small["a"], b=arrays["b"][:, :26, :26])
    with pytest.raises(UserError, match="a margin of 7 pixels, and --search 4 needs 8"):
        opened(tmp_path / "q.npz", **options)
    opened(tmp_path / "p.npz", **options)  # room for no offset at all, and there is none
    wide = {"a": arrays["a"][:, :12, :12], "b": arrays["b"][:, :30, :30]}
    np.savez(tmp_path / "r.npz", **wide)  # a margin of 9
    message = message.replace("to 4", "to 5")
    with pytest.raises(UserError, match=f"{message}, or --patch 11"):
        opened(tmp_path / "r.npz", search=5, patch=12)
    opened(tmp_path / "r.npz", search=5, patch=11)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist: give an \.npz file of pairs"):
        opened(tmp_path / "p.npz")
    with pytest.raises(UserError, match=r"is a folder: give an \.npz file of pairs"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"needs a file: write pairs:FILE\.npz"):
        open_dataset("pairs:")
    (tmp_path / "p.npz").write_text("no archive")
    with pytest.raises(UserError, match="is damaged"):
        opened(tmp_path / "p.npz")


def test_offsets_replace_those_of_the_file_and_leave_other_pairs_out(
    tmp_path: Path, arrays: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / "p.npz", **arrays)
    train, val = opened(tmp_path / "p.npz")
    chosen = {name: (int(name) % 5, -2) for name in train.names if int(name) % 3}
    text = offsets_text(chosen | {name: (6, 6) for name in val.names})
    (tmp_path / "o.tsv").write_text(f"# by hand\n\n{text}")
    with caplog.at_level(logging.INFO, logger="dml_fast"):
        moved, same = opened(tmp_path / "p.npz", offsets=str(tmp_path / "o.tsv"))
    assert [*moved.names] == [*chosen]
    assert moved.offset.tolist() == [[*offset] for offset in chosen.values()]
    np.testing.assert_array_equal(same.offset, val.offset)
    left = len(train) - len(chosen)
    assert f"{len(chosen)} training pairs have an offset, {left} are left out" in caplog.text
    assert f"{len(val)} that it names are not to train with" in caplog.text
    kept, _ = opened(tmp_path / "p.npz", offsets=str(tmp_path / "o.tsv"), unlabelled=True)
    assert [*kept.names] == [*train.names]
    for name, own, here in zip(train.names, train.offset, kept.offset, strict=True):
        assert here.tolist() == [*chosen.get(name, own)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no pair: write a name, rows and columns"),
        ("name\trows\tcolumns\n", "names no pair"),
        ("1\t2\n", "line 1 has 2 columns and not three"),
        ("1 2 3\n", "line 1 has one column and not three"),
        ("1\t2\t3\n1\t2\t3\n", "line 2 names '1' a second time: remove one of the lines"),
        ("# x\n1\t2\t3.0\n", "line 2 has '3.0' for a number of pixels: give a whole number"),
        ("1\t2\t1e3\n", "line 1 has '1e3' for a number"),
        ("1\t2\t12345678901\n", "line 1 has '12345678901' for a number"),
        ("120\t2\t3\n", "names '120', and the pairs are called 0 to 119"),
        ("01\t2\t3\n", "names '01', and the pairs are called 0 to 119"),
        ("1\t2\t7\n", "pair 1 has the offset 2,7, and the margin of 8 pixels leaves room for 6"),
    ],
)
def test_bad_offsets_are_refused(
    tmp_path: Path, arrays: dict[str, Any], text: str, message: str
) -> None:
    np.savez(tmp_path / "p.npz", **arrays)
    (tmp_path / "o.tsv").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        opened(tmp_path / "p.npz", offsets=str(tmp_path / "o.tsv"))
    assert str(refused.value).startswith(f"--offsets {tmp_path / 'o.tsv'}")


def test_offsets_of_no_training_pair_and_of_no_file_are_refused(
    tmp_path: Path, arrays: dict[str, Any]
) -> None:
    np.savez(tmp_path / "p.npz", **arrays)
    _, val = opened(tmp_path / "p.npz")
    file = tmp_path / "o.tsv"
    file.write_text(offsets_text({val.names[0]: (0, 0)}))
    with pytest.raises(UserError, match="names none of 108 pairs to train with: name some"):
        opened(tmp_path / "p.npz", offsets=str(file))
    with pytest.raises(UserError, match=r"cannot be read .*: give --offsets a file of names"):
        opened(tmp_path / "p.npz", offsets=str(tmp_path / "no.tsv"))
    file.write_bytes(b"1\t2\t3\n\xff\t1\t1\n")
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        opened(tmp_path / "p.npz", offsets=str(file))


def test_offsets_are_written_as_they_are_read(tmp_path: Path) -> None:
    offsets = {"3": (0, -8), "12": (7, 5)}
    (tmp_path / "o.tsv").write_text(offsets_text(offsets))
    assert offsets_in(tmp_path / "o.tsv") == offsets
    (tmp_path / "o.tsv").write_bytes(b"\xef\xbb\xbf3\t+0\t-8\r\n12\t7\t5\r\n")
    assert offsets_in(tmp_path / "o.tsv") == offsets


def test_the_files_of_these_tests_have_the_displacement_that_they_tell(tmp_path: Path) -> None:
    spec = make_pairs(tmp_path / "p.npz", 30, aligned=False, offset=True)
    pairs = open_every_pair(spec, seed=0, **SMALL)
    assert len({*map(tuple, pairs.offset.tolist())}) > 4
    best = []
    for k in range(len(pairs)):  # b has two level lines of a: their distance is explained by a
        errors = {}
        for t in np.ndindex(7, 7):
            row, column = MARGIN + np.array(t) - 3
            seen = pairs.b[k, row : row + SIZE, column : column + SIZE]
            x = (pairs.a[k] - 100) / 20
            wanted = np.exp(-4 * (x - 0.7) ** 2) - np.exp(-4 * (x + 0.7) ** 2)
            errors[t] = float(((seen - wanted) ** 2).sum())
        best.append(np.array(min(errors, key=errors.__getitem__)) - 3)
    np.testing.assert_array_equal(best, pairs.offset)


@pytest.mark.parametrize("name", ["p.npz", "o.tsv"])
def test_damaged_files_are_read_as_before_or_refused(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "p.npz", a=rng.normal(size=(6, 4, 4)), b=rng.normal(size=(6, 16, 16)),
             offset=rng.integers(-2, 3, (6, 2)))  # fmt: skip
    (tmp_path / "o.tsv").write_text(offsets_text({str(k): (k % 3, -2) for k in range(6)}))
    options = {"patch": 3, "search": 2, "offsets": str(tmp_path / "o.tsv")}

    def read() -> tuple[PairSet, PairSet]:
        return opened(tmp_path / "p.npz", val_fraction=0.4, **options)

    whole, results = (tmp_path / name).read_bytes(), 0
    for damaged in mutations(whole, 140):
        (tmp_path / name).write_bytes(damaged)
        if (found := outcome(read)) is not None:
            results += 1
            for part in found:
                assert np.isfinite(part.a).all()
                assert (np.abs(part.offset) <= part.room).all()
    assert 0 < results < 140
