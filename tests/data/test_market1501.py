"""``market1501:DIR``: training identities, queries, and what is refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import skipped
from hypothesis import given
from hypothesis import strategies as st
from market_cases import SIZE, make_market, save
from mutations import mutations, outcome
from PIL import Image

from dml_fast.data import DataSet, RetrievalSet, check_data_spec, check_searches, open_dataset
from dml_fast.data.splits import split_identities
from dml_fast.errors import UserError


def opened(root: Path, **options: object) -> DataSet:
    return open_dataset(f"market1501:{root}", **options)  # type: ignore[arg-type]


def retrieval(data: DataSet, part: str) -> RetrievalSet:
    found = getattr(data, part)
    assert isinstance(found, RetrievalSet)
    return found


def test_names_say_who_and_where(tmp_path: Path) -> None:
    make_market(tmp_path)
    (tmp_path / "query" / "Thumbs.db").write_bytes(b"not an image")
    data = opened(tmp_path, val_fraction=0.25)
    test = retrieval(data, "test")
    files = [
        *sorted((tmp_path / "query").glob("*.png")),
        *sorted((tmp_path / "bounding_box_test").glob("*.png")),
    ]
    assert test.queries == 5
    assert [tmp_path / name for name in test.names] == files
    assert test.labels.tolist() == [int(path.name.split("_")[0]) for path in files]
    assert {-1, 0} < set(test.labels.tolist())
    for name, label in zip(data.train.names, data.train.labels, strict=True):
        assert name.startswith(f"bounding_box_train/{data.classes[label]}_")
    assert test.cams.tolist() == [int(path.name.split("_c")[1][0]) for path in files]
    for pixels, path in zip(test.images, files, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_what_is_passed_over_is_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_market(tmp_path)
    caplog.set_level(logging.INFO, "dml_fast")
    before = opened(tmp_path).fingerprint
    assert not caplog.records
    (tmp_path / "query" / "Thumbs.db").write_bytes(b"not an image")
    for name in ("gt_bbox", "gt_query", "query/0001", "bounding_box_train/.cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").write_text("")
    assert opened(tmp_path).fingerprint == before
    (record,) = caplog.records
    assert record.getMessage() == (
        f"in {tmp_path} was passed over: 2 beside the parts (gt_bbox, gt_query); 2 of another kind "
        "(readme.txt, query/Thumbs.db); 1 hidden (bounding_box_train/.cache); 1 folders below "
        "(query/0001)"
    )


def test_whole_identities_validate_and_the_others_are_learned(tmp_path: Path) -> None:
    data = opened(make_market(tmp_path), val_fraction=0.25)
    val = retrieval(data, "val")
    learned, held_out = {int(name) for name in data.classes}, set(val.labels.tolist())
    assert len(held_out) == 3 and learned | held_out == set(range(1, 13))
    assert not learned & held_out
    assert np.bincount(data.train.labels).tolist() == [6] * 9
    assert val.queries == 6  # one for each identity and camera
    views = list(zip(val.labels[:6].tolist(), val.cams[:6].tolist(), strict=True))
    assert len(set(views)) == 6
    assert len(set(val.names)) == len(val.names) == 18
    again = opened(tmp_path, val_fraction=0.25, seed=5)
    assert again.fingerprint == data.fingerprint  # the same validation set for every seed


def test_without_a_fraction_the_test_images_validate(tmp_path: Path) -> None:
    data = opened(make_market(tmp_path), val_fraction=0.0)
    assert data.val is data.test and len(data.classes) == 12 and len(data.train) == 72


def test_the_fingerprint_knows_cameras_and_queries(tmp_path: Path) -> None:
    make_market(tmp_path)
    before = opened(tmp_path).fingerprint
    path = min((tmp_path / "query").iterdir())
    path.rename(path.with_name(path.name.replace("_c1", "_c3")))
    assert opened(tmp_path).fingerprint != before


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=8, max_size=60),
    st.sampled_from([0.2, 0.5, 0.8]),
)
def test_every_query_that_is_split_off_has_a_valid_match(
    images: list[tuple[int, int]], fraction: float
) -> None:
    pids, cams = np.array(images, np.int64).T
    try:
        learned, query, gallery = split_identities(pids, cams, fraction)
    except UserError:
        return
    parts = np.concatenate([learned, query, gallery])
    assert sorted(parts.tolist()) == list(range(len(pids)))
    assert not set(pids[learned].tolist()) & set(pids[gallery].tolist())
    assert len(query)
    for q in query:
        assert ((pids[gallery] == pids[q]) & (cams[gallery] != cams[q])).any()
    views = list(zip(pids[query].tolist(), cams[query].tolist(), strict=True))
    assert len(set(views)) == len(views)


def test_a_fraction_that_leaves_nobody_is_refused(tmp_path: Path) -> None:
    make_market(tmp_path)
    with pytest.raises(UserError, match="sets 0 of 12 identities aside: give another"):
        opened(tmp_path, val_fraction=0.01)


def test_identities_seen_by_one_camera_cannot_validate(tmp_path: Path) -> None:
    make_market(tmp_path)
    for path in (tmp_path / "bounding_box_train").iterdir():
        path.rename(path.with_name(path.name.replace("_c2", "_c1")))
    with pytest.raises(UserError, match="searched for: give --val-protocol all, another"):
        opened(tmp_path, val_fraction=0.25)


def test_what_has_another_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none does not exist: put images in"):
        check_data_spec(f"market1501:{tmp_path}/none")
    make_market(tmp_path)
    check_data_spec(f"market1501:{tmp_path}")
    with pytest.raises(UserError, match="cannot be downloaded"):
        check_data_spec(f"market1501:{tmp_path}", download=True)
    odd = tmp_path / "query" / "holiday.png"
    Image.new("RGB", SIZE).save(odd)
    with pytest.raises(UserError, match=r"name of .*holiday.png has no identity and camera"):
        opened(tmp_path)
    odd.unlink()
    junk = save(tmp_path / "bounding_box_train", -1, 1, 999)
    with pytest.raises(UserError, match="is of identity -1, which is junk and cannot be"):
        opened(tmp_path)
    junk.unlink()
    for path in (tmp_path / "query").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="query holds no images: fill it"):
        opened(tmp_path)


def test_identities_start_where_the_sets_do(tmp_path: Path) -> None:
    data = opened(make_market(tmp_path, first=0), val_fraction=0.0)
    assert data.classes[:2] == ("0000", "0001") and len(data.classes) == 12
    assert np.bincount(data.train.labels).tolist() == [6] * 12
    held_out = opened(tmp_path, val_fraction=0.5)
    known = {int(name) for name in held_out.classes}
    assert known | set(retrieval(held_out, "val").labels.tolist()) == set(range(12))


def test_names_without_cameras_are_accepted_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(make_market(tmp_path, cameras=(None,)), val_fraction=0.25)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"market1501:{tmp_path}: no file's name has a camera (_c1): cameras do not matter to "
        "searches"
    ]
    test, val = retrieval(data, "test"), retrieval(data, "val")
    assert test.cams is None and val.cams is None
    assert (test.queries, len(test), len(data.train)) == (5, 5 * 6 + 2, 9 * 6)
    assert val.queries == 3  # one for each identity
    assert sorted(val.labels[:3].tolist()) == sorted(set(val.labels.tolist()))
    assert np.bincount(val.labels).max() == 6
    check_searches(f"market1501:{tmp_path}", val_fraction=0.25, camera_rule=True)


def test_where_cameras_do_not_matter_one_is_enough(tmp_path: Path) -> None:
    make_market(tmp_path, cameras=(3,))
    data = opened(tmp_path, val_fraction=0.25, camera_rule=False)
    val = retrieval(data, "val")
    assert val.queries == 3 and val.cams is not None and set(val.cams.tolist()) == {3}
    both = opened(make_market(tmp_path / "two"), val_fraction=0.25, camera_rule=False)
    assert retrieval(both, "val").queries == 3


@pytest.mark.parametrize("part", ["bounding_box_train", "query", "bounding_box_test"])
def test_one_name_without_a_camera_among_others_is_refused(tmp_path: Path, part: str) -> None:
    make_market(tmp_path)
    odd = save(tmp_path / part, 101, None, 999)
    with pytest.raises(UserError, match=f"{odd.name} has no camera and that of .* has: name all"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("market", "fraction", "camera_rule", "message"),
    [
        ({}, 0.25, True, None),
        ({}, 0.0, True, None),
        ({"cameras": (1,)}, 0.25, False, None),
        ({"cameras": (1,)}, 0.25, True, "images by two cameras, .*: give --val-protocol all, "),
        ({"cameras": (1,)}, 0.0, True, "query and bounding_box_test: no query .* same camera as"),
        ({"test_cameras": (4,)}, 0.25, True, "the same camera as .*, or --val-protocol all$"),
        ({"test_cameras": (4,)}, 0.25, False, None),
        ({"cameras": (None,), "shots": 1}, 0.25, True, "has two images, .*: give another --val-fr"),
        ({"cameras": (None,), "shots": 1}, 0.0, True, "none of the queries' identities is in"),
    ],
)
def test_what_cannot_be_searched_is_known_before_training(
    tmp_path: Path, market: Any, fraction: float, camera_rule: bool, message: str | None
) -> None:
    make_market(tmp_path, **market)
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")  # the names are enough
    how = {"val_fraction": fraction, "camera_rule": camera_rule}
    if message is None:
        check_searches(f"market1501:{tmp_path}", **how)
        return
    with pytest.raises(UserError, match=message):
        check_searches(f"market1501:{tmp_path}", **how)


def test_any_name_is_accepted_or_refused_in_one_sentence(tmp_path: Path) -> None:
    """600 names: of a query with a camera, and of one without, in sets of both kinds."""
    accepted = 0
    for cameras, name in ((1, 2), b"0101_c1s1_000451_03.jpg"), ((None,), b"0101_000451.jpg"):
        root = make_market(tmp_path / str(len(cameras)), learned=2, searched=1, cameras=cameras)
        for changed in mutations(name, 300, seed=len(cameras)):
            path = os.fsencode(root / "query") + b"/" + changed[:250].translate(None, b"/\0")
            if not os.path.basename(path).strip(b"."):
                continue
            Path(os.fsdecode(path)).touch()
            accepted += outcome(lambda root=root: searched(root)) is not None
            os.remove(path)
    assert 400 < accepted < 580


def searched(root: Path) -> bool:
    check_searches(f"market1501:{root}", val_fraction=0.5, camera_rule=True)
    return True


def test_corrupt_images_stop_the_run_or_are_left_out(tmp_path: Path) -> None:
    make_market(tmp_path)
    broken = min((tmp_path / "bounding_box_test").glob("0101*"))
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=broken.name):
        opened(tmp_path)
    data = opened(tmp_path, skip_corrupt=True)
    assert skipped(data) == (f"bounding_box_test/{broken.name}",)
    assert skipped(data)[0] not in retrieval(data, "test").names


def test_images_are_resized_to_height_and_width(tmp_path: Path) -> None:
    make_market(tmp_path)
    path = min((tmp_path / "query").iterdir())
    Image.open(path).resize((20, 31)).save(path)
    with pytest.raises(UserError, match=r"31x20 pixels .*pass --image-size"):
        opened(tmp_path)
    assert opened(tmp_path, image_size=(32, 16)).train.images.shape[1:] == (3, 32, 16)


@pytest.mark.slow
def test_real_drawings_as_market1501(shared_data: Path, tmp_path: Path) -> None:
    tool = shared_data.parent / "tools" / "omniglot_as_market1501.py"
    subprocess.run([sys.executable, tool, tmp_path], check=True, capture_output=True)
    data = opened(tmp_path, image_size=32)
    test = retrieval(data, "test")
    assert (len(data.train), len(data.classes)) == (2440, 122)
    assert (test.queries, len(test)) == (356, 2120)
    for pid, prefix in ((-1, "-1_"), (0, "0000_")):
        files = list((tmp_path / "bounding_box_test").glob(f"{prefix}*"))
        assert 0 < np.count_nonzero(test.labels == pid) == len(files)
