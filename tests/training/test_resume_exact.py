"""A run that is stopped anywhere ends as one that never was: bit for bit, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from market_cases import make_market
from resume_cases import SHORT, digest, train
from several_cases import digits_side_by_side

from dml_fast.config import TrainConfig
from dml_fast.runs import checkpoint
from dml_fast.runs.folder import Run

pytestmark = pytest.mark.slow

CASES = {
    "plain": {},
    "amp, warm-up of the KL": {"amp": True, "kl_warmup": 1.5},
    "dropout, classes in turn, policy": {
        "arch": "wrn_10_1_drop0.3",
        "balance": True,
        "augment_policy": "trivial",
    },
    "alternating, adamw": {"update": "alternating", "optimizer": "adamw"},
    "views and mixing": {
        "views": "per-student",
        "mixup": 0.2,
        "cutmix": 1.0,
        "color_jitter": 0.3,
        "random_erasing": 0.5,
    },
    "rows left out, prior": {"small_loss": 0.3, "label_noise": 0.3, "prior": "balance"},
    "rows without a label": {
        "labels_per_class": 3,
        "batch_size": 32,
        "views": "per-student",
        "label_noise": 0.1,
        "class_weights": "auto",
    },
    "steps, distill": {
        "method": "distill",
        "epochs": 2,
        "epoch_steps": 5,
        "labels_per_class": 1,
        "unlabelled_share": 0.5,
    },
    "distill": {"method": "distill", "epochs": 2, "schedule": "paper"},
    "parts, one optimizer each": {
        "accumulate": 2,
        "clip_norm": 0.5,
        "no_decay": "norm,bias",
        "optimizer": "sgd,adamw",
        "lr": "0.1,0.002",
        "weight_decay": "0.01,0.1",
    },
    "codes": {"head": "hash", "bits": 20, "amp": True},
    "averages teach": {
        "arch": "wrn_10_1_drop0.3",
        "ema": 0.9,
        "teach_with": "ema",
        "weights": "ema",
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_split_equals_straight(tmp_path: Path, options: dict[str, Any]) -> None:
    config = TrainConfig(**{**SHORT, **options})
    assert train(tmp_path / "straight", config)
    per_epoch = Run(tmp_path / "straight").metrics()[0]["step"]
    assert per_epoch >= 4
    split = tmp_path / "split"
    # within an epoch, at an epoch's end, and right after it
    assert not train(split, config, steps=per_epoch - 2)
    assert not train(split, config, steps=2 * per_epoch, resume=True)
    assert not train(split, config, steps=2 * per_epoch + 1, resume=True)
    assert train(split, config, resume=True)
    assert digest(split) == digest(tmp_path / "straight")


def test_a_run_that_learns_identities_is_split_too(tmp_path: Path) -> None:
    config = TrainConfig(
        data=f"market1501:{make_market(tmp_path / 'market')}",
        arch="resnet8",
        epochs=2,
        batch_size=16,
        image_size="0",
        val_fraction=0.25,
        triplet_weight=0.5,
        random_erasing=0.5,
    )
    assert train(tmp_path / "straight", config)
    Run(tmp_path / "straight").config.check()  # as --resume does
    per_epoch = Run(tmp_path / "straight").metrics()[0]["step"]
    assert not train(tmp_path / "split", config, steps=per_epoch - 1)
    assert train(tmp_path / "split", config, resume=True)
    assert digest(tmp_path / "split") == digest(tmp_path / "straight")


def test_a_run_on_several_labels_for_a_row_is_split_too(tmp_path: Path) -> None:
    config = TrainConfig(
        data=f"folder:{digits_side_by_side(tmp_path / 'digits', {'train': 96})}",
        arch="resnet8",
        epochs=2,
        batch_size=16,
        views="per-student",
        mixup=0.2,
        label_smoothing=0.1,
        amp=True,
    )
    assert train(tmp_path / "straight", config)
    Run(tmp_path / "straight").config.check()  # as --resume does
    assert not train(tmp_path / "split", config, steps=3)
    assert not train(tmp_path / "split", config, steps=6, resume=True)
    assert train(tmp_path / "split", config, resume=True)
    assert digest(tmp_path / "split") == digest(tmp_path / "straight")


def test_the_digest_notices_one_step_less_and_another_seed(tmp_path: Path) -> None:
    digests = set()
    for name, options in {"a": {}, "b": {"seed": 6}, "c": {"kl_weight": 0.999}}.items():
        train(tmp_path / name, TrainConfig(**{**SHORT, "epochs": 1, **options}))
        digests.add(digest(tmp_path / name))
    assert len(digests) == 3


def test_saving_and_logging_more_often_changes_nothing(tmp_path: Path) -> None:
    config = TrainConfig(**SHORT)
    often = TrainConfig(**SHORT, save_every="1", log_every=1)
    assert train(tmp_path / "a", config)
    assert train(tmp_path / "b", often)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_kill_between_the_checkpoint_and_what_follows_it_is_fixed(tmp_path: Path) -> None:
    config = TrainConfig(**SHORT)
    folder = tmp_path / "run"
    train(folder, config)
    expected = digest(folder)
    run = Run(folder)
    run.write_metrics(run.metrics()[:-1])
    if (
        checkpoint.load(run.checkpoint("best"))["step"]
        == checkpoint.load(run.checkpoint("last"))["step"]
    ):
        run.checkpoint("best").unlink()
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert train(folder, config, resume=True)
    assert digest(folder) == expected


NEW = ("labels", "labels_per_class", "unlabelled_share", "classes", "levels", "dim", "epoch_steps",
       "small_loss", "prior", "balance", "class_weights", "augment_policy")  # fmt: skip


def test_a_run_of_before_rows_could_lack_labels_goes_on(tmp_path: Path) -> None:
    config = TrainConfig(**{**SHORT, "epochs": 2})
    assert train(tmp_path / "straight", config)
    folder = tmp_path / "before"
    assert not train(folder, config, steps=3)
    run = Run(folder)
    written = json.loads(run.config_file.read_text())
    state = torch.load(folder / "last.pt", weights_only=True)
    saved = json.loads(state["config"])
    for options in (written["config"], saved):
        for name in NEW:
            del options[name]
        assert options["kl_warmup"] == 0.0
    del written["data"]["inputs"]
    run.config_file.write_text(json.dumps(written))
    torch.save(
        {**state, "config": json.dumps(saved), "meter": state["meter"][..., :8]}, folder / "last.pt"
    )
    assert train(folder, Run(folder).config, resume=True)
    assert digest(folder) == digest(tmp_path / "straight")
