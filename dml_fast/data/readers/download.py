"""Download a file over HTTP; a partial or wrong download leaves no file."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import logging
import os
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from dml_fast.errors import UserError, masked

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30
_MINUTE_S = 60.0
_SLOWEST = 1024  # bytes per second over a minute: a server that sends less is given up
_log = logging.getLogger("dml_fast")


def download(
    url: str, path: Path, sha256: str = "", check: Callable[[Path], str] | None = None
) -> None:
    """Download a file; its folder is created if it does not exist.

    The file gets its name when it is complete on the disk, and its hash and content are right. A
    download that fails leaves no file. Only http and https are used, after redirects too.

    Args:
        url: where to download from; ``user:password@`` before the host is sent to it.
        path: where to put the file.
        sha256: the hash of the file; "" if it is not known.
        check: says what is wrong with the content of a file; "" if nothing is.

    Raises:
        UserError: the server or the disk failed, or the hash or the content is wrong.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, partial)
        if sha256 and found != sha256:
            raise UserError(
                f"{url} arrived with SHA-256 {found} instead of {sha256}: try again, or "
                f"fetch it by other means and put it at {path}"
            )
        if check is not None and (problem := check(partial)):
            raise ValueError(f"what arrived is {problem}")
        os.replace(partial, path)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, http.client.HTTPException) as error:
        # URLError and timeouts are OSErrors
        why = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise UserError(
            f"could not download {url} to {path} ({why}): check the network and the disk, "
            "or fetch the file by other means and put it there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _fetch(url: str, path: Path) -> str:
    """Write the file, log every tenth of it, and return its SHA-256."""
    digest = hashlib.sha256()
    with _opener().open(_request(url), timeout=_TIMEOUT_S) as source, path.open("wb") as target:
        expected = min(source.length or 0, 1 << 62)  # None if the server states none, or no number
        if expected > (free := shutil.disk_usage(path.parent).free):
            raise OSError(f"it has {expected} bytes, and {free} are free on the disk")
        done = tenths = 0
        began, before = time.monotonic(), 0
        _log.info("downloading %s (%.0f MB)", masked(url), expected / 1e6)
        while chunk := source.read1(_CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if expected and done * 10 // expected > tenths:
                tenths = done * 10 // expected
                _log.info("downloaded %d%% of %s", tenths * 10, path.name)
            if (passed := time.monotonic() - began) > _MINUTE_S:
                if done - before < passed * _SLOWEST:
                    raise TimeoutError(f"{done - before} bytes arrived in {passed:.0f} seconds")
                began, before = time.monotonic(), done
        target.flush()
        os.fsync(target.fileno())
    if done < expected:
        raise EOFError(f"the connection ended after {done} of {expected} bytes")
    return digest.hexdigest()


def _request(url: str) -> urllib.request.Request:
    """Make a request; a password goes into a header, which is not sent on after a redirect."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    if at:
        secret = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


def _opener() -> urllib.request.OpenerDirector:
    """Return what opens URLs: as in `urllib.request`, without ftp, file and data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        _HTTPHandler,
        _HTTPSHandler,
    ):
        opener.add_handler(handler())
    return opener


class _InAMinute:
    """A connection that breaks off if the headers of an answer take more than a minute."""

    sock: socket.socket | None

    def getresponse(self, *args: Any) -> Any:
        watch = threading.Timer(_MINUTE_S, self._break_off)
        watch.daemon = True
        watch.start()
        try:
            return super().getresponse(*args)  # type: ignore[misc]
        finally:
            watch.cancel()

    def _break_off(self) -> None:
        if (sock := self.sock) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _HTTP(_InAMinute, http.client.HTTPConnection):
    pass


class _HTTPS(_InAMinute, http.client.HTTPSConnection):
    pass


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_HTTP, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_HTTPS, request, context=self._context)  # type: ignore[attr-defined]
