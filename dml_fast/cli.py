"""What the commands share: arguments into a dataclass, errors into one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from dml_fast.errors import TrainingError, UserError

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str] | None, prog: str, default: T | None = None) -> T:
    """Parse a command line into a dataclass, on top of ``default`` where one is given.

    Exits with code 2 and a message on a wrong flag, and with 0 after ``--help``.
    """
    import tyro

    name = f"python -m dml_fast.{prog}"
    if default is None:
        return tyro.cli(cls, args=argv, prog=name)
    return tyro.cli(cls, args=argv, prog=name, default=default)


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call a command; an error of ours becomes one line on stderr.

    Returns:
        The command's exit code; 2 for a user's mistake, 1 for training that cannot go on.
    """
    try:
        return main(argv)
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
        return 0
