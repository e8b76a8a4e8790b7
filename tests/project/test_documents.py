"""What the pages name exists, and what they show runs.

The figures of docs/performance.md are checked by test_bench_report.py.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/*.md", "examples/*.md", "benchmarks/gpu/*.md", "kernels/*.md", "csrc/*.md")
PAGES = sorted(page.relative_to(ROOT) for place in PLACES for page in ROOT.glob(place))
# A dated note names what there was on its date: files and options since renamed or removed.
HISTORIC = {Path("docs/log.md")}
PROGRAMS = (
    *("train", "evaluate", "predict", "report", "export", "select", "compare", "data"),
    "register",
)
WIDTH = 100

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n+)+")
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
# Two capitals or more stand for what the reader puts there: NAME, DIR, checkpoint_STEP.
PLACEHOLDER = re.compile(r"(?<![A-Za-z])[A-Z]{2,}(?![a-z])")
FOLDERS = "dml_fast|tests|benchmarks|kernels|csrc|docs|examples"
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS}|\.ci)/[\w./*?\-]*[\w*/]")
FILE = re.compile(r"(?<![\w./*-])[\w/]+\.(?:py|cpp|hpp|sh|toml)\b")
DOTTED = re.compile(r"(?<![\w./-])(?:dml_fast|benchmarks)(?:\.[A-Za-z_]\w*)+(?![\w/])")
COMMAND = re.compile(r"-m ((?:dml_fast|benchmarks)(?:\.\w+)+)([^#|\n]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

Check = Callable[[str, Path], Iterator[str]]


def prose(text: str) -> str:
    """The page without its blocks of code, as many lines as before."""
    for block in (FENCE, INDENTED):
        text = block.sub(lambda found: "\n" * found[0].count("\n"), text)
    return text


def code(text: str) -> str:
    """Blocks and spans of code, one after the other, continued lines joined."""
    blocks = [found[2] for found in FENCE.finditer(text)]
    outside = FENCE.sub("", text)
    blocks += [found[0] for found in INDENTED.finditer(outside)]
    blocks += [" ".join(found[1].split()) for found in SPAN.finditer(prose(text))]
    return "\n".join(blocks).replace("\\\n", " ")


def anchors(text: str) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)}


def slug(heading: str) -> str:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    kept = (c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def wrong_links(text: str, page: Path) -> Iterator[str]:
    """Relative links to no file, and fragments that are no heading there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", SPAN.sub("", prose(text))):
        path, _, fragment = target.partition("#")
        file = ROOT / page.parent / path
        if re.match(r"[a-z]+:", target):
            continue
        if not file.exists():
            yield f"there is no {target}"
        elif fragment and fragment not in anchors(file.read_text() if path else text):
            yield f"{path or page} has no heading #{fragment}"


@cache
def file_names() -> set[str]:
    folders = (*FOLDERS.split("|"), ".ci", ".github")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    return {path.name for path in [*found, *ROOT.glob("*.*")]}


def wrong_files(text: str, page: Path) -> Iterator[str]:
    """Paths below our folders, and names of our kinds of files, that do not exist."""
    named = COMMAND.sub("", code(text))  # a command's own files are the reader's
    for name in {found[0] for found in PATH.finditer(text)}:
        if not PLACEHOLDER.search(name.replace("README", "")) and not any(ROOT.glob(name)):
            yield f"there is no {name}"
    for name in {found[0] for found in FILE.finditer(named)}:
        known = (ROOT / name).exists() or (ROOT / page.parent / name).exists()
        if not known and not PLACEHOLDER.search(name) and Path(name).name not in file_names():
            yield f"there is no {name}"


def wrong_names(text: str, page: Path) -> Iterator[str]:
    """Dotted names in our packages that are neither a module nor in one."""
    for name in {found[0] for found in DOTTED.finditer(text)}:
        if not PLACEHOLDER.search(name) and not is_name(name):
            yield f"there is no {name}"


