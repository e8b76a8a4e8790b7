"""The options of a training run: their names and groups in ``--help``, and values refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dml_fast import cli
from dml_fast.config import TrainConfig, flag
from dml_fast.config.files import from_mapping
from dml_fast.errors import UserError
from dml_fast.train import arguments

FLAG = re.compile(r"^. (--[a-z][a-z-]+)", re.MULTILINE)


def test_help_begins_with_what_most_runs_need(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^\W+(\w+) options \W", text, re.MULTILINE)[:2] == ["train", "usual"]
    usual = text[text.index("usual options") : text.index("teaching options")]
    assert len(FLAG.findall(usual)) <= 20 and "--cohort INT" in usual and "--lr FLOAT|STR" in usual
    assert {*FLAG.findall(text)} == {*map(flag, TrainConfig().to_dict()), "--config", "--resume"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1,x"}, "--lr is '0.1,x': give a number, or one per student"),
        ({"lr": "0.1,-1"}, "--lr is -1.0: give a finite number, 0 or more"),
        ({"momentum": "0.9,0.8,0.7"}, "gives 3 values and the cohort has 2 students"),
        ({"optimizer": "sgd,adam"}, "--optimizer is 'adam', which is none of"),
        ({"optimizer": "sgd,adamw,sgd"}, "gives 3 values and the cohort has 2 students"),
        ({"ema": 1.0}, "--ema is 1.0: give off, or a number between 0 and 1"),
        ({"weights": "ema"}, "--weights is ema without averages: give --ema 0.999"),
        ({"teach_with": "ema"}, "--teach-with is ema without averages"),
        (
            {"ema": 0.9, "teach_with": "ema", "method": "distill"},
            "--teach-with ema means nothing with --method distill: give dml, or leave out",
        ),
        (
            {"ema": 0.9, "teach_with": "ema", "update": "alternating"},
            "--teach-with ema means nothing with --update alternating: give simultaneous",
        ),
        (
            {"ema": 0.9, "teach_with": "ema", "teachers": "runs/a"},
            "--teach-with ema means nothing with --teachers runs/a: leave it out",
        ),
        ({"clip_norm": 0.0}, "--clip-norm is 0.0: give off, or a number above 0"),
        ({"max_time": "90"}, "--max-time is '90': give hours, minutes or seconds (90m)"),
    ],
)
def test_values_of_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig(**options).check()


def test_the_command_line_is_what_the_docs_describe() -> None:
    """A fixed list: a change of a flag changes it and the changelog."""
    flags = set(TrainConfig().to_dict())
    assert flags == {
        "cohort", "arch", "method", "update", "kl_weight", "kl_warmup", "temperature",
        "peer_reduction", "label_smoothing", "data", "download", "image_size", "val_fraction",
        "train_fraction", "label_noise", "augment", "skip_corrupt", "epochs", "batch_size",
        "optimizer", "lr", "momentum", "weight_decay", "schedule", "warmup", "amp", "amp_dtype",
        "channels_last", "device", "seed", "out", "save_every", "log_every", "max_skipped",
        "pretrained", "triplet_weight", "triplet_margin", "random_erasing",
        "num_instances", "val_protocol", "executor", "compile",
        "color_jitter", "mixup", "cutmix", "views",
        "crop", "loader", "data_threads", "mesh", "shares", "fsdp", "backend",
        "labels", "labels_per_class", "unlabelled_share", "classes", "levels", "dim",
        "epoch_steps", "small_loss", "prior", "head", "bits", "mihash_weight", "mihash_bins",
        "mihash_scale", "patch", "search", "dither", "symmetrise", "offsets",
        "init_from", "teachers", "ema", "teach_with", "weights", "accumulate", "clip_norm",
        "no_decay", "max_steps", "max_time", "patience", "augment_policy", "balance",
        "class_weights", "log",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema", "off or a number"),
        ("clip-norm", "off or a number"),
        ("kl-warmup", "auto or a number"),
    ],
)
def test_a_word_in_place_of_a_number_is_answered_in_words(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is 'abc': give {value}$"):
        arguments([f"--{name}", "abc"])


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("", "off"),
        ("--compile", "student"),
        ("--compile --epochs 3", "student"),
        ("--epochs 3 --compile cohort", "cohort"),
    ],
)
def test_a_flag_may_stand_without_its_value(given: str, value: str) -> None:
    assert cli.parse(TrainConfig, given.split(), "train").compile == value


@pytest.mark.parametrize(("written", "value"), [(True, "student"), (False, "off")])
def test_runs_from_before_compile_had_values_are_read(written: bool, value: str) -> None:
    assert from_mapping({"compile": written}, "config.json").compile == value
