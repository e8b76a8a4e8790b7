"""``--log``: each program gets each epoch once, whatever happens to the run or to the program."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import SHORT, digest
from resume_cases import train as train_some

from dml_fast.config import TrainConfig
from dml_fast.config.checks_logs import LOGS, check_logs
from dml_fast.config.files import from_mapping
from dml_fast.errors import UserError
from dml_fast.reporting import loggers
from dml_fast.reporting.loggers import Logs
from dml_fast.runs.folder import Run
from dml_fast.train import arguments

Table = dict[int, dict[str, float]]


def line(epoch: int, **changes: Any) -> Any:
    students = [
        {"arch": "a", "loss": k + epoch / 8, "kl": None, "val_acc": 0.5, "skipped": 1}
        for k in range(2)
    ]
    made = {"epoch": epoch, "step": 10 * epoch, "seconds": 1.5, "lr": 0.1, "students": students}
    return made | {"images_per_s": 8.0, "ensemble_val_acc": 0.75} | changes


class Recorder:
    """A log in memory, which can fail, and draws random numbers."""

    where = "memory"
    seen: dict[str, list[Any]]
    broken = False

    def open(self, run: Run, options: Any, known: str, there: Any) -> str:
        self.name = known or f"run {len(self.seen)}"
        self.seen.setdefault(self.name, [])
        return self.name

    def epoch(self, line: Any) -> None:
        random.random(), torch.rand(1)
        if self.broken:
            raise RuntimeError("no such server")
        self.seen[self.name].append(line["epoch"])

    def close(self, complete: bool) -> None:
        self.seen[self.name].append(complete)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "seen", {}, raising=False)
    monkeypatch.setattr(Recorder, "broken", False)
    monkeypatch.setitem(loggers._KINDS, "wandb", Recorder)
    return Recorder


def log(folder: Path, done: list[Any], new: list[Any], names: tuple[str, ...] = ("wandb",)) -> None:
    logs = Logs(names)
    logs.open(Run(folder), {}, done)
    for one in new:
        logs.epoch(one)
    logs.close(complete=not new)


def test_a_run_goes_on_in_its_log_and_each_line_is_there_once(
    tmp_path: Path, recorder: type[Recorder]
) -> None:
    lines = [line(epoch) for epoch in range(1, 6)]
    log(tmp_path, [], lines[:2])
    log(tmp_path, lines[:3], lines[3:4])  # killed before the third was logged
    log(tmp_path, lines[:2], lines[2:4])  # continued from an older checkpoint
    log(tmp_path, lines, [])
    assert recorder.seen == {"run 0": [1, 2, False, 3, 4, False, 3, 4, False, 5, True]}
    assert json.loads((tmp_path / "logs.json").read_text())["wandb"] == {"id": "run 0", "step": 50}


def test_a_log_that_is_added_later_gets_all_lines(tmp_path: Path, recorder: type[Recorder]) -> None:
    log(tmp_path, [], [line(1)], ("csv",))
    log(tmp_path, [line(1)], [line(2)], ("csv", "wandb"))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert recorder.seen == {"run 0": [1, 2, False]}


def test_a_log_that_fails_is_named_once_and_the_others_go_on(
    tmp_path: Path, recorder: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    recorder.broken = True
    lines = [line(epoch) for epoch in range(1, 4)]
    with caplog.at_level("WARNING", "dml_fast"):
        log(tmp_path, [], lines, ("wandb", "csv"))
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("--log wandb: not written from here on (no such server); ")
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
    recorder.broken = False
    log(tmp_path, lines, [])
    assert recorder.seen == {"run 0": [1, 2, 3, True]}


def test_logs_leave_the_runs_random_numbers_alone(tmp_path: Path, recorder: type[Recorder]) -> None:
    random.seed(1), torch.manual_seed(1)
    expected = random.random(), float(torch.rand(1))
    random.seed(1), torch.manual_seed(1)
    log(tmp_path, [], [line(1)])
    assert (random.random(), float(torch.rand(1))) == expected


def test_a_damaged_list_of_logs_is_named(
    tmp_path: Path, recorder: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs.json").write_text('{"wandb": {"id": 3}}')
    with caplog.at_level("WARNING", "dml_fast"):
        log(tmp_path, [line(1)], [])
    assert "logs.json" in caplog.text and "begin anew" in caplog.text
    assert recorder.seen == {"run 0": [1, True]}


def test_the_table_has_a_column_for_each_number(tmp_path: Path) -> None:
    log(tmp_path, [], [line(1), line(2, lr=[0.1, 0.2])], ("csv",))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["lr"] == "0.1" and first["lr/student_1"] == ""
    assert second["lr"] == "" and second["lr/student_1"] == "0.2"
    assert (second["epoch"], second["step"], second["loss/student_1"]) == ("2", "20", "1.25")
    assert (first["kl/student_0"], first["ensemble_val_acc"]) == ("", "0.75")
    assert not {"arch/student_0", "skipped/student_0"} & first.keys()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nope", "--log names 'nope': give tensorboard, wandb, mlflow or csv, or several"),
        ("csv,csv", "--log names csv twice: leave one out"),
        ("csv,", "--log names '': give"),
        (
            "wandb",
            "--log wandb needs wandb: pip install 'dml_fast[wandb]', or give --log without it",
        ),
    ],
)
def test_logs_that_there_are_not(names: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dml_fast.config.checks_logs.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig(log=names).check()


def test_every_log_that_can_be_named_can_be_opened() -> None:
    assert loggers._KINDS.keys() == LOGS.keys()


def test_options_may_follow_two_dashes() -> None:
    """Which torchrun needs, as it takes ``--log`` for the beginning of an option of its own."""
    assert arguments(["--", "--cohort", "3", "--log", "csv"]).log == "csv"


def test_options_of_before_are_read() -> None:
    assert from_mapping({"tensorboard": True}, "").log == "tensorboard"
    assert from_mapping({"tensorboard": False}, "").log == ""


# What follows trains, and reads what the programs themselves have written.


def of_csv(run: Path) -> Table:
    with (run / "metrics.csv").open(newline="") as file:
        return {
            int(row["step"]): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)
        }


def of_tensorboard(run: Path) -> Table:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found: Table = {}
    for name in events.Tags()["scalars"]:
        for one in events.Scalars(name):
            assert name not in found.setdefault(one.step, {})
            found[one.step][name] = one.value
    return found


def records(path: Path) -> Iterator[Any]:
    """Read a file of Weights & Biases: 7 bytes, and blocks of records with a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, content = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(content)
            content = b""