@cache
def is_name(dotted: str) -> bool:
    """Whether it is a module, or leads from one to an attribute."""
    owner, _, last = dotted.rpartition(".")
    if not owner or is_module(dotted):
        return True
    if is_module(owner):
        return hasattr(importlib.import_module(owner), last)
    above, _, middle = owner.rpartition(".")
    return is_module(above) and hasattr(getattr(importlib.import_module(above), middle, None), last)


def is_module(dotted: str) -> bool:
    try:
        return find_spec(dotted) is not None
    except ModuleNotFoundError:
        return False


@cache
def flags_of(module: str, *subcommand: str) -> set[str]:
    """The options in the help of one of our commands; it runs in this process."""
    program = importlib.import_module(f"{module}.__main__" if module == "dml_fast.data" else module)
    shown = StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as end:
        program.main([*subcommand, "--help"])
    assert not end.value.code
    return {"--help", *FLAG.findall(shown.getvalue())}


def wrong_commands(text: str, page: Path) -> Iterator[str]:
    """Modules that cannot be run, and options that they do not have."""
    for module, rest in COMMAND.findall(code(text)):
        if PLACEHOLDER.search(module):
            continue
        if not is_module(module):
            yield f"there is no {module} to run"
            continue
        words = rest.split()
        # --simulate has the options of training too
        subcommand = ["--simulate"] if "--simulate" in words else []
        for flag in FLAG.findall(rest):
            if flag not in flags_of(module, *subcommand):
                yield f"{module} has no option {flag}"


def wrong_options(text: str, page: Path) -> Iterator[str]:
    """Options that stand alone, such as `--amp`, and belong to none of our commands."""
    known = set().union(*(flags_of(f"dml_fast.{name}") for name in PROGRAMS))
    known |= {"--rehearse", "--out", "--check", "--benchmark-only", "--max-restarts"}
    for span in SPAN.findall(prose(text)):
        if (found := FLAG.match(span)) and page.parts[0] in ("README.md", "docs", "CHANGELOG.md"):
            name = found[0]
            if name not in known and "bench" not in span and not is_benchmark_option(name):
                yield f"no command has the option {name}"


@cache
def is_benchmark_option(flag: str) -> bool:
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("benchmarks/*/*.py")]
    return any(f'"{flag}"' in script.read_text(encoding="utf-8") for script in scripts)


