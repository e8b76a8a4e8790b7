"""Files that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dml_fast.runs.files import atomic_write


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def rename(source: Any, target: Any) -> None:
        events.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    for content in (b"1", b"2"):
        with atomic_write(tmp_path / "last", keep_old_as=tmp_path / "previous") as file:
            file.write(content)
    assert events == [
        "file", "name last", "folder",
        "file", "name previous", "name last", "folder",
    ]  # fmt: skip
    assert (tmp_path / "previous").read_bytes() == b"1"
