"""Checkpoints in several files, written and read by one process."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import checkpoint_state

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
