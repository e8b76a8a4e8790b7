"""Print what pyproject.toml requires, for pip: ``requirements.py [--lowest] EXTRA...``.

With --lowest each package at the lowest version that is allowed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    if extra != "--lowest":
        wanted += project["optional-dependencies"][extra]
for requirement in wanted:
    print(re.sub(r">=", "==", requirement, count=1) if "--lowest" in sys.argv else requirement)
