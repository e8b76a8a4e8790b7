"""Training with each loader, from the command line's parts: swaps, skips, stops, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data_cases import DALI, STREAMING, pieces
from resume_cases import digest, train

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.evaluate import main as evaluate
from dml_fast.runs.folder import Run

pytestmark = pytest.mark.usefixtures("logging_as_before")


SHORT = {"arch": "resnet8", "epochs": 2, "batch_size": 16, "views": "per-student"}


@pytest.mark.slow
@pytest.mark.parametrize("labels", [0, 4])
@pytest.mark.parametrize("name", STREAMING)
def test_a_run_may_change_loader_and_threads_in_mid_epoch(
    name: str, labels: int, tmp_path: Path
) -> None:
    pieces(tmp_path / "data", 32, [(24, 24)], parts=("train", "val"))
    config = TrainConfig(
        data=f"folder:{tmp_path / 'data'}", loader="resident", **SHORT, labels_per_class=labels
    )
    assert train(tmp_path / "straight", config)
    other = replace(config, loader=name, data_threads=1)
    assert not train(tmp_path / "mixed", other, steps=2)
    assert not train(tmp_path / "mixed", config, steps=5, resume=True)
    assert train(tmp_path / "mixed", replace(other, data_threads=3), resume=True)
    assert digest(tmp_path / "mixed") == digest(tmp_path / "straight")


@pytest.mark.parametrize("name", STREAMING)
def test_skipped_files_are_listed_in_the_run_folder(name: str, tmp_path: Path) -> None:
    pieces(tmp_path / "data", 16, [(24, 24)], parts=("train", "val"))
    for part, number in (("train", 3), ("train", 9), ("val", 2)):
        (tmp_path / f"data/{part}/china/{number:03}.jpg").write_bytes(b"")
    config = TrainConfig(
        data=f"folder:{tmp_path / 'data'}", loader=name, skip_corrupt=True, **SHORT
    )
    assert train(tmp_path / "run", config)
    lines = (tmp_path / "run" / "corrupt_files.tsv").read_text().splitlines()
    names = [line.partition("\t")[0] for line in lines]
    assert names == ["train/china/003.jpg", "train/china/009.jpg", "val/china/002.jpg"]
    assert all(line.partition("\t")[2] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMING)
def test_a_run_stopped_by_a_corrupt_file_goes_on_with_skip_corrupt(
    name: str, tmp_path: Path
) -> None:
    pieces(tmp_path / "data", 16, [(24, 24)], parts=("train", "val"))
    (tmp_path / "data/train/flower/007.jpg").write_bytes(b"")
    config = TrainConfig(data=f"folder:{tmp_path / 'data'}", loader=name, **SHORT)
    whole = replace(config, skip_corrupt=True)
    with pytest.raises(UserError, match=r"007\.jpg cannot be decoded"):
        train(tmp_path / "run", config)
    assert train(tmp_path / "run", whole, resume=True)
    assert train(tmp_path / "straight", whole)
    assert digest(tmp_path / "run") == digest(tmp_path / "straight")


@pytest.mark.parametrize("name", STREAMING)
def test_resized_crops_train_and_evaluate(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sizes = [(60, 40), (40, 70), (50, 50)]
    pieces(tmp_path / "data", 16, sizes, parts=("train", "val", "test"))
    config = TrainConfig(
        data=f"folder:{tmp_path / 'data'}", loader=name, image_size="32", crop="resized", **SHORT
    )
    assert train(tmp_path / "run", config)
    assert Run(tmp_path / "run").description["data"]["image_size"] == [32, 32]
    assert evaluate([str(tmp_path / "run"), "--json"]) == 0
    assert '"images": 32' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMING)
def test_sigint_ends_a_run_and_its_pipeline(name: str, tmp_path: Path) -> None:
    pieces(tmp_path / "data", 64, [(32, 32)], parts=("train", "val"))
    command = [
        sys.executable, "-m", "dml_fast.train", "--data", f"folder:{tmp_path / 'data'}",
        "--loader", name, "--cohort", "2", "--arch", "resnet8", "--batch-size", "16",
        "--epochs", "1000", "--out", str(tmp_path / "run"), "--log-every", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped at step" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fallback", DALI])
def test_memory_does_not_grow_over_two_hundred_thousand_images(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 100, [(16, 16)], parts=("train", "val"))
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from data_cases import loader_of, opened\n"
        "from dml_fast.data.plan import Augmentation\n"
        "def resident():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(l.split()[1]) for l in lines if l.startswith('VmRSS'))\n"
        "data = opened(Path(sys.argv[2]), sys.argv[3])\n"
        "loader = loader_of(data, Augmentation(), batch_size=100)\n"
        "seen = 0\n"
        "for epoch in range(1000):\n"
        "    for batch in loader.epoch(epoch):\n"
        "        seen += len(batch.ids)\n"
        "    if seen == 40_000:\n"
        "        before = resident()\n"
        "print(seen, before, resident())\n"
    )
    arguments = [str(Path(__file__).parents[1] / "support"), str(tmp_path), name]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seen, before, after = map(int, run.stdout.split())
    assert seen == 200_000
    assert after - before < 16 * 1024  # KiB
