"""Build the C++ extension and map ``kernels/`` to ``dml_fast.kernels``; the rest is pyproject.toml.

The extension takes numpy buffers and knows nothing of torch, so one wheel serves every torch.
"""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# No contraction to fused multiply-add: a score must not depend on the machine it was computed on.
FLAGS = (
    ["/O2", "/W3"] if sys.platform == "win32" else ["-O3", "-Wall", "-Wextra", "-ffp-contract=off"]
)

native = Pybind11Extension(
    "dml_fast._native",
    sources=sorted(glob("csrc/*.cpp")),
    # Without these, the headers are missing from the sdist, and a changed header rebuilds nothing.
    depends=sorted(glob("csrc/*.hpp")),
    cxx_std=17,
    extra_compile_args=FLAGS,
)

ParallelCompile("NPY_NUM_BUILD_JOBS").install()  # files side by side, on all cores
setup(
    # kernels/ has no __init__.py, so find_packages does not see it through the link in dml_fast/.
    packages=[*find_packages(include=["dml_fast", "dml_fast.*"]), "dml_fast.kernels"],
    package_dir={"dml_fast.kernels": "kernels"},
    package_data={"dml_fast": ["py.typed", "*.pyi"]},
    ext_modules=[native],
)
