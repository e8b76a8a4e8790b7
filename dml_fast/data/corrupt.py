"""Files that cannot be decoded: refused, or skipped and listed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from dml_fast.errors import UserError
from dml_fast.foreign import shown

_log = logging.getLogger("dml_fast")


class BadImage(NamedTuple):
    """A file that could not be decoded.

    Attributes:
        path: of the file.
        reason: why it could not be decoded, in a few words.
    """

    path: Path
    reason: str

    def error(self) -> UserError:
        """Return the error that names the file and says what to do."""
        return UserError(
            f"{self.path} cannot be decoded ({self.reason}): replace or delete it, or leave such "
            "files out with --skip-corrupt"
        )


class CorruptFiles:
    """The files that could not be decoded so far.

    Args:
        root: the data folder.
        allowed: whether such files are recorded; if not, the first one raises an error.

    Attributes:
        reasons: for each file, why it could not be decoded.
    """

    def __init__(self, root: Path, *, allowed: bool) -> None:
        self.root, self.allowed = root, allowed
        self.reasons: dict[Path, str] = {}
        self._reported = 0

    def add(self, bad: BadImage) -> None:
        """Record a file.

        Raises:
            UserError: corrupt files are not allowed.
        """
        if not self.allowed:
            raise bad.error()
        self.reasons[bad.path] = bad.reason

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the files, relative to the data folder."""
        return tuple(path.relative_to(self.root).as_posix() for path in self.reasons)

    def report(self) -> None:
        """Log in one line the files that were found since the last report."""
        new = list(zip(self.names, self.reasons.values(), strict=True))[self._reported :]
        if new:
            first = shown("; ".join(f"{name} ({reason})" for name, reason in new[:5]))
            _log.warning(
                "skipped %d corrupt files: %s%s", len(new), first, "; ..." if len(new) > 5 else ""
            )
        self._reported += len(new)
