"""Files that cannot be decoded: refused, or skipped and listed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from dml_fast.errors import UserError

_log = logging.getLogger("dml_fast")


class BadImage(NamedTuple):
    """A file that could not be decoded, and why."""

    path: Path
    reason: str

    def error(self) -> UserError:
        """Return the error that refuses it."""
        return UserError(
            f"{self.path} cannot be decoded ({self.reason}): replace or delete it, or leave such "
            "files out with --skip-corrupt"
        )


class CorruptFiles:
    """Files that could not be decoded, by name, and whether that is allowed.

    Args:
        root: the data folder.
        allowed: False: the first one raises an error in place of being noted.
    """

    def __init__(self, root: Path, *, allowed: bool) -> None:
        self.root, self.allowed = root, allowed
        self.reasons: dict[Path, str] = {}
        self._reported = 0

    def add(self, bad: BadImage) -> None:
        """Notes a file.

        Raises:
            UserError: files must not be corrupt.
        """
        if not self.allowed:
            raise bad.error()
        self.reasons[bad.path] = bad.reason

    @property
    def names(self) -> tuple[str, ...]:
        """Their names relative to the data folder."""
        return tuple(path.relative_to(self.root).as_posix() for path in self.reasons)

    def report(self) -> None:
        """Logs in one line what was found since the last report."""
        new = list(zip(self.names, self.reasons.values(), strict=True))[self._reported :]
        if new:
            shown = "; ".join(f"{name} ({reason})" for name, reason in new[:5])
            _log.warning(
                "skipped %d corrupt files: %s%s", len(new), shown, "; ..." if len(new) > 5 else ""
            )
        self._reported += len(new)
