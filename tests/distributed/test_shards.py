"""Two data ranks train from tar shards of CIFAR-10: each sample once per epoch, also resumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from data_cases import STREAMING
from distributed_cases import content, differences, finish, start, stop_at
from shard_cases import cifar, shards_of

pytestmark = pytest.mark.processes

STUDENTS, IMAGES, BATCH = 2, 270, 30  # without the tenth that validates
OPTIONS = (
    "--cohort", str(STUDENTS), "--arch", "recording_net:build", "--batch-size", str(BATCH),
    "--no-augment", "--seed", "2", "--save-every", "2", "--lr", "0.02", "--mesh", "1x2",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    root = tmp_path_factory.mktemp("cifar")
    return shards_of(
        cifar(shared_data / "cifar10-jpeg.tar.xz", root / "folder", 30), root / "tar", 50
    )


def recorded(folder: Path) -> list[list[str]]:
    """Return the images that each rank trained on, in order; once for each student."""
    return [(folder / f"rank_{rank}").read_text().split() for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("loader", STREAMING)
def test_two_data_ranks_see_each_sample_once_an_epoch_also_when_resumed(
    loader: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {name: tmp_path / f"{name} record" for name in ("straight", "resumed")}
    arguments = ("--data", f"shards:{shards}", "--loader", loader, "--epochs", "3", *OPTIONS)
    for record in records.values():
        record.mkdir()

    monkeypatch.setenv("DML_FAST_RECORD", str(records["straight"]))
    output = finish(start(2, *arguments, "--out", str(tmp_path / "straight")))
    assert "mesh 1x2" in output and "600 samples in 12 shards" in output
    first, second = recorded(records["straight"])
    each = STUDENTS * IMAGES // 2  # lines per rank and epoch
    assert len(first) == len(second) == 3 * each
    for epoch in range(3):
        lines = slice(epoch * each, (epoch + 1) * each)
        seen = Counter(first[lines]) + Counter(second[lines])
        assert len(seen) == IMAGES
        assert set(seen.values()) == {STUDENTS}
        assert not set(first[lines]) & set(second[lines])
    assert first[:each] != first[each : 2 * each]  # the order differs

    monkeypatch.setenv("DML_FAST_RECORD", str(records["resumed"]))
    folder = tmp_path / "resumed"
    stop_at(start(2, *arguments, "--out", str(folder)), folder, 4)  # 9 steps per epoch
    middle = len(recorded(records["resumed"])[0])
    assert middle % each > 0 or middle < 3 * each
    finish(start(2, "--resume", str(folder), "--arch", "recording_net:build", "--mesh", "1x2"))
    assert recorded(records["resumed"]) == [first, second]
    assert not differences(content(folder), content(tmp_path / "straight"))
