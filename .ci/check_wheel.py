"""Check an installed wheel, from outside the repository: run with ``python -P``."""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import dml_fast
from dml_fast import _native
from dml_fast.kernels.availability import unavailable_reason

package = Path(dml_fast.__file__).parent
assert package.is_relative_to(sys.prefix), f"not the installed wheel: {package}"
assert version("dml_fast") == dml_fast.__version__
for name in ("py.typed", "_native.pyi", "kernels/availability.py"):
    assert (package / name).is_file(), f"the wheel lacks {name}"
assert not (package / "kernels").is_symlink()
for command in ("train", "evaluate", "predict", "report", "export", "data"):
    assert find_spec(f"dml_fast.{command}"), f"the wheel lacks the command {command}"

assert _native.average_precision(np.array([1, 2])) == (1.0, 1.0, 1.0)
assert unavailable_reason(torch.device("meta"))
for name in dml_fast.__all__:
    getattr(dml_fast, name)
print(f"wheel {version('dml_fast')} works from {package}")
