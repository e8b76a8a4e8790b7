"""Files that are replaced whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dml_fast.runs.files import atomic_write, link, point_to


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


def test_a_second_name_that_is_there_already_leaves_no_temporary(tmp_path: Path) -> None:
    """rename() does nothing for two names of one file, and would leave both."""
    (tmp_path / "last.pt").write_bytes(b"1")
    for _ in range(2):
        link(tmp_path / "last.pt", tmp_path / "best.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt"}
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt")


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failure_leaves_no_temporary(
    tmp_path: Path, failing: str, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "last.pt", tmp_path / "best.pt"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    def fail(*names: Any) -> None:
        raise OSError(28, "No space left on device")

    if not linked:  # a file system without hard links
        monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, failing, fail)
    for make in (lambda: link(source, target), lambda: point_to(target, "last.pt")):
        with suppress(OSError):
            make()
        assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt"}


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes
    with atomic_write(path) as file:
        file.write(b"1")
    link(path, tmp_path / ("x" * 255))
    assert path.read_bytes() == (tmp_path / ("x" * 255)).read_bytes() == b"1"
