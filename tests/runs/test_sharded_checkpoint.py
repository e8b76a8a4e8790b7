"""Checkpoints in several files, written and read by one process."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import checkpoint_state
from torch.distributed.checkpoint.filesystem import FileSystemReader

from dml_fast.distributed.world import World
from dml_fast.errors import CheckpointError, UserError
from dml_fast.runs import checkpoint, sharded_checkpoint
from dml_fast.runs.folder import Run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def save(run: Run, step: int) -> dict[str, Any]:
    state = checkpoint_state(step)
    sharded_checkpoint.save(run, state, World.alone(2))
    return state


def test_it_comes_back_and_folders_without_a_link_go(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 1, 2):  # after a crash a run reaches a step again
        saved = save(run, step)
    run.remove_unused_parts()
    assert {p.name for p in tmp_path.glob("checkpoint_*")} == {
        "checkpoint_00000001-1", "checkpoint_00000002",
    }  # fmt: skip
    found = checkpoint.load(run.checkpoint())
    assert found["step"] == 2 and checkpoint.load(run.checkpoint("previous"))["step"] == 1
    for mine, theirs in zip(found["students"], saved["students"], strict=True):
        assert mine["model"].keys() == theirs["model"].keys()
        assert all(torch.equal(mine["model"][k], theirs["model"][k]) for k in mine["model"])
    assert torch.equal(found["rng"][0]["torch"], saved["rng"][0]["torch"])


def test_a_failed_write_names_the_rank_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharded_checkpoint.FileSystemWriter, "write_data", full)
    with pytest.raises(CheckpointError, match=r"^rank 0: No space left on device$"):
        save(Run(tmp_path), 1)


def test_a_lost_file_is_found_without_checksums_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    save(run, 1)
    for part in run.checkpoint().glob("*.distcp"):
        part.unlink()
    with pytest.raises(UserError, match=r"last\.pt is damaged \(__0_0\.distcp is missing"):
        checkpoint.load(run.checkpoint(), verify=False)


def refused(run: Run, why: str, *, verify: bool = True) -> None:
    words = r"/(last\.pt|checksums\.json) (is damaged|was not loaded|cannot be read)"
    with pytest.raises(UserError, match=rf"{words}.*({why}).*: (use|restore)"):
        checkpoint.load(run.checkpoint(), verify=verify)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    save(run, 1)
    return run


@pytest.mark.parametrize(
    ("sums", "why"),
    [
        ({}, r"checksums\.json has no \.metadata"),
        ({".metadata": None}, r"'\.metadata' is None and not a whole number"),
        ([], "is a list of length 0 and not an object"),
        ({"__0_0.distcp": 1}, r"checksums\.json has no \.metadata"),
        ({"../secret": 1}, r"names '\.\./secret', which is no file of a checkpoint"),
        ({"checksums.json": 1}, "which is no file of a checkpoint"),
        ({"__1_0.distcp": 1}, r"__1_0\.distcp is missing"),
        ({"__0_0.distcp": 1}, r"bad checksum of __0_0\.distcp"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_checksums_name_exactly_the_files(run: Run, sums: Any, why: str, verify: bool) -> None:
    """A folder without its checksums is damaged, and not one without sums to compare."""
    path = run.checkpoint() / "checksums.json"
    if isinstance(sums, dict) and len(sums) and "has no" not in why:
        sums = json.loads(path.read_text()) | sums
    path.write_text(json.dumps(sums))
    if "bad checksum" in why and not verify:
        assert checkpoint.load(run.checkpoint(), verify=False)
    else:
        refused(run, why, verify=verify)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "checksums.json"])
@pytest.mark.parametrize("other", ["link", "folder", "pipe"])
def test_what_is_no_file_of_the_folder_is_not_read(run: Run, name: str, other: str) -> None:
    path = run.checkpoint() / name
    path.rename(run.folder / "elsewhere")
    if other == "link":
        path.symlink_to(run.folder / "elsewhere")
    elif other == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    refused(run, "is missing, or a link")


@pytest.mark.parametrize(
    "target", ["../other/checkpoint_00000001", "checkpoint_2/../x", "/tmp", "."]
)
def test_a_link_out_of_the_run_is_not_followed(run: Run, target: str) -> None:
    copy = Path(
        shutil.copytree(run.checkpoint(), run.folder.parent / "other" / "checkpoint_00000001")
    )
    assert checkpoint.load(copy)["step"] == 1  # a whole one
    for place in ("checkpoint_2", "x"):
        (run.folder / place).mkdir()
    run.checkpoint().unlink()
    run.checkpoint().symlink_to(target)
    refused(run, "it is a link to")
    run.checkpoint().unlink()  # a link in the run to a link out of it
    (run.folder / "checkpoint_3").symlink_to(copy)
    run.checkpoint().symlink_to("checkpoint_3")
    refused(run, "it is a link to")


def test_a_copy_without_links_is_read(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "copy", symlinks=False)
    assert not Run(tmp_path / "copy").checkpoint().is_symlink()
    assert checkpoint.load(Run(tmp_path / "copy").checkpoint())["step"] == 1


def test_a_tensor_is_the_one_that_the_index_names(run: Run) -> None:
    """Checksums aside: a hostile folder has the right ones."""
    folder = run.checkpoint()
    index = FileSystemReader(str(folder.resolve())).read_metadata()
    index.state_dict_metadata["meter"].properties.dtype = torch.int8
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    refused(run, "is not the one that", verify=False)
    with pytest.raises(UserError, match=r"bad checksum of \.metadata"):
        checkpoint.load(folder)


def test_a_place_that_is_read_many_times_is_refused(run: Run) -> None:
    """So that a small folder cannot ask for much memory."""
    folder = run.checkpoint()
    index = FileSystemReader(str(folder.resolve())).read_metadata()
    for place in index.storage_data.values():
        place.offset, place.length = 0, (folder / "__0_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    refused(run, "its tensors are larger than its files", verify=False)