def wrong_targets(text: str, page: Path) -> Iterator[str]:
    """Targets of make that the Makefile does not have."""
    rules = re.findall(
        r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    for target in re.findall(r"(?<![\w-])make ([a-z-]+)", code(text)):
        if target not in rules:
            yield f"the Makefile has no target {target}"


def wrong_tests(text: str, page: Path) -> Iterator[str]:
    """Tests that a page names and that do not exist."""
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        path = ROOT / file
        if not path.exists() or f"def {name}(" not in path.read_text(encoding="utf-8"):
            yield f"there is no {file}::{name}"


def wide_lines(text: str, page: Path) -> Iterator[str]:
    """Lines of prose over the width; tables, code and what a program writes may be wider."""
    written = re.compile(r"<!-- (\w+) begin -->.*?<!-- \1 end -->", re.DOTALL)
    for line in prose(written.sub("", text)).splitlines():
        if len(line) > WIDTH and not line.startswith("|"):
            yield f"{len(line)} columns: {line}"


CHECKS: tuple[Check, ...] = (
    wrong_links,
    wrong_files,
    wrong_names,
    wrong_commands,
    wrong_options,
    wrong_targets,
    wrong_tests,
    wide_lines,
)
OF_HISTORY: tuple[Check, ...] = (wrong_links, wide_lines)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_names_exists(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    checks = OF_HISTORY if page in HISTORIC else CHECKS
    faults = [f"{check.__name__}: {fault}" for check in checks for fault in check(text, page)]
    assert not faults, "\n".join(faults)


LEARNED: dict[str, dict[str, float]] = {
    "docs/library.md": {"image_accuracy": 0.9, "text_accuracy": 0.8, "token_gain": 1.5}
}
"""Least values of what a page's code leaves behind."""

RUNNING = [page for page in PAGES if "```python" in (ROOT / page).read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", RUNNING, ids=str)
def test_a_pages_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks one after the other, as a reader would type them into one session."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for found in FENCE.finditer(text):
        if found[1] == "python":
            lines = "\n" * text[: found.start(2)].count("\n")  # so that a traceback has the page's
            exec(compile(lines + found[2], str(page), "exec"), names)
            ran += 1
    assert ran
    for name, least in LEARNED.get(str(page), {}).items():
        assert min(names[name]) > least, name  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("check", "wrong", "right"),
    [
        (wrong_links, "[x](nowhere.md)", "[x](loss.md)"),
        (wrong_links, "[x](loss.md#nowhere)", "[x](loss.md#definition)"),
        (wrong_links, "# A `b` c\n[x](#a-b)", "# A `b` c\n[x](#a-b-c)"),
        (wrong_files, "see tests/test_nothing.py", "see tests/project/test_documents.py"),
        (wrong_files, "see `tests/test_no*.py`", "see `tests/project/test_doc*.py`"),
        (wrong_files, "see dml_fast/nothing", "see dml_fast/loss"),
        (wrong_files, "in `nothing.py`", "in `test_documents.py`"),
        (wrong_names, "`dml_fast.nothing`", "`dml_fast.loss`"),
        (wrong_names, "`dml_fast.loss.nothing`", "`dml_fast.loss.mutual_loss`"),
        (wrong_names, "`dml_fast.Engine.nothing`", "`dml_fast.Engine.step`"),
        (wrong_commands, "`python -m dml_fast.nothing`", "`python -m dml_fast.train`"),
        (
            wrong_commands,
            "\n\n    -m dml_fast.train --nothing\n",
            "\n\n    -m dml_fast.train --amp\n",
        ),
        (wrong_commands, "`-m dml_fast.data scan DIR --no`", "`-m dml_fast.data scan D --decode`"),
        (
            wrong_commands,
            "`-m dml_fast.compare --no`",
            "`-m benchmarks.bench_loss --json F`",
        ),
        (wrong_options, "`--nothing 3`", "`--kl-weight 3`"),
        (wrong_targets, "`make nothing`", "`make test`"),
        (
            wrong_tests,
            "`tests/test_rng.py::test_no`",
            "`tests/test_rng.py::test_a_damaged_state_is_refused_or_draws`",
        ),
        (wide_lines, "word " * 25, "| " + "word " * 25),
    ],
)
def test_a_check_can_fail(check: Check, wrong: str, right: str) -> None:
    page = Path("docs/page.md")
    assert list(check(wrong, page)) and not list(check(right, page))


def test_the_contents_name_every_page() -> None:
    assert {Path("README.md"), Path("docs/loss.md"), Path("examples/README.md")} <= {*PAGES}
    listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text("utf-8"))
    assert {*listed, "README.md"} == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize(("folder", "suffix"), [("kernels", ".py"), ("csrc", ".cpp")])
def test_a_folders_readme_names_its_files(folder: str, suffix: str) -> None:
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    files = {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}
    assert not {name for name in files if not re.search(rf"\b{name}(?![a-z])", readme)}


def test_sources_point_at_files_that_exist() -> None:
    """Paths in docstrings and comments; tests make up some of their own."""
    sources = [
        path
        for folder in ("dml_fast", "kernels", "csrc", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".hpp", ".sh")
    ]
    named = {
        (path.relative_to(ROOT), found[0])
        for path in sources
        for found in re.finditer(
            rf"{PATH.pattern}\.(?:md|py|cpp|hpp|sh|toml)\b", path.read_text("utf-8")
        )
    }
    assert len(named) > 10
    assert not {pair for pair in named if "*" not in pair[1] and not (ROOT / pair[1]).exists()}
