"""Find the files of a ``shards:`` spec: a folder, braces, globs, or URLs, downloaded once."""

from __future__ import annotations

import glob
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from dml_fast.data.listing import BESIDE, OTHER, PassedOver, entries, is_folder
from dml_fast.data.readers.download import download
from dml_fast.data.readers.tar import problem_of
from dml_fast.errors import UserError, reason
from dml_fast.machine import locked

PARTS = ("train", "val", "test")
CLASSES = "classes.txt"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_PART = re.compile(rf"(?<![a-zA-Z])({'|'.join(PARTS)})")
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_MISSING = (401, 403, 404, 410)  # what servers answer for a file that they do not have
_MOST = 1_000_000  # names: more would be a mistake
_log = logging.getLogger("dml_fast")


class ShardNames(NamedTuple):
    """The shards of a data set.

    Attributes:
        root: a folder that holds all of them, directly or in folders below it.
        parts: the sorted shards of train, val and test; a part without shards is left out.
        passed: what else is there.
    """

    root: Path
    parts: dict[str, list[Path]]
    passed: PassedOver


def check_shards(spec: str) -> None:
    """Check that shards exist, without reading them or asking a server.

    Raises:
        UserError: they do not.
    """
    if (names := _expand(spec)) and _are_urls(spec, names):
        _cached(names)
    else:
        _sorted_out(spec, *_local(spec, names, PassedOver()), PassedOver())


def find_shards(spec: str) -> ShardNames:
    """Find the shards, and download those at URLs that are not in the cache folder yet.

    Args:
        spec: DIR, or paths or URLs with braces (``{000..009}``, ``{a,b}``); paths may be globs.

    Raises:
        UserError: there are none, or one cannot be downloaded.
    """
    names, passed = _expand(spec), PassedOver()
    if not _are_urls(spec, names):
        return _sorted_out(spec, *_local(spec, names, passed), passed)
    targets = _cached(names)
    found = list(targets.values())
    _fetch(targets)
    return _sorted_out(spec, _common(found), found, passed)


def _expand(spec: str) -> list[str]:
    """Expand braces, innermost first, as a shell and WebDataset do; return the names, sorted."""
    names, whole = {spec}, os.path.exists(os.path.expanduser(spec))
    while not whole and any(_BRACES.search(name) for name in names):
        wider: set[str] = set()
        for name in names:
            if (match := _BRACES.search(name)) is None:
                wider.add(name)
                continue
            start, end = match.span()
            wider |= {name[:start] + choice + name[end:] for choice in _choices(match[1])}
            if len(wider) > _MOST:
                raise UserError(f"shards:{spec} names more than {_MOST} files: check its braces")
        names = wider
    return sorted(names)


def _choices(content: str) -> list[str]:
    if (numbers := _RANGE.fullmatch(content)) is None:
        return content.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < _MOST:
        raise UserError(
            f"shards: {{{content}}} counts {'down' if last < first else 'too far'}: write the "
            "first and the last number, as in {000..009}"
        )
    return [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]


def _are_urls(spec: str, names: list[str]) -> bool:
    schemes = {match[1].lower() for name in names if (match := re.match(r"(\w+)://", name))}
    if unknown := schemes - {"http", "https"}:
        raise UserError(
            f"shards:{spec} is at {min(unknown)}://, which is not supported: give an https:// "
            "URL, or mount or copy it and give the folder"
        )
    return bool(schemes)


def _local(spec: str, names: list[str], passed: PassedOver) -> tuple[Path, list[Path]]:
    """Return a folder and the shards in it."""
    root = Path(os.path.expanduser(spec))
    if os.path.isdir(root):
        found = _tars(root, passed)
        for part in PARTS:
            if os.path.isdir(root / part):
                found += _tars(root / part, passed)
        if not found:
            there = f" (but {text})" if (text := passed.text(root)) else ""
            raise UserError(
                f"shards:{spec} holds no tar files{there}: put train-000.tar and so on there, or "
                f"in {root / 'train'}"
            )
        return root, found
    found = []
    for name in names:
        path = os.path.abspath(os.path.expanduser(name))
        matches = [path] if os.path.exists(path) else glob.glob(path)
        if not matches:
            raise UserError(f"shards:{spec} does not exist: there is no {path}")
        found += map(Path, matches)
    return _common(found), sorted(set(found))


