"""Servers of every kind: what they send is checked before it gets its name, and secrets stay."""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from serving import Server, serving
from shard_cases import both

from dml_fast.data import open_dataset
from dml_fast.data.readers import download as module
from dml_fast.data.readers.download import download
from dml_fast.errors import UserError

Served = tuple[str, type[Server]]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(tmp_path) as server:
        yield server


def cached(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "cache").rglob("*") if path.is_file())


PAGE = b"<!DOCTYPE html><html>please sign in</html>"


Answer = Callable[[Server, bytes], object]
FAILED = "could not download"
ANSWERS: dict[str, tuple[str, Answer]] = {
    "page": ("no whole tar: not a tar file", lambda s, _: s.send(PAGE * 50, {})),
    "empty": ("no whole tar: empty", lambda s, _: s.send(b"", {})),
    "nothing": ("no whole tar: empty", lambda s, _: s.send(b"", {"Content-Length": "0"})),
    "cut": ("no whole tar: truncated", lambda s, tar: s.send(tar[:5000], {})),
    "header": ("no whole tar: truncated", lambda s, tar: s.send(tar[:512], {})),
    "short": ("ended after 900 of", lambda s, t: s.send(t[:900], {"Content-Length": str(len(t))})),
    "chunk": (FAILED, lambda s, _: s.send(b"100\r\nfew", {"Transfer-Encoding": "chunked"})),
    "huge": ("are free on the disk", lambda s, _: s.send(b"", {"Content-Length": "9" * 4000})),
    "ftp": ("unknown url type: ftp", lambda s, _: s.send(b"", {"Location": "ftp://h/x"}, 302)),
    "file": ("not allowed", lambda s, _: s.send(b"", {"Location": "file:///etc/passwd"}, 302)),
    "data": ("not allowed", lambda s, _: s.send(b"", {"Location": "data:,x"}, 302)),
    "loop": ("infinite loop", lambda s, _: s.send(b"", {"Location": s.path}, 302)),
    "error": (FAILED, lambda s, _: s.send(b"", {}, 500)),
    "no http": (FAILED, lambda s, _: s.wfile.write(b"no http\r\n\r\n")),
    "long": (FAILED, lambda s, _: s.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000)),
    "silent": (FAILED, lambda s, _: None),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_no_shard_is_never_cached(name: str, served: Served, tmp_path: Path) -> None:
    message, answer = ANSWERS[name]
    _, shards = both(tmp_path, 5, parts=("train",))
    address, server = served
    tar = (shards / "train-000.tar").read_bytes()
    spec = f"shards:{address}/shards/train-000.tar"
    server.answers["/shards/train-000.tar"] = lambda handler: answer(handler, tar)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(spec)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    assert not cached(tmp_path)
    server.answers.clear()
    assert len(open_dataset(spec, loader="fallback").train) == 9


@pytest.mark.parametrize("length", ["abc", "-5", "1e9", "9" * 5000, "\xb2"])
def test_a_length_that_is_no_number_is_not_used(
    length: str, served: Served, tmp_path: Path
) -> None:
    address, server = served
    server.answers["/x"] = lambda handler: handler.send(b"content", {"Content-Length": length})
    download(f"{address}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"content"


def test_a_page_is_no_list_of_classes_and_a_busy_server_is_no_answer(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dml_fast")
    both(tmp_path, 5, parts=("train",))
    address, server = served
    spec = f"shards:{address}/shards/train-000.tar"
    for answer, message in [
        (lambda handler: handler.send(PAGE, {}), "an HTML page"),
        (lambda handler: handler.send(b"", {}, 429), "Too Many Requests"),
    ]:
        server.answers["/shards/classes.txt"] = answer
        with pytest.raises(UserError, match=message):
            open_dataset(spec)
        assert cached(tmp_path) == ["train-000.tar"]
    server.answers["/shards/classes.txt"] = lambda handler: handler.send(b"", {}, 404)
    assert open_dataset(spec, loader="fallback").classes == ("0", "1")
    assert any("has no classes.txt (404)" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_of_a_few_bytes_a_minute_is_given_up(
    part: str, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MINUTE_S", 0.3)
    done = threading.Event()

    def trickle(handler: Server) -> None:
        if part == "body":
            handler.send(b"", {})
        while not done.wait(0.02):
            handler.wfile.write(b"a")
            handler.wfile.flush()

    address, server = served
    server.answers["/x"] = trickle
    try:
        with pytest.raises(UserError, match="could not download"):
            download(f"{address}/x", tmp_path / "x")
    finally:
        done.set()
    assert not (tmp_path / "x").exists()


def test_passwords_and_signatures_are_in_no_error_and_no_log(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The password reaches the server, and no other one after a redirect."""
    caplog.set_level(logging.DEBUG)
    both(tmp_path, 5, parts=("train",))
    address, server = served
    seen = []

    def look(handler: Server) -> None:
        seen.append(handler.headers.get("Authorization"))
        if handler.path == "/moved":
            handler.send(b"", {"Location": "/shards/train-000.tar"}, 302)
        else:
            handler.send(b"", {}, 403)

    server.answers |= {"/moved": look, "/secret.tar?token=hidden": look}
    secret = address.replace("//", "//user:xy%40zzy@plugh:x@")
    download(f"{secret}/moved", tmp_path / "x")
    messages = []
    for spec in (
        f"shards:{secret}/secret.tar?token=hidden",
        f"shards:{secret}/no-{{0..1}}.tar?token=hidden",
        f"shards:{secret}/*.tar?token=hidden",
        f"shards:{secret.replace('127.0.0.1', 'nowhere.invalid')}/x.tar?token=hidden",
        f"shards:{secret.replace('http:', 's3:')}/x.tar",
        f"unknown:{secret}/x.tar?token=hidden",
    ):
        with pytest.raises(UserError) as caught:
            open_dataset(spec)
        messages.append(str(caught.value))
    messages += [record.getMessage() for record in caplog.records]
    assert len(messages) > 7
    assert not [m for m in messages if any(s in m for s in ("xy%40", "zzy", "plugh", "hidden"))]
    expected = base64.b64encode(b"user:xy@zzy@plugh:x").decode()
    assert seen == [f"Basic {expected}"] * 2


def test_an_interrupt_ends_a_download_and_leaves_nothing(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one: `StopRequest` keeps it for the loop only while there is a loop."""
    import os
    import signal

    from dml_fast.training.signals import StopRequest

    done = threading.Event()

    def wait(handler: Server) -> None:
        handler.send(b"a" * 100_000, {"Content-Length": "200000"})
        os.kill(os.getpid(), signal.SIGINT)
        done.wait(20)

    address, server = served
    server.answers["/x"] = wait
    began = time.monotonic()
    stop = StopRequest()
    try:
        with pytest.raises(KeyboardInterrupt), stop, stop.at_once():
            download(f"{address}/x", tmp_path / "new" / "x")
    finally:
        done.set()
    assert time.monotonic() - began < 15 and not list((tmp_path / "new").iterdir())
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # the handler runs between two instructions
        assert stop.signal
        with suppress(SystemExit), stop.at_once():
            pytest.fail("it had been asked to stop")
