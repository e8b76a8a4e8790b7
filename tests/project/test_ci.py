"""``.ci/run``'s exit code, with a Python that installs nothing and whose tests pass or fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = """#!/usr/bin/env bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
    list) echo "torch 0" ;;
    *pytest*) exit "$RESULT" ;;
esac
"""


@pytest.mark.parametrize(("tests", "code"), [(0, 0), (1, 1)])
def test_its_exit_code_is_the_tests_and_nothing_stays(
    tmp_path: Path, tests: int, code: int
) -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs a git checkout: .ci/run copies the files that git knows")
    python, work = tmp_path / "python", tmp_path / "work"
    python.write_text(FAKE)
    python.chmod(0o755)
    work.mkdir()
    environment = {**os.environ, "PYTHON": str(python), "TMPDIR": str(work), "RESULT": str(tests)}
    done = subprocess.run(
        ["bash", str(ROOT / ".ci/run"), "newest", "lowest"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert ("All checks passed" in done.stdout) == (code == 0)
    assert list(work.iterdir()) == []
