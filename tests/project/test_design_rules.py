"""Rules of the design that a careless change would break without any other test noticing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dml_fast
from dml_fast import _native

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "report",
    "export",
    "select",
    "register",
    "compare",
    "data",
)


def sources(*suffixes: str) -> list[Path]:
    """Our own files, the link in dml_fast/ not followed."""
    folders = ("dml_fast", "kernels", "csrc", "tests", "benchmarks", "examples", ".ci")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    link = ROOT / "dml_fast" / "kernels"
    return [
        path
        for path in [*found, ROOT / "setup.py"]
        if path.suffix in suffixes and link not in path.parents
    ]


def modules_after(code: str) -> set[str]:
    """The modules, by full name, that a fresh interpreter has imported after ``code``."""
    report = "import sys; print('\\n' + ' '.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", ["dml_fast", "dml_fast.models", "dml_fast.data"])
def test_importing_the_package_does_not_import_torch(module: str) -> None:
    assert "torch" not in modules_after(f"import {module}")


@pytest.mark.parametrize("module", ["loss", "kernels.autograd"])
def test_importing_the_loss_does_not_import_the_compiler(module: str) -> None:
    """It takes as long as importing torch does, and few callers compile."""
    if module == "kernels.autograd":
        pytest.importorskip("triton")
    assert "torch._dynamo" not in modules_after(f"import dml_fast.{module}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_import_torch(command: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        f"try:\n    runpy.run_module('dml_fast.{command}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "else:\n    raise AssertionError('--help did not exit')"
    )
    assert "torch" not in modules_after(code)


def test_the_public_names_are_few_and_each_is_there() -> None:
    assert len(dml_fast.__all__) <= 9
    for name in dml_fast.__all__:
        assert getattr(dml_fast, name).__name__ == name
    assert set(dml_fast.__all__) < set(dir(dml_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dml_fast.nothing


def test_kernels_are_linked_and_no_package_of_their_own() -> None:
    link = ROOT / "dml_fast" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_kernels_page_lists_every_file() -> None:
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+\.py)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_nobody_imports_kernels_by_its_folders_name() -> None:
    """Another package on PyPI is called kernels."""
    assert not [path for path in sources(".py", ".pyi") if "kernels" in imported_names(path)]


def test_no_file_has_over_400_lines() -> None:
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(".py", ".pyi", ".cpp", ".hpp")
    }
    assert not {path: lines for path, lines in lengths.items() if lines > 400}


def test_errors_of_the_library_name_no_flags() -> None:
    """Programs call these packages: their users have no command line."""
    found = []
    folders = (ROOT / "kernels", *(ROOT / "dml_fast" / p for p in ("loss", "ranking", "engine")))
    for path in sources(".py"):
        if path.parent not in folders:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [
            f"{path.name}: {text.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise | ast.Return)
            for text in ast.walk(node)
            if isinstance(text, ast.Constant) and re.search(r"(^|\W)--[a-z]", str(text.value))
        ]
    assert not found


def test_only_the_bindings_know_python() -> None:
    knowing = {path.name for path in sources(".cpp", ".hpp") if "pybind11" in path.read_text()}
    assert knowing == {"bindings.hpp"}


def test_the_stub_matches_the_extension() -> None:
    """Names, arguments and results; pybind11 writes each signature as a docstring's first line."""
    stub = ast.parse((ROOT / "dml_fast" / "_native.pyi").read_text(encoding="utf-8"))
    defined = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in stub.body if isinstance(node, defined)}
    assert names == {name for name in dir(_native) if not name.startswith("_")}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            compare_signature(node, getattr(_native, node.name))
        elif isinstance(node, ast.ClassDef):
            built = getattr(_native, node.name)
            methods = {method.name: method for method in node.body if isinstance(method, defined)}
            public = {name for name in vars(built) if not name.startswith("_")}
            assert methods.keys() == public | {"__init__"}
            for name, method in methods.items():
                assert isinstance(method, ast.FunctionDef)
                compare_signature(method, getattr(built, name))


def compare_signature(node: ast.FunctionDef, built: object) -> None:
    """The stub imports what pybind11 spells out in full, and leaves out the type of self."""
    signature = (built.__doc__ or "").splitlines()[0]
    spelled = re.sub(r"\b(numpy\.typing|numpy|typing)\.", "", signature)
    spelled = re.sub(r"\(self: [\w.]+", "(self", spelled)
    assert node.returns is not None
    stubbed = f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    assert spelled == stubbed.replace("np.", "")
