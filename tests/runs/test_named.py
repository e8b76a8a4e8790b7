"""Students of finished runs, named on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cases import facts_of_three_classes

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run
from dml_fast.runs.named import students_named


def begun(folder: Path, count: int) -> str:
    folder.mkdir()
    config = TrainConfig(arch="resnet8", cohort=count)
    students = [{"arch": "resnet8", "parameters": 1}] * count
    Run(folder).describe(config, facts_of_three_classes(), students)  # type: ignore[arg-type]
    return str(folder)


def test_a_run_stands_for_all_its_students_in_order(tmp_path: Path) -> None:
    a, b = begun(tmp_path / "a", 2), begun(tmp_path / "b:1", 3)  # the second has such a name
    assert [*map(str, students_named(a, "--x"))] == [f"{a}:0", f"{a}:1"]
    named = students_named(f"{b}:2, {a}:1", "--x")
    assert [*map(str, named)] == [f"{b}:2", f"{a}:1"]
    assert named[0].run.folder == Path(b)
    again = students_named(",".join(map(str, named)), "--x")
    assert again == named
    assert len(students_named(b, "--x")) == 3
    assert students_named("", "--x") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}/none", r"--x .*none: .* is not a run folder"),
        ("{}/a:2", r"--x .*a:2: the students of that run are 0 to 1: give one of these, or the"),
        ("{}/a:9999999999999", "the students of that run are 0 to 1"),
        ("{0}/a,{0}/a:0", "names student .*a:0 twice: name each once"),
        ("{}/a:-1", "is not a run folder"),
    ],
)
def test_what_names_no_student_is_refused(tmp_path: Path, text: str, words: str) -> None:
    begun(tmp_path / "a", 2)
    with pytest.raises(UserError, match=words):
        students_named(text.format(tmp_path), "--x")
