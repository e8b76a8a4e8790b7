"""Each file of a run, damaged in hundreds of ways: what it says, or one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import json_texts, mutated_json, mutations, outcome
from run_cases import checkpoint_state, facts_of_three_classes
from state_cases import assert_equal, cohort

from dml_fast import cli, evaluate, export, report, rng, train
from dml_fast.config import TrainConfig
from dml_fast.config.files import from_mapping, load_toml
from dml_fast.distributed.world import World
from dml_fast.reporting.comparison import read_entries, to_markdown
from dml_fast.runs import checkpoint, sharded_checkpoint
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained
from dml_fast.training.meter import Meter
from dml_fast.training.saving import Progress, Saver

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(quantize|TypedStorage|pickle protocol):UserWarning"),
]
CONFIG = TrainConfig(arch="resnet8", cohort=2, epochs=2, batch_size=7)
STUDENT = {"arch": "resnet8", "loss": 1.25, "ce": 1.0, "kl": 0.25, "train_acc": 0.5, "skipped": 0}
HISTORY = [
    {
        "epoch": epoch, "step": 5 * epoch, "seconds": 0.5, "images_per_s": 70.0, "lr": 0.1,
        "students": [STUDENT | {"val_acc": 0.5}, STUDENT | {"val_acc": None}],
        "ensemble_val_acc": 0.75,
    }
    for epoch in (1, 2)
]  # fmt: skip


def make(folder: Path) -> Run:
    """The folder of a run after two epochs, of students on images of 8 x 8 pixels."""
    run = Run(folder)
    run.prepare(0)
    facts = facts_of_three_classes(classes=tuple("abcde"))
    run.describe(CONFIG, facts, [{"arch": "resnet8", "parameters": 77_000}] * 2)
    state = checkpoint_state(10, history=HISTORY) | {"config": json.dumps(CONFIG.to_dict())}
    checkpoint.save(run, state, best=True)
    run.write_metrics(HISTORY)  # type: ignore[arg-type]
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make(tmp_path / "run")


@pytest.fixture
def generators() -> Iterator[None]:
    """What a damaged state does to the generators ends with the test."""
    before = rng.state()
    yield
    rng.set_state(before)


def replace(path: Path, content: bytes) -> None:
    path.unlink()  # it may be another name of a file that stays
    path.write_bytes(content)


def read(run: Run) -> tuple[Any, ...]:
    """All that commands read of a run, but its images."""
    again = Run.open(run.folder)
    trained = Trained.load(again, "best")
    return again.config, again.facts, again.metrics(), trained.validation, trained.states


def resumed(run: Run) -> list[Any]:
    """What a run has that continues from ``last.pt``."""
    again = Run(run.folder)
    made = cohort(2)
    for student in made:
        student.arch = "resnet8"
    progress = Progress(Meter(2, torch.device("cpu")), "auto")
    Saver(CONFIG, again, again.facts, None, made, progress).resume(again.checkpoint())
    students = made.state_dict()
    return [students, progress.step, progress.seconds, progress.history, progress.meter.state()]


@pytest.mark.slow
def test_a_damaged_description_is_that_of_its_text_or_refused(run: Run) -> None:
    text = json.loads(run.config_file.read_text())
    expected = read(run)
    accepted = 0
    for changed in json_texts(text, 200):
        replace(run.config_file, changed)
        found = outcome(lambda: read(run))
        if found is None:
            continue
        accepted += 1
        config, facts, *rest = found
        said = json.loads(changed)  # another valid file, of the same run
        assert config == from_mapping(said["config"], "")
        assert facts.to_json().items() <= said["data"].items()
        assert_equal(rest[:2], list(expected[2:4]))
        assert_equal(list(rest[2]), list(expected[4]))
    assert accepted


def test_damaged_metrics_are_those_of_their_text_or_refused(run: Run) -> None:
    def commands() -> tuple[Any, str]:
        return Run.open(run.folder).metrics(), to_markdown(read_entries([run.folder]))

    first = commands()
    lines = run.metrics_file.read_bytes()
    changes = [*mutations(lines, 200)]
    for value in mutated_json(HISTORY, 300):
        if isinstance(value, list):
            changes.append("".join(json.dumps(line) + "\n" for line in value).encode())
    for changed in changes:
        replace(run.metrics_file, changed)
        if (found := outcome(commands)) is not None:
            assert found == first or found[0] == [json.loads(x) for x in changed.splitlines()]


def test_a_checkpoint_with_other_bytes_is_the_same_or_refused(run: Run) -> None:
    path = run.checkpoint()
    whole = checkpoint.load(path)
    for changed in mutations(path.read_bytes(), 250):
        replace(path, changed)
        if (found := outcome(lambda: checkpoint.load(path))) is not None:
            assert_equal(found, whole)


ODD_TENSORS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "huge": lambda: torch.zeros(1).expand(2**40),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "empty": lambda: torch.zeros(0),
}


@pytest.mark.slow
@pytest.mark.usefixtures("generators")
def test_a_checkpoint_with_other_values_is_another_or_refused(run: Run) -> None:
    """Its checksums are right: what a hostile file, or another program, would hold."""
    path = run.checkpoint()
    whole = torch.load(path, weights_only=True)
    expected = resumed(run)
    metrics = run.metrics_file.read_bytes()
    states = list(mutated_json(whole, 90))
    for make_odd in ODD_TENSORS.values():
        for place in ("meter", "model", "moments", "torch", "numpy"):
            state = torch.load(path, weights_only=True)
            student, generator = state["students"][0], state["rng"][0]
            holder, key = {
                "meter": (state, "meter"),
                "model": (student["model"], "bn.weight"),
                "moments": (student["optimizer"]["state"][0], "momentum_buffer"),
                "torch": (generator, "torch"),
                "numpy": (generator, "numpy"),
            }[place]
            holder[key] = make_odd()
            states.append(state)
    accepted = 0
    for state in states:
        path.unlink()
        torch.save(state, path)
        replace(run.metrics_file, metrics)
        trained = outcome(lambda: [Trained.load(run, "last").model(k) for k in range(2)])
        found = outcome(lambda: resumed(run))
        accepted += found is not None
        if found is not None:
            assert trained is not None
            assert [s["arch"] for s in found[0]] == ["resnet8"] * 2
            assert found[3] == expected[3] and found[1] == state["step"]
    assert 0 < accepted < len(states) / 2


@pytest.fixture
def sharded(run: Run) -> Run:
    """As its last checkpoint one of several processes, of three tensors per student."""
    state = checkpoint_state(10, history=HISTORY) | {"config": json.dumps(CONFIG.to_dict())}
    for student in state["students"]:
        student["model"] = dict(list(student["model"].items())[:2])
        student["optimizer"] = {"state": {0: student["optimizer"]["state"][0]}}
    sharded_checkpoint.save(run, state, World.alone(2))
    return run


def sums_of(folder: Path) -> bytes:
    parts = [path for path in folder.iterdir() if path.name != "checksums.json"]
    return json.dumps({path.name: zlib.crc32(path.read_bytes()) for path in parts}).encode()


@pytest.mark.parametrize("name", [".metadata", "checksums.json", "__0_0.distcp"])
@pytest.mark.parametrize("sums", ["kept", "renewed"])
def test_a_damaged_part_of_a_checkpoint_is_the_same_or_refused(
    sharded: Run, name: str, sums: str
) -> None:
    path = sharded.checkpoint()
    part = path / name
    whole, content = checkpoint.load(path), part.read_bytes()
    changes = mutations(content, 200)
    if name == "checksums.json":
        changes = json_texts(json.loads(content), 200)  # type: ignore[assignment]
    for changed in changes:
        part.write_bytes(changed)
        if sums == "renewed" and name != "checksums.json":
            (path / "checksums.json").write_bytes(sums_of(path))
        outcome(lambda: checkpoint.load(path, verify=False))  # as ranks that trust the first
        found = outcome(lambda: checkpoint.load(path))
        # with other checksums, other bytes of a tensor are another valid file
        if found is not None and (sums == "kept" or name != "__0_0.distcp"):
            assert_equal(found, whole)


def test_a_damaged_recipe_is_that_of_its_text_or_refused(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    text = "\n".join(
        f"{name} = {json.dumps(value)}" for name, value in CONFIG.to_dict().items()
    ).encode()
    path = tmp_path / "recipe.toml"
    odd = [text + b"\n" + line for line in (b"lr = nan", b"epochs = 0x" + b"f" * 5000, b"\x00")]
    for changed in (*mutations(text, 400), *odd):
        path.write_bytes(changed)
        if (found := outcome(lambda: load_toml(str(path)))) is not None:
            said = tomllib.loads(changed.decode("utf-8-sig").replace("\r\n", "\n"))
            known = found.to_dict()
            for name, value in said.items():
                assert known[name.replace("-", "_")] in (value, str(value))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "best.pt"])
@pytest.mark.parametrize(
    "damage",
    [
        b"", b"\xef\xbb\xbf{}", b"\xff\xfe{", b"null", b"[" * 200_000, b"1" * 5_000, b"NaN",
        b'{"a": 1, "a": 1}', "folder", "pipe", "nowhere", "itself",
    ],
    ids=lambda damage: repr(damage[:12]),
)  # fmt: skip
def test_odd_files_are_one_sentence_of_each_command(
    run: Run, name: str, damage: bytes | str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.folder / name
    path.unlink()
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    elif damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if damage == "nowhere" else name)
    shutil.rmtree(run.folder.parent / "report", ignore_errors=True)
    readers = {
        "config.json": (report, evaluate, export, train),
        "metrics.jsonl": (report,),
        "best.pt": (evaluate, export),
    }
    for command in readers[name]:
        options = ["--resume"] if command is train else []
        assert cli.run(command.main, [*options, str(run.folder)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1
        assert name in printed or "no finished epoch" in printed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": None}, "its version is None and not a whole number"),
        ({"version": "2"}, "its version is '2' and not a whole number"),
        ({"version": True}, "its version is True and not a whole number"),
        ({"config": "null"}, "the configuration is None: give names and values"),
        ({"config": "[" * 100_000}, "RecursionError"),
        ({"history": "{}"}, "history is a dict and not such a list"),
        ({"history": '["x"]'}, r"history\[0\] is 'x' and not an object"),
        ({"step": 2.5}, "step is 2.5 and not a whole number"),
        ({"step": 9}, "it is of step 9 and has a line of 10"),
        ({"students": []}, "it has 0 students"),
        ({"mesh": ["1x1"]}, "mesh is a list of length 1 and not a text"),
    ],
)
def test_what_is_wrong_in_a_checkpoint_is_named(
    run: Run, change: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(run.checkpoint(), weights_only=True) | change
    run.checkpoint("best").unlink()
    torch.save(state, run.checkpoint("best"))
    assert cli.run(export.main, [str(run.folder)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "best.pt" in printed
    assert re.search(why, printed), printed
