"""Which files a reader takes, and what it passes over."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator

from dml_fast.data.storage import is_image
from dml_fast.errors import UserError, reason
from dml_fast.foreign import shown

_NAMED = 3  # of each kind
_log = logging.getLogger("dml_fast")

HIDDEN, OTHER, BESIDE = "hidden", "of another kind", "beside the parts"
LOST, LOOP = "links to nothing", "links to a folder above"


class PassedOver:
    """What a reader passes over: counted by kind, with the first names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count a file, a folder or a member of a tar, by its path."""
        self.counts[kind] += 1
        if self.counts[kind] <= _NAMED:
            self._names.setdefault(kind, []).append(name)

    def merge(self, other: PassedOver) -> None:
        """Count what another reader passed over."""
        for kind, names in other._names.items():
            mine = self._names.setdefault(kind, [])
            mine += names[: _NAMED - len(mine)]
        self.counts += other.counts

    def text(self, root: str | os.PathLike[str]) -> str:
        """Return counts and the first names, relative to a folder; "" if there is nothing."""
        pieces = []
        for kind, count in self.counts.items():
            names = ", ".join(shown(os.path.relpath(name, root)) for name in self._names[kind])
            pieces.append(f"{count} {kind} ({names}{', ...' if count > _NAMED else ''})")
        return "; ".join(pieces)

    def report(self, root: str | os.PathLike[str], level: int = logging.INFO) -> None:
        """Log everything in one line, if there is anything."""
        if text := self.text(root):
            _log.log(level, "in %s was passed over: %s", shown(root), text)


def entries(folder: str | os.PathLike[str], passed: PassedOver) -> list[os.DirEntry[str]]:
    """Return what is in a folder and not hidden, sorted by name.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            everything = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be listed ({reason(error)}): make it readable, or move "
            "it away"
        ) from error
    for entry in everything:
        if entry.name.startswith("."):
            passed.add(HIDDEN, entry.path)
    return [entry for entry in everything if not entry.name.startswith(".")]


def take_image(entry: os.DirEntry[str], passed: PassedOver) -> bool:
    """Return whether an entry, which is no folder, is an image file, by its name.

    A link to nothing with the name of an image is one that cannot be read. A pipe is none: to read
    it would wait for ever.
    """
    lost = entry.is_symlink() and not os.path.exists(entry.path)
    if is_image(entry.name) and (lost or os.path.isfile(entry.path)):
        return True
    passed.add(LOST if lost else OTHER, entry.path)
    return False


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    # DirEntry.is_dir() raises an error for a link to itself
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def images_below(folder: str | os.PathLike[str], passed: PassedOver) -> list[str]:
    """Return the paths of all image files below a folder, in torchvision's order.

    That is the order of `torchvision.datasets.ImageFolder`: folders by path, then files by name.
    Links to folders are followed, except to a folder above.

    Args:
        folder: the folder.
        passed: counts what is left out.

    Raises:
        UserError: a folder cannot be listed.
    """
    return [path for _, paths in sorted(_walk(os.fspath(folder), passed)) for path in paths]


def _walk(folder: str, passed: PassedOver) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below with its image files."""
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, (_identity(folder),))]
    while waiting:
        folder, above = waiting.pop()
        paths = []
        for entry in entries(folder, passed):
            if not is_folder(entry):
                if take_image(entry, passed):
                    paths.append(entry.path)
            elif entry.is_symlink() and _identity(entry.path) in above:
                passed.add(LOOP, entry.path)
            else:
                waiting.append((entry.path, (*above, _identity(entry.path))))
        yield folder, paths


def _identity(folder: str) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be read ({reason(error)}): move it away"
        ) from error
    return found.st_dev, found.st_ino
