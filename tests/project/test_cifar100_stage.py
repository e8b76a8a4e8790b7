"""The stage cifar100 of benchmarks/gpu/run.sh: its comparisons are valid, and it goes on."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks.gpu import cifar100
from dml_fast import cli
from dml_fast.compare import CompareArguments
from dml_fast.config import TrainConfig


@pytest.mark.parametrize("table", cifar100.TABLES, ids=lambda table: table.name)
def test_its_options_are_valid(table: cifar100.Table) -> None:
    options = f"{cifar100.COMMON} {cifar100.ON_GPU} {table.options} --data digits"
    args = cli.parse(CompareArguments, options.split(), "compare")
    TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)}).check()
    assert args.methods == ("independent,dml",)
    assert args.batch_size * args.epochs in (128 * 60, 64 * 200)


def test_a_leg_goes_on_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def until(command: list[str], over: cifar100.Over) -> int:
        folder, seeds = Path(command[-1]), int(command[command.index("--seeds") + 1])
        if over():
            return cifar100.UNFINISHED
        ran.append((folder.name, seeds))
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "compare.json").write_text(json.dumps({"seeds": [*range(seeds)]}))
        return 0

    monkeypatch.setattr(cifar100, "_until", until)
    tables = [cifar100.Table("a", "", seeds=2), cifar100.Table("b", "", seeds=1)]
    first = cifar100.leg(tables, "digits", "", tmp_path, lambda: len(ran) == 1)
    assert (first, ran) == (cifar100.UNFINISHED, [("a", 1)])
    assert cifar100.leg(tables, "digits", "", tmp_path, lambda: False) == 0
    assert ran == [("a", 1), ("a", 2), ("b", 1)]


def test_what_travels_is_split_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar100, "PART_BYTES", 100)
    runs, out, back = tmp_path / "runs", tmp_path / "out", tmp_path / "back"
    measured, begun = runs / "t" / "dml-s0", runs / "t" / "dml-s1"
    for folder in (measured, begun):
        folder.mkdir(parents=True)
        for name in ("last.pt", "best.pt", "config.json", "student_0.safetensors"):
            (folder / name).write_text(f"{folder.name} {name}")
    (measured / "test.json").write_text("{}")
    cifar100.pack(runs, out)
    parts = [*out.iterdir()]
    assert len(parts) > 1 and max(part.stat().st_size for part in parts) == 100
    cifar100.unpack(out, back)
    found = {str(p.relative_to(back / "t")) for p in back.rglob("*") if p.is_file()}
    own = {f"{run}/config.json" for run in ("dml-s0", "dml-s1")}
    assert found == own | {"dml-s0/test.json", "dml-s1/last.pt"}
    assert (back / "t" / "dml-s1" / "last.pt").read_text() == "dml-s1 last.pt"


def test_a_process_is_stopped_when_the_leg_is_over() -> None:
    assert cifar100._until(["-c", "import time; time.sleep(60)"], lambda: True) == 3
    assert cifar100._until(["-c", ""], lambda: False) == 0
    assert cifar100._until(["-c", "raise SystemExit(2)"], lambda: False) == 1


@pytest.mark.slow
@pytest.mark.processes
def test_rehearsed_on_digits_it_is_stopped_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    arguments = ["--rehearse", "--parts", str(tmp_path), "--work", str(work), "--out", str(out)]
    assert cifar100.main(arguments) == 0
    shown = capfd.readouterr().out
    assert "digits in their place" in shown
    assert "went on from 1 files" in shown
    assert "rehearsal: 2 of 2 seeds measured" in shown
    folder = work / "runs" / "rehearsal"
    assert json.loads((folder / "origin.json").read_text())["command"].startswith("python -m dml")
    assert "--seeds 2" in (folder / "origin.json").read_text()
