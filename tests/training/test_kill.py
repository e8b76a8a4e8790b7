"""Real processes, really killed: they end as the undisturbed run, by SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from distributed_cases import finish
from kill_cases import start, wait_for_checkpoints
from market_cases import make_market
from retrieval_cases import as_json

pytestmark = pytest.mark.processes

OPTIONS = [
    *("--arch", "resnet8", "--epochs", "12", "--seed", "3", "--save-every", "4", "--amp"),
    *("--accumulate", "2", "--clip-norm", "0.5", "--no-decay", "norm,bias", "--lr", "0.1,0.05"),
]
LIVES = 10


def digest(folder: Path, epochs: int = 12) -> str:
    """SHA-256 of the students' files, of everything they are trained with, and of the metrics."""
    sums = hashlib.sha256()
    for weights in sorted(folder.glob("student_*.safetensors")):
        sums.update(weights.read_bytes())
    assert len(list(folder.glob("student_*.safetensors"))) == 2
    state = torch.load(folder / "last.pt", weights_only=True)
    for student in state["students"]:
        for buffers in student["optimizer"]["state"].values():
            sums.update(buffers["momentum_buffer"].contiguous().numpy().tobytes())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        sums.update(
            json.dumps(
                {k: v for k, v in line.items() if k not in ("seconds", "images_per_s")}
            ).encode()
        )
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    return sums.hexdigest()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    finish(start(folder, *OPTIONS, "--out", str(folder)))
    return digest(folder)


@pytest.mark.slow
def test_stopped_politely(tmp_path: Path, straight: str) -> None:
    folder = tmp_path / "run"
    process = start(folder, *OPTIONS, "--out", str(folder))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        wait_for_checkpoints(process, folder, 3)
        process.send_signal(number)
        output = finish(process, code)
        assert f"--resume {folder}" in output
        assert "Traceback" not in output
        process = start(folder, "--resume", str(folder))
    finish(process)
    assert digest(folder) == straight


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times(tmp_path: Path, straight: str) -> None:
    chance = random.Random(os.environ.get("DML_FAST_KILL_SEED", "1"))
    folder = tmp_path / "run"
    process = start(folder, *OPTIONS, "--out", str(folder))
    while not (folder / "config.json").exists():  # before the first checkpoint
        time.sleep(0.002)
    process.kill()
    finish(process, -signal.SIGKILL)
    process = start(folder, "--resume", str(folder))
    for _ in range(LIVES - 1):
        wait_for_checkpoints(process, folder, 1)
        time.sleep(chance.uniform(0.0, 0.05))
        assert process.poll() is None, "it ended before it could be killed: make the run longer"
        process.kill()
        finish(process, -signal.SIGKILL)
        process = start(folder, "--resume", str(folder))
    finish(process)
    assert digest(folder) == straight
    assert not list(folder.glob(".*.tmp"))


def train_with_kills(folder: Path, options: Sequence[str], counts: Sequence[int]) -> None:
    """Train to the end; each time that so many checkpoints more are there, kill and resume."""
    process = start(folder, *options, "--out", str(folder))
    for count in counts:
        wait_for_checkpoints(process, folder, count)
        assert process.poll() is None
        process.kill()
        finish(process, -signal.SIGKILL)
        process = start(folder, "--resume", str(folder))
    finish(process)


@pytest.mark.slow
def test_killed_while_rows_without_a_label_teach(tmp_path: Path) -> None:
    options = [*OPTIONS, "--epochs", "3", "--labels-per-class", "4", "--views", "per-student"]
    straight, folder = tmp_path / "straight", tmp_path / "run"
    finish(start(straight, *options, "--out", str(straight)))
    train_with_kills(folder, options, (2, 3))  # within the first epoch, and later
    assert digest(folder, 3) == digest(straight, 3)


@pytest.mark.slow
def test_sets_of_a_run_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of identities: killed in the first epoch and in the last, then ranked as sets."""
    data = f"market1501:{make_market(tmp_path / 'market')}"
    options = [
        *("--data", data, "--arch", "resnet8", "--image-size", "0", "--val-fraction", "0.25"),
        *("--batch-size", "16", "--epochs", "6", "--optimizer", "sgd", "--save-every", "1"),
    ]
    straight, folder = tmp_path / "straight", tmp_path / "run"
    finish(start(straight, *options, "--out", str(straight)))
    train_with_kills(folder, options, (1, 4))
    assert digest(folder, 6) == digest(straight, 6)
    rule = ["--sets", "--reduction", "mutual_information"]
    killed, undisturbed = (as_json(capsys, run, *rule) for run in (folder, straight))
    assert killed.pop("run") != undisturbed.pop("run") and killed == undisturbed
    assert killed["sets"]["queries"] == 5


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """While the data is being read no step can end, so only the second signal helps."""
    (tmp_path / "slow_model.py").write_text(
        "import time\n"
        "def build(*, num_classes, in_channels, image_size):\n"
        "    print('building', flush=True)\n"
        "    time.sleep(600)\n"
    )
    folder = tmp_path / "run"
    process = start(folder, "--arch", "slow_model:build", "--cohort", "2", "--out", str(folder))
    assert process.stdout is not None
    assert "building" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
