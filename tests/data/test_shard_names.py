"""Shards at URLs: downloaded once into the cache folder, by one process on a machine at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, serving
from shard_cases import both, opened

from dml_fast.data import check_data_spec, open_dataset
from dml_fast.errors import UserError


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Server]]]:
    """Serve tmp_path/shards; the cache is tmp_path/cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(tmp_path) as (address, handler):
        yield f"{address}/shards", handler


def test_they_are_fetched_once_and_give_what_the_folder_gives(
    server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    _, shards = both(tmp_path)
    url, handler = server
    spec = f"shards:{url}/{{train-{{000..004}},val-{{000..004}}}}.tar"
    check_data_spec(spec)
    assert not handler.asked
    first = open_dataset(spec, loader="fallback")
    local = opened(shards)
    assert first.fingerprint == local.fingerprint and first.classes == local.classes
    assert first.name == "shards" and len(handler.asked) == len(set(handler.asked)) == 11
    again = open_dataset(spec + "?signature=another", loader="resident")
    assert again.fingerprint == first.fingerprint and len(handler.asked) == 11
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_without_names_of_classes_the_server_is_asked_once(
    server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    _, shards = both(tmp_path)
    (shards / "classes.txt").unlink()
    url, handler = server
    for _ in range(2):
        data = open_dataset(f"shards:{url}/train-000.tar", loader="fallback")
        assert data.classes == ("0",) and len(handler.asked) == 2


def test_servers_that_do_not_answer_or_break_off(
    server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    both(tmp_path)
    url, handler = server
    handler.cut = "train-001.tar"
    for spec, message in [
        (
            f"{url}/train-{{000..001}}.tar",
            r"could not download .*train-001\.tar .*ended after 5000",
        ),
        (f"{url}/no.tar", r"could not download .*no\.tar to .* \(File not found\)"),
        ("http://127.0.0.1:9/train-000.tar", r"could not download .*\(.*refused\)"),
        ("http://127.0.0.1:x/train.tar", r"could not download .*nonnumeric port"),
        (
            "http://127.0.0.1:9/größe 1.tar",
            r"could not download .*gr%C3%B6%C3%9Fe%201\.tar to .*größe 1",
        ),
        ("http://nowhere.invalid/train-000.tar", r"could not download .*nowhere\.invalid"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_dataset(f"shards:{spec}")
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.part"))
    handler.cut, asked = "", len(handler.asked)
    open_dataset(f"shards:{url}/train-{{000..001}}.tar", loader="fallback")
    assert handler.asked[asked:] == ["/shards/train-001.tar", "/shards/classes.txt"]


def test_a_cache_that_cannot_be_written(
    server: tuple[str, type[Server]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"be created \(Not a directory\): set XDG_CACHE_HOME"):
        open_dataset(f"shards:{server[0]}/train-000.tar")


@pytest.mark.slow
def test_two_processes_fetch_each_shard_once_and_a_killed_one_leaves_nothing(
    server: tuple[str, type[Server]], tmp_path: Path
) -> None:
    both(tmp_path)
    url, handler = server
    handler.slow = 0.3
    spec = f"shards:{url}/train-{{000..004}}.tar"
    code = f"from dml_fast.data import open_dataset; print(open_dataset({spec!r}).fingerprint)"
    command = [sys.executable, "-c", code]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))

    killed = start()
    while len(handler.asked) < 3:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    stale = tmp_path / "cache" / "dml_fast" / "shards" / "127.0.0.1_1" / "x.tar.1.part"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    there = {path.name for path in (tmp_path / "cache").rglob("*.tar")}
    asked = len(handler.asked)
    printed = [process.communicate()[0] for process in (start(), start())]
    assert printed[0] == printed[1] and len(printed[0]) == 65
    missing = {f"/shards/train-{n:03}.tar" for n in range(5)} - {f"/shards/{n}" for n in there}
    assert sorted(handler.asked[asked:]) == sorted({*missing, "/shards/classes.txt"})
    assert not list((tmp_path / "cache").rglob("*.part"))
