"""The direction of imports: to lower layers alone, in no circle, and few modules in the root."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import layout

GRAPH = layout.imports()


def test_no_import_goes_up_or_sideways() -> None:
    assert not layout.violations(GRAPH)


def test_there_is_no_circle() -> None:
    assert not layout.circles(GRAPH)


def test_the_root_stays_small() -> None:
    assert len(layout.root_modules(GRAPH)) <= 14


def test_every_layer_and_exception_is_there() -> None:
    homes = {name.split(".")[0] for name in GRAPH if name}
    assert homes == {name for layer in layout.LAYERS for name in layer}
    for module, target in layout.EXCEPTIONS:
        assert any(name.split(".")[0] == target for name in GRAPH[module])


@pytest.mark.parametrize(
    ("place", "line", "found"),
    [
        ("loss/mutual.py", "from dml_fast.engine import Engine", "loss.mutual imports engine"),
        ("data/plan.py", "from dml_fast import config", "data.plan imports config"),
        ("engine/step.py", "from dml_fast.data.sets import X", "engine.step imports data.sets"),
        ("models/base.py", "import dml_fast", "models.base imports dml_fast/__init__.py"),
        ("new.py", "import os", "new is in no layer"),
        (
            "loss/mutual.py",
            "def f():\n    from dml_fast.kernels import launch",
            "loss.mutual imports kernels.launch",
        ),
        (
            "rng.py",
            "if TYPE_CHECKING:\n    from dml_fast.loss.mutual import X",
            "rng imports loss.mutual",
        ),
    ],
)
def test_a_wrong_import_is_named(tmp_path: Path, place: str, line: str, found: str) -> None:
    names = ("loss/mutual", "data/plan", "data/sets", "engine/__init__", "engine/step")
    for name in (*names, "models/base", "kernels/launch", "config", "rng", "__init__"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / place).write_text(f"{line}\n")
    assert layout.violations(layout.imports(tmp_path)) == [found]


def test_a_circle_and_the_longest_chain_are_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"d"}}
    frozen = {name: frozenset(targets) for name, targets in graph.items()}
    assert layout.circles(frozen) == [["b", "c"]]
    frozen["c"] = frozenset({"d"})
    assert not layout.circles(frozen)
    assert layout.longest_chain(frozen) == ["a", "b", "c", "d"]
