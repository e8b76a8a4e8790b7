"""What --methods may hold, and what is said of runs that fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dml_fast import cli
from dml_fast.comparison.methods import Contestant, contestants
from dml_fast.comparison.runs import Entry, _room, _why
from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run


def parse(flags: list[str], base: TrainConfig) -> TrainConfig:
    return cli.parse(TrainConfig, flags, "train", default=base)


def found(*given: str) -> dict[str, TrainConfig]:
    return dict(contestants(given, TrainConfig(device="cpu", arch="resnet8"), parse))


def test_methods_by_name_and_by_flags() -> None:
    both = found("independent,dml", "warm=--kl-warmup 5 --arch 'resnet8,resnet14'")
    assert list(both) == ["independent", "dml", "warm"]
    assert [c.method for c in both.values()] == ["independent", "dml", "dml"]
    assert both["warm"].kl_warmup == 5
    assert both["warm"].architectures == ("resnet8", "resnet14")
    assert {c.executor for c in both.values()} == {"sequential"}


def test_one_argument_may_hold_all() -> None:
    assert list(found("independent,dml,slow=--lr 0.01")) == ["independent", "dml", "slow"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["dml"], "fewer than two"),
        (["dml,dmx"], "'dmx': give dml, dml_e"),
        (["dml,dml"], "has dml twice"),
        (["dml", "same=--method dml"], "dml and same are the same"),
        (["dml", "a/b=--lr 0.1"], "'a/b' as a name"),
        (["dml", "=--lr 0.1"], "'' as a name"),
        (["dml", "other=--seed 3"], "other has --seed"),
        (["dml", "other=--data digits2"], "other has --data"),
        (["dml", "other=--out x"], "other has --out"),
        (["dml", "other=--arch 'resnet8"], "cannot be read"),
        (["dml", "other=--arch resnet9"], "resnet9"),
    ],
)
def test_bad_methods_get_one_sentence(given: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        found(*given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--out"),
        (["--out", "x", "--method", "dml_e"], "give --methods"),
        (["--out", "RUN"], "holds a run"),
        (["--out", "x", "--seeds", "0"], "--seeds is 0"),
        (["--out", "x", "--jobs", "-1"], "--jobs is -1"),
        (["--out", "x", "--labels-per-class", "3"], 'independent="--method independent --unlab'),
        (["--out", "x", "--labels", "f"], "learns nothing from the rows that --labels leaves"),
    ],
)
def test_bad_options_of_the_command(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dml_fast import compare

    monkeypatch.chdir(tmp_path)
    Path("RUN").mkdir()
    Path("RUN/config.json").write_text("{}")
    assert cli.run(compare.main, arguments) == 2
    assert words in capsys.readouterr().err


def test_a_run_that_was_refused_is_not_offered_again(tmp_path: Path) -> None:
    (tmp_path / "c-s0.log").write_text("a line\nerror: give a file\n")
    entry = Entry("c", 0, Run(tmp_path / "c-s0"), Contestant("c", TrainConfig()))
    assert "c-s0 failed (error: give a file)" in _why(entry, 2)
    assert _why(entry, 2).endswith("what has trained is kept")
    assert _why(entry, 1).endswith("the same command goes on")


def test_a_full_gpu_is_named(tmp_path: Path) -> None:
    entry = Entry("c", 0, Run(tmp_path / "c-s0"), Contestant("c", TrainConfig()))
    log = tmp_path / "c-s0.log"
    log.write_text(
        "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
    )
    assert _why(entry, 1).endswith("the same command goes on with a smaller --jobs")


@pytest.mark.parametrize(("free", "more"), [(10, 0), (20, 0), (21, 1), (32, 2), (9, 0), (900, 3)])
def test_as_many_runs_as_fit_beside_the_next_of_the_first(
    monkeypatch: pytest.MonkeyPatch, free: int, more: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 0))
    monkeypatch.setattr("dml_fast.comparison.runs.cores", lambda: 4)
    assert _room(10 << 30, torch.device("cuda", 1)) == more
    assert _room(0, torch.device("cuda")) == 0


def test_a_run_that_is_measured_needs_no_weights(tmp_path: Path) -> None:
    entry = Entry("c", 0, Run(tmp_path), Contestant("c", TrainConfig()))
    (tmp_path / "config.json").touch()
    assert not entry.complete
    entry.measures_file.touch()
    assert entry.complete
