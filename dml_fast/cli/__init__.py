"""What the commands share: they parse arguments, and turn errors into a line and an exit code."""

from __future__ import annotations

from dml_fast.cli.parsing import Alone, check_ending, parse
from dml_fast.cli.running import run

__all__ = ["Alone", "check_ending", "parse", "run"]