def of_wandb(run: Path) -> Table:
    found: Table = {}
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1 and len(files) == 2  # one run, in two parts
    for path in files:
        for record in records(path):
            if record.HasField("history"):
                step = record.history.step.num
                assert step not in found
                items = ((item.key or item.nested_key[0], item) for item in record.history.item)
                found[step] = {
                    key: float(json.loads(item.value_json))
                    for key, item in items
                    if not key.startswith("_")
                }
    return found


def of_mlflow(run: Path) -> Table:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    [experiment] = [e for e in client.search_experiments() if e.name == "dml_fast"]
    [entry] = client.search_runs([experiment.experiment_id])
    assert entry.info.status == "FINISHED" and entry.info.run_name == "run"
    assert entry.data.params["arch"] == "resnet8" and entry.data.params["seed"] == "5"
    found: Table = {}
    for name in entry.data.metrics:
        for metric in client.get_metric_history(entry.info.run_id, name):
            assert name not in found.setdefault(metric.step, {})
            found[metric.step][name] = metric.value
    return found


READERS: dict[str, Callable[[Path], Table]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "csv": of_csv,
}


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for what reads it


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without logs."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert train_some(folder, TrainConfig(**SHORT))  # type: ignore[arg-type]
    return folder


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.parametrize("name", LOGS)
def test_a_stopped_run_goes_on_in_the_program_with_the_same_weights(
    name: str, straight: Path, tmp_path: Path, no_servers: None
) -> None:
    if LOGS[name]:
        pytest.importorskip(name, reason=f"needs pip install 'dml_fast[{LOGS[name]}]'")
    assert name in READERS
    run, config = tmp_path / "run", TrainConfig(**SHORT, log=name)  # type: ignore[arg-type]
    per_epoch = Run(straight).metrics()[0]["step"]
    assert not train_some(run, config, steps=per_epoch + 1)
    assert train_some(run, config, resume=True)
    assert digest(run) == digest(straight)
    found = READERS[name](run)
    lines = Run(run).metrics()
    assert list(found) == [one["step"] for one in lines] and len(lines) == 3
    for one in lines:
        row = found[one["step"]]
        assert row["lr"] == pytest.approx(one["lr"])
        assert row["ensemble_val_acc"] == pytest.approx(one["ensemble_val_acc"])
        for k, student in enumerate(one["students"]):
            for key in ("loss", "ce", "kl", "train_acc", "val_acc", "val_f1"):
                assert row[f"{key}/student_{k}"] == pytest.approx(student[key])  # type: ignore[literal-required]


def test_a_file_in_the_run_folder_that_cannot_be_written_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"--log csv: .*metrics.csv cannot be written"):
        (tmp_path / "metrics.csv").mkdir()
        log(tmp_path, [], [], ("csv",))


def test_a_folder_with_the_name_of_a_package_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the one called wandb, which the program itself makes."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="needs wandb"):
        check_logs("wandb")
