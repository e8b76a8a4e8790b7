"""A user's mistake in a job of several processes: one sentence on rank 0, exit code 2 on all."""

from __future__ import annotations

import socket
from pathlib import Path

import distributed_cases
import pytest
from distributed_cases import by_hand

pytestmark = pytest.mark.processes

SMALL = ("--arch", "resnet8", "--epochs", "1")

MISTAKES = {  # arguments, further ones of rank 1 alone, and what rank 0 prints
    "K not divisible": (("--cohort", "3", "--mesh", "2x1"), (), "cannot be shared out equally"),
    "another mesh": (("--cohort", "4", "--mesh", "2x2"), (), "--mesh 2x2 needs 4 processes"),
    "nccl": (("--backend", "nccl"), (), "--backend is nccl, which needs CUDA"),
    "lr differs": ((), ("--lr", "0.3"), "rank 1 was started with --lr 0.3 and rank 0 with 0.0"),
    "data differ": ((), ("--seed", "7"), "rank 1 was started with --seed 7"),
    "no data": (("--data", "folder:/nonexistent"), (), "folder:/nonexistent does not exist"),
    "columns": (("--mesh", "1x2", "--batch-size", "63"), (), "give a multiple of that"),
    "alternating": (("--update", "alternating"), (), "--update alternating refreshes"),
    "no run": (("--resume", "/nonexistent"), (), "/nonexistent is not a run folder"),
    "twins": (("--arch", "twins:build"), (), "students 0 and 1 (twins:build) start with the same"),
    "one network": (("--arch", "resnet8,broken:build"), (), "rank 1: broken:build with images"),
}


def check(ends: list[tuple[int, str]], says: str) -> None:
    assert [code for code, _ in ends] == [2] * len(ends), ends
    (line,) = ends[0][1].strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert all(output == "" for _, output in ends[1:]), ends


@pytest.mark.parametrize("name", MISTAKES)
def test_one_sentence_on_rank_0_and_2_on_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, second, says = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    Path("twins.py").write_text(
        "import torch\n"
        "from group_norm_net import GroupNormNet\n"
        "def build(*, num_classes, in_channels, image_size):\n"
        "    torch.manual_seed(1)\n"
        "    return GroupNormNet(num_classes, in_channels, image_size[0])\n"
    )
    Path("broken.py").write_text(
        "import torch\n"
        "def build(*, num_classes, in_channels, image_size):\n"
        "    return torch.nn.Linear(3, num_classes)\n"
    )
    check(by_hand(2, *SMALL, *arguments, each={1: list(second)}), says)
    assert not list(tmp_path.glob("runs/*"))


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check(by_hand(2, *SMALL, "--out", str(tmp_path)), "holds a run already")


def test_a_wrong_flag_is_shown_once() -> None:
    ends = by_hand(2, "--nonsense", "3")
    assert [code for code, _ in ends] == [2, 2]
    assert "nonsense" in ends[0][1]
    assert ends[1][1] == ""


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(8)
        port = other.getsockname()[1]
        monkeypatch.setattr(distributed_cases, "free_port", lambda: port)
        ends = by_hand(2, *SMALL, module="distributed_hasty_worker")
        check(ends, f"port {port} of 127.0.0.1 cannot be served (it is in use)")