def _tars(folder: Path, passed: PassedOver) -> list[Path]:
    found = []
    for entry in entries(folder, passed):
        if entry.name.endswith(".tar"):
            found.append(Path(entry.path))
        elif _COMPRESSED.search(entry.name):
            passed.add("compressed", entry.path)
        elif is_folder(entry):
            if entry.name not in PARTS:
                passed.add(BESIDE, entry.path)
        elif entry.name != CLASSES:
            passed.add(OTHER, entry.path)
    return found


def _common(files: list[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def _sorted_out(spec: str, root: Path, files: list[Path], passed: PassedOver) -> ShardNames:
    """Sort shards into training, validation and test shards by their names below ``root``."""
    parts: dict[str, list[Path]] = {"": [], **{part: [] for part in PARTS}}
    for file in files:
        match = _PART.search(file.relative_to(root).as_posix())
        parts[match[1] if match else ""].append(file)
    unnamed = parts.pop("")
    if unnamed and len(unnamed) < len(files):
        raise UserError(
            f"{unnamed[0]} is not named train, val or test, as other shards are: put one of these "
            "words into its name"
        )
    parts["train"] += unnamed
    if not parts["train"]:
        raise UserError(f"shards:{spec} has no training shards: add some, such as train-000.tar")
    whole = {part: sorted(found) for part, found in parts.items() if found}
    return ShardNames(root, whole, passed)


def _cached(names: list[str]) -> dict[str, Path]:
    """Return where each URL is cached: by host and path, since a query may be a signature."""
    targets: dict[str, Path] = {}
    for name in names:
        name = quote(name, safe="%/:=&?~#+!$,;'@()*[]", errors="surrogateescape")
        try:
            url = urlsplit(name)
        except ValueError:
            url = urlsplit("")
        path = unquote(url.path, errors="surrogateescape")
        pieces = [piece for piece in path.split("/") if piece not in ("", ".", "..")]
        file = pieces and not url.path.endswith("/")
        host = url.netloc.rpartition("@")[2].replace(":", "_")
        known = url.scheme.lower() in ("http", "https") and host not in ("", ".", "..")
        if not known or not file or "\0" in path:
            raise UserError(
                f"shards: {name} is not the URL of a file: write https://HOST/PATH/NAME.tar"
            )
        if "*" in url.path:
            raise UserError(
                f"shards: {name}: a server lists no files, so write {{000..009}} and not *"
            )
        target = _cache().joinpath(host, *pieces)
        if target in targets.values():
            raise UserError(f"shards: {name} differs from another URL only after its ?: rename it")
        targets[name] = target
    return targets


def _cache() -> Path:
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(home) / "dml_fast" / "shards"


def _fetch(targets: dict[str, Path]) -> None:
    classes = _common(list(targets.values())) / CLASSES
    if os.path.exists(classes) and all(os.path.exists(path) for path in targets.values()):
        return
    with _alone(_cache()) as cache:
        for stale in cache.rglob("*.part"):  # left by a process that was killed
            stale.unlink()
        for number, (url, path) in enumerate(targets.items(), 1):
            if not os.path.exists(path):
                _log.info("downloading shard %d of %d to %s", number, len(targets), path)
                download(url, path, check=problem_of)
        if not os.path.exists(classes):
            _fetch_classes(list(targets), classes)


def _fetch_classes(urls: list[str], path: Path) -> None:
    """Download the file of class names; if there is none, make an empty one."""
    split = [urlsplit(url) for url in urls]
    folder = posixpath.commonpath([posixpath.dirname(url.path) for url in split])
    try:
        download(
            urlunsplit((split[0].scheme, split[0].netloc, posixpath.join(folder, CLASSES), "", "")),
            path,
            check=_no_names,
        )
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, HTTPError) or cause.code not in _MISSING:
            raise
        _log.info("%s has no %s (%s): classes are numbers", split[0].hostname, CLASSES, cause.code)
        path.touch()


def _no_names(path: Path) -> str:
    """Say why a file is no list of names: servers send pages where a file is missing."""
    start = path.read_bytes()[:1000].lstrip().lower()
    return "an HTML page" if start.startswith((b"<!doctype", b"<html", b"<?xml")) else ""


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Lock the cache folder: other processes on this machine wait until its files are complete."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, lambda: _say_that_it_waits(folder)))
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be created ({reason(error)}): set "
                "XDG_CACHE_HOME to a folder with room for the shards"
            ) from error
        yield folder


def _say_that_it_waits(folder: Path) -> None:
    _log.info("another process downloads to %s: waiting for it", folder)
