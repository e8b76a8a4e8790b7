"""Unusual and damaged files with every loader: the same pixels, or a name and a reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_image_cases import BAD, foreign, rotten
from data_cases import ALL, STREAMING, evaluated, in_another_process, loader_of, opened, pieces

from dml_fast.data.plan import Augmentation
from dml_fast.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMING)
def test_foreign_files_come_as_in_the_resident_loader(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 4, [(24, 24)], parts=("train", "val"))
    foreign(tmp_path / "val" / "china")
    expected = evaluated(tmp_path, "resident")
    ours = in_another_process(tmp_path, name)
    assert isinstance(ours, dict) and len(ours["sums"]) == 8 + 19
    assert ours["ids"] == expected["ids"]
    np.testing.assert_array_equal(np.array(ours["sums"]), np.array(expected["sums"]))


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("file", BAD)
def test_a_corrupt_file_stops_the_run_by_name_and_reason(
    name: str, file: str, tmp_path: Path
) -> None:
    pieces(tmp_path, 4, [(24, 24)], parts=("train", "val"))
    (tmp_path / "train" / "flower" / file).write_bytes(BAD[file])
    run = in_another_process if name == "dali" else try_evaluated
    message = run(tmp_path, name)
    assert isinstance(message, str), message
    assert f"train/flower/{file} cannot be decoded (" in message and "--skip-corrupt" in message
    assert "()" not in message


def try_evaluated(root: Path, loader: str) -> dict | str:
    try:
        return evaluated(root, loader)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", STREAMING)
def test_files_that_cannot_be_read_stop_the_run_by_name(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 4, [(24, 24)], parts=("train", "val"))
    (tmp_path / "train" / "china" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=r"gone\.jpg cannot be decoded \(.*No such file"):
        evaluated(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMING)
def test_fifty_corrupt_files_in_a_thousand(name: str, tmp_path: Path) -> None:
    """Other images of their class replace them; they are counted and listed, and no row is lost."""
    pieces(tmp_path, 500, [(24, 24)])
    pieces(tmp_path / "more", 10, [(24, 24)], parts=("val",))
    shutil.move(tmp_path / "more" / "val", tmp_path / "val")
    kinds = [*BAD.values(), rotten()]
    names = set()
    for number in range(0, 500, 10):
        file = tmp_path / "train" / ("china", "flower")[number % 20 == 0] / f"{number:03}.jpg"
        file.write_bytes(kinds[number // 10 % len(kinds)])
        if kinds[number // 10 % len(kinds)] != rotten() or not readable(file):
            names.add(file.relative_to(tmp_path).as_posix())
    (tmp_path / "val" / "china" / "003.jpg").write_bytes(b"")
    found = in_another_process(tmp_path, name, skip_corrupt=True)
    assert isinstance(found, dict)
    assert 40 < len(names) <= 50 and set(found["bad"]) == names | {"val/china/003.jpg"}
    assert len(found["labels"]) == 1000 and np.bincount(found["labels"]).tolist() == [500, 500]
    assert len(found["ids"]) == 19 and 3 not in found["ids"]


def readable(path: Path) -> bool:
    from dml_fast.data.decode import decode_image
    from dml_fast.data.storage import CorruptImageError

    try:
        decode_image(path.read_bytes())
    except CorruptImageError:
        return False
    return True


@pytest.mark.parametrize("name", STREAMING)
def test_what_replaces_a_file_does_not_depend_on_when_it_was_found(
    name: str, tmp_path: Path
) -> None:
    pieces(tmp_path, 20, [(24, 24)], parts=("train", "val"))
    for number in (3, 4, 11):
        (tmp_path / "train" / "china" / f"{number:03}.jpg").write_bytes(b"")

    def ids(start: int) -> list[list[int]]:
        loader = loader_of(opened(tmp_path, name, skip_corrupt=True), Augmentation(pad=2))
        found = [batch.ids.tolist() for batch in loader.epoch(0, start)]
        loader.close()
        return found

    straight = ids(0)
    assert straight[2:] == ids(2) and straight[3:] == ids(3)
    assert not {i for batch in straight for i in batch} & {3, 4, 11}


@pytest.mark.parametrize("name", STREAMING)
def test_a_folder_of_nothing_but_corrupt_files(name: str, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(9):
            (tmp_path / "train" / label / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 18 images.*can be decoded"):
        opened(tmp_path, name, skip_corrupt=True)
    with pytest.raises(UserError, match=r"none of 16 images of 16.* can be decoded"):
        evaluated(tmp_path, name, skip_corrupt=True)


@pytest.mark.parametrize("name", ALL)
def test_empty_folders_are_refused(name: str, tmp_path: Path) -> None:
    for make, message in [
        ("nothing", "does not exist"),
        ("empty/", "is empty"),
        ("a/other/", "has no train folder"),
        ("b/train/", "has no class folders"),
        ("c/train/x/", "holds no images"),
    ]:
        if make.endswith("/"):
            (tmp_path / make).mkdir(parents=True)
        with pytest.raises(UserError, match=message):
            opened(tmp_path / make.partition("/")[0], name)


@pytest.mark.dali
def test_a_batch_that_dali_cannot_decode_is_decoded_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and the batch has the same pixels."""
    from dml_fast.data.loaders.dali import DaliDecoder

    pieces(tmp_path, 20, [(24, 24)], parts=("train", "val"))
    data = opened(tmp_path, "dali")
    expected = [batch.inputs for batch in loader_of(data).epoch(0)]
    real, calls = DaliDecoder._outputs, []

    def outputs(self: DaliDecoder) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("Critical error in pipeline:\nFailed to decode sample #1")
        return real(self)

    monkeypatch.setattr(DaliDecoder, "_outputs", outputs)
    loader = loader_of(data)
    found = [batch.inputs for batch in loader.epoch(0)]
    assert len(found) == len(expected) == 5
    assert all(map(torch.equal, found, expected))
    assert [r.message for r in caplog.records if "DALI" in r.message] == [
        "Pillow decoded a batch that DALI could not decode (Failed to decode sample #1)"
    ]
