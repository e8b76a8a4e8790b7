"""The shape of the package: its modules, what imports what, and which imports break the rule.

    python -m benchmarks.common.layout      # 1 if an import breaks the rule or a circle exists

Every import counts: at the top, in a function, and under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dml_fast"
Graph = Mapping[str, frozenset[str]]

LAYERS = (
    ("errors", "version"),
    ("foreign",),
    ("rng", "machine", "cli"),
    ("models", "distributed", "ranking", "loss"),
    ("kernels", "data", "engine"),
    ("config",),
    ("runs",),
    ("reporting",),
    ("eval",),
    ("training",),
    ("selection",),
    ("comparison",),
    ("train", "evaluate", "predict", "report", "export", "select", "register", "compare"),
)
"""Packages and modules of the root, the lowest first. A layer imports from lower ones alone."""
EXCEPTIONS = {("loss.backends", "kernels")}  # by name, when a device needs them


def imports(package: Path = PACKAGE) -> Graph:
    """Module -> modules of the package that it imports; names without ``dml_fast.``."""
    files = {_name(path, package): path for path in package.rglob("*.py")}
    kernels = package / "kernels"  # a link, which rglob does not follow everywhere
    files |= {f"kernels.{path.stem}": path for path in kernels.glob("*.py")}
    return {
        name: frozenset(_imported(ast.parse(path.read_text(encoding="utf-8")), files)) - {name}
        for name, path in sorted(files.items())
    }


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # of `from a import b`, b may be a module
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "dml_fast":
                continue
            inner = name.split(".")[1:]
            while inner and ".".join(inner) not in known and inner != ["_native"]:
                inner.pop()
            if inner != ["_native"]:
                yield ".".join(inner)


def violations(graph: Graph) -> list[str]:
    """Imports that go up or sideways, and modules that no layer names."""
    floors = {name: floor for floor, names in enumerate(LAYERS) for name in names}
    found = []
    for module, targets in graph.items():
        home = module.split(".")[0]
        if not home:  # dml_fast/__init__.py names what users import, lazily
            continue
        if home not in floors:
            found.append(f"{module} is in no layer")
            continue
        for target in sorted(targets):
            there = target.split(".")[0]
            if there == home or (module, there) in EXCEPTIONS:
                continue
            if not there:
                found.append(f"{module} imports dml_fast/__init__.py")
            elif there not in floors or floors[there] >= floors[home]:
                found.append(f"{module} imports {target}")
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Modules that import each other, directly or not: each circle's members."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str, edges: Graph, out: list[str]) -> None:
        if name in seen:
            return
        seen.add(name)
        for target in sorted(edges.get(name, ())):
            visit(target, edges, out)
        out.append(name)

    for name in graph:
        visit(name, graph, order)
    turned = {name: frozenset(n for n in graph if name in graph[n]) for name in graph}
    seen.clear()
    found = []
    for name in reversed(order):
        members: list[str] = []
        visit(name, turned, members)
        if len(members) > 1:
            found.append(sorted(members))
    return found


def longest_chain(graph: Graph) -> list[str]:
    """The longest path of imports, from the module that imports; of a graph without circles."""

    @lru_cache(None)
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(t) for t in graph[name]), key=len, default=()))

    return list(max(map(below, graph), key=len))


def root_modules(graph: Graph) -> list[str]:
    """Modules that lie in the root of the package."""
    packages = {name.split(".")[0] for name in graph if "." in name}
    return [name for name in graph if name and "." not in name and name not in packages]


def main() -> int:
    """Print the figures; 1 if an import breaks the rule."""
    graph = imports()
    wrong, rings = violations(graph), circles(graph)
    print(f"modules: {len(graph)}, in the root: {len(root_modules(graph))}")
    print(f"circles: {len(rings)}")
    for ring in rings:
        print("  " + ", ".join(ring))
    print(f"imports that break the rule: {len(wrong)}")
    for line in wrong:
        print("  " + line)
    if not rings:
        chain = longest_chain(graph)
        print(f"longest chain of imports: {len(chain)}")
        print("  " + " -> ".join(name or "dml_fast" for name in chain))
    return 1 if wrong or rings else 0


if __name__ == "__main__":
    raise SystemExit(main())
