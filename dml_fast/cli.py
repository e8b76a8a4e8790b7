"""What the commands share: they parse arguments, and turn errors into a line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from dml_fast.errors import TrainingError, UserError

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str] | None, prog: str, default: T | None = None) -> T:
    """Parse a command line into a dataclass.

    After a wrong flag this prints a message and exits with code 2; after ``--help`` with code 0.

    Args:
        cls: the dataclass, each field of which is a flag.
        argv: the arguments; by default those of this process.
        prog: the command, after ``python -m dml_fast.``.
        default: values of the flags that are not given; by default those of ``cls``.
    """
    import tyro

    name = f"python -m dml_fast.{prog}"
    if default is None:
        return tyro.cli(cls, args=argv, prog=name)
    return tyro.cli(cls, args=argv, prog=name, default=default)


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call a command, and print its `UserError` or `TrainingError` as one line on stderr.

    Returns:
        The command's exit code; 2 for a `UserError`, 1 for a `TrainingError`.
    """
    try:
        return main(argv)
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as by `| head`
        sys.stderr.close()
        return 0
