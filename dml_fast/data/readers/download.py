"""Download a file; a partial or wrong download leaves no file."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

from dml_fast.errors import UserError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30
_log = logging.getLogger("dml_fast")


def download(url: str, path: Path, sha256: str = "") -> None:
    """Download a file; its folder is created if it does not exist.

    The file gets its name when it is complete on the disk and its hash is right. A download that
    fails leaves no file.

    Args:
        url: where to download from.
        path: where to put the file.
        sha256: the hash of the file; "" if it is not known.

    Raises:
        UserError: the server or the disk failed, or the hash is wrong.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _fetch(url, partial)
        if sha256 and found != sha256:
            raise UserError(
                f"{url} arrived with SHA-256 {found} instead of {sha256}: try again, or fetch "
                f"it by other means and put it at {path}"
            )
        os.replace(partial, path)
    except (OSError, EOFError, HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"could not download {url} to {path} ({reason}): check the network and the disk, or "
            "fetch the file by other means and put it there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _fetch(url: str, path: Path) -> str:
    """Write the file, log every tenth of it, and return its SHA-256."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as source, path.open("wb") as target:
        expected = int(source.headers.get("Content-Length") or 0)
        done = tenths = 0
        _log.info("downloading %s (%.0f MB)", url, expected / 1e6)
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if expected and done * 10 // expected > tenths:
                tenths = done * 10 // expected
                _log.info("downloaded %d%% of %s", tenths * 10, path.name)
        target.flush()
        os.fsync(target.fileno())
    if done < expected:
        raise EOFError(f"the connection ended after {done} of {expected} bytes")
    return digest.hexdigest()
