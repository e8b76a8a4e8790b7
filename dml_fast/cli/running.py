"""A command's errors as a line and an exit code, and output that never ends it."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from dml_fast.errors import TrainingError, UserError, reason


def run(
    main: Callable[[Sequence[str] | None], int],
    argv: Sequence[str] | None = None,
    *,
    prints_results: bool = True,
) -> int:
    """Call a command, and print its `UserError` or `TrainingError` as one line on stderr.

    Where ``argv`` is None this process is the command's. Then output that cannot be written never
    ends it: the rest is dropped, as for ``| head``, and a full disk is named at the end.

    Args:
        main: the command.
        argv: its arguments; by default those of this process.
        prints_results: whether it fails if stdout cannot be written to. Not if files have it all.

    Returns:
        The command's exit code; 2 for a `UserError`, 1 for a `TrainingError`.
    """
    if argv is None:
        sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    code = _outcome(main, argv)
    if why := _dropped():
        kind = "error" if prints_results else "warning"
        print(f"{kind}: stdout cannot be written to ({why}): give it room", file=sys.stderr)
        return code or (2 if prints_results else 0)
    return code


def _outcome(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    try:
        return main(argv)
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Descriptor(io.FileIO):
    """A file descriptor for output that raises nothing: what cannot be written is dropped.

    Attributes:
        dropped: why output was dropped, other than that its reader has gone; "" if none was.
    """

    dropped = ""

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # another process made it non-blocking
                select.select((), (self,), ())
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.dropped = reason(error)
            return len(data)
        return count


def _lasting(stream: TextIO | None) -> TextIO:
    """Return a standard stream that raises nothing, whatever becomes of its descriptor.

    It prints characters that its encoding lacks as escapes. A closed stream discards its output.
    """
    if stream is None:  # so that no other file gets its number
        return open(os.devnull, "w", encoding="utf-8")
    raw = _raw(stream)
    if type(raw) is not io.FileIO or not isinstance(stream, io.TextIOWrapper):
        return stream  # a notebook's, Windows' console, or made here
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(raw.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _raw(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _dropped() -> str:
    """Return why output on stdout was dropped, "" if none was."""
    raw = _raw(sys.stdout)
    if not isinstance(raw, _Descriptor):
        return ""
    sys.stdout.flush()
    return raw.dropped
