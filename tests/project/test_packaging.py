"""The package's metadata agree with one another."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import dml_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def name_of(requirement: str) -> str:
    """The distribution's name, without extras, version and marker."""
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    return {name_of(line): re.split(r"[; ]", line.partition("==")[2])[0] for line in wanted}


def test_the_version_is_the_same_everywhere() -> None:
    assert version("dml_fast") == dml_fast.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {dml_fast.__version__}\n" in citation
    assert dml_fast.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_we_test_with_is_pinned_exactly(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"]]
    wanted += [*extras["log"], *extras["export"]]
    names = {name_of(requirement) for requirement in wanted} - {"dml-fast", "tomli"}
    assert names == pinned().keys()
    assert all(re.fullmatch(r"\d+(\.\d+)+", pin) for pin in pinned().values())


def test_optional_packages_stay_optional(project: dict[str, Any]) -> None:
    required = {name_of(requirement) for requirement in project["dependencies"]}
    extras = project["optional-dependencies"]
    logs = {"log", "wandb", "mlflow"}
    others = {"dali", "dali-cu12", "zoo", "export", "examples", "test", "dev"}
    assert extras.keys() == logs | others
    for requirements in extras.values():
        assert not required & {name_of(requirement) for requirement in requirements}


def test_torch_is_no_build_requirement() -> None:
    """With it, pip would fetch gigabytes to compile a few files that do not use it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    build = tomllib.loads(text)["build-system"]["requires"]
    assert {name_of(requirement) for requirement in build} == {"setuptools", "pybind11"}


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(dml_fast.__file__).parent / "py.typed").is_file()


@pytest.mark.dali
def test_the_dali_extra_runs_without_a_gpu() -> None:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def constant() -> Any:
        return fn.constant(idata=[7])

    pipeline = constant()
    pipeline.build()
    (batch,) = pipeline.run()
    assert batch.as_array().tolist() == [[7], [7]]
