"""Several real processes train as one does: bit for bit over rows, to roundings over columns.

20 steps each. What one process does is computed here, with one thread as each rank has.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import SHORT, content, differences, distance, farthest, finish, start
from market_cases import make_market
from pair_cases import make_pairs
from safetensors.torch import load_file
from several_cases import digits_side_by_side
from vector_cases import two_views

from dml_fast.config import TrainConfig
from dml_fast.engine.threads import intra_op_threads
from dml_fast.eval.validation import validate
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest
from dml_fast.training.trainer import Trainer

pytestmark = pytest.mark.processes

Options = dict[str, Any]
TWO, FOUR = {"cohort": 2}, {"cohort": 4}
HASH = {"head": "hash", "bits": 16, "epochs": 2}
CHOOSY = {"small_loss": 0.3, "label_noise": 0.3, "prior": "balance"}
GROUP_NORM = {"arch": "group_norm_net:build", "lr": 0.02}
DOUBLE = {**GROUP_NORM, "arch": "group_norm_net:build_double"}
AVERAGES = {"ema": 0.9, "teach_with": "ema", "weights": "ema"}
PARTS = {
    "accumulate": 2,
    "clip_norm": 0.5,
    "no_decay": "norm,bias",
    "optimizer": "sgd,adamw",
    "lr": "0.05,0.001",
    "weight_decay": "0.01,0.1",
}
UNLABELLED = {
    "mesh": "1x2",
    "labels_per_class": 5,
    "batch_size": 60,
    "unlabelled_share": 0.7,
}

ROWS: dict[str, tuple[int, Options]] = {  # processes, and what is trained
    "2x1": (2, TWO),
    "4x1": (4, FOUR),
    "4x1 amp": (4, {**FOUR, "amp": True}),
    "uneven": (2, {**FOUR, "mesh": "2x1", "shares": "3,1"}),
    "measured, mixed": (
        2,
        {"arch": "resnet8,wrn_10_1,resnet8", "mesh": "2x1", "shares": "measured"},
    ),
    "threads": (2, {**FOUR, "executor": "threads"}),
    "dml_e, sum": (2, {**FOUR, "method": "dml_e", "peer_reduction": "sum", "temperature": 2.0}),
    "independent": (2, {**TWO, "method": "independent"}),
    "distill": (2, {**FOUR, "method": "distill", "epochs": 1}),
    "views, mixing, smoothing": (
        2,
        {**FOUR, "views": "per-student", "mixup": 0.2, "label_smoothing": 0.1, "kl_warmup": 1.5},
    ),
    "rows left out": (2, {**FOUR, **CHOOSY}),
    "parts, one optimizer each": (2, {**TWO, **PARTS}),
    "2x1 vectors": (2, FOUR),
    "2x1 averages of vectors": (2, {**FOUR, **AVERAGES}),
    "measured vectors": (2, {"cohort": 3, "mesh": "2x1", "shares": "measured"}),
    "2x1 market": (2, TWO),
    "2x1 hash": (2, {**TWO, **HASH}),
    "2x1 pairs": (2, TWO),
    "2x1 labels": (2, TWO),
}
COLUMNS: dict[str, tuple[int, Options]] = {
    "1x2": (2, {**TWO, **GROUP_NORM, "mesh": "1x2"}),
    "2x2": (4, {**FOUR, **GROUP_NORM, "mesh": "2x2"}),
    # auto would take fp32 on a CPU without bf16 instructions
    "2x2 amp": (4, {**FOUR, **GROUP_NORM, "mesh": "2x2", "amp": True, "amp_dtype": "bf16"}),
    "1x2 threads, class weights": (
        2,
        {
            **FOUR,
            **GROUP_NORM,
            "mesh": "1x2",
            "executor": "threads",
            "class_weights": "auto",
        },
    ),
    "1x2 fsdp": (2, {**TWO, **GROUP_NORM, "mesh": "1x2", "fsdp": True}),
    "2x2 fsdp adamw": (
        4,
        {**FOUR, **GROUP_NORM, "mesh": "2x2", "fsdp": True, "optimizer": "adamw", "lr": 1e-4},
    ),
    "1x2 rows left out": (2, {**TWO, **GROUP_NORM, **CHOOSY, "mesh": "1x2"}),
    # in fp32 one activation that changes its sign, on some CPUs, is seen by adamw
    "1x2 parts float64": (2, {**TWO, **DOUBLE, **PARTS, "mesh": "1x2"}),
    "1x2 fsdp parts, averages": (
        2,
        {**TWO, **GROUP_NORM, **PARTS, **AVERAGES, "mesh": "1x2", "fsdp": True},
    ),
    "1x2 unlabelled": (2, {**TWO, **GROUP_NORM, **UNLABELLED}),
    "1x2 unlabelled float64": (2, {**TWO, **DOUBLE, **UNLABELLED, "seed": 3}),
    "1x2 vectors": (2, {**TWO, "mesh": "1x2", "balance": True}),
    "1x2 fsdp vectors": (2, {"cohort": 3, "mesh": "1x2", "fsdp": True}),
    "1x2 labels": (2, {**TWO, **GROUP_NORM, "mesh": "1x2"}),
    "1x2 averages of vectors": (2, {**TWO, **AVERAGES, "mesh": "1x2"}),
    "1x2 alternating": (2, {**TWO, **GROUP_NORM, "mesh": "1x2", "update": "alternating"}),
}
# networks with BatchNorm, whose statistics are of each column's images
VALIDATED: dict[str, tuple[int, Options]] = {
    "2x2 validation": (4, {**FOUR, "mesh": "2x2", "train_fraction": 0.2}),
    "1x2 market": (2, {**TWO, "mesh": "1x2"}),
    "1x2 pairs": (2, {**TWO, "mesh": "1x2"}),
    "2x2 labels": (4, {**FOUR, "mesh": "2x2"}),
    "1x2 fsdp market": (2, {**TWO, "mesh": "1x2", "fsdp": True}),  # passes beside `forward`
    "1x2 fsdp codes": (2, {**TWO, "mesh": "1x2", "fsdp": True, "head": "hash"}),
}
# a loss on features compares each column's own rows, as one process would not
COPIES: dict[str, tuple[int, Options]] = {
    "1x2 hash": (2, {**TWO, **GROUP_NORM, **HASH, "mesh": "1x2"}),
    "1x2 fsdp hash": (2, {**TWO, **GROUP_NORM, **HASH, "mesh": "1x2", "fsdp": True}),
}
VECTORS: Options = {
    "arch": "mlp_64_drop0",  # what is dropped differs between columns
    "views": "levels",
    "epochs": 4,
    "batch_size": 16,
    "train_fraction": 1.0,
}
PAIRS: Options = {
    "arch": "displacement_8",
    "search": 3,
    "patch": 12,
    "dither": 1.0,
    "batch_size": 16,
    "train_fraction": 1.0,
}
MARKET: Options = {
    "epochs": 2,
    "batch_size": 16,
    "image_size": "0",
    "val_fraction": 0.25,
    "train_fraction": 1.0,
    "triplet_weight": 0.5,
}


LABELS: Options = {"batch_size": 16, "train_fraction": 1.0}


Trained = Callable[..., tuple[Trainer, Path]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a case for one process, and the folder that several wrote for it in one common job."""
    folder = tmp_path_factory.mktemp("equality")
    market = {**MARKET, "data": f"market1501:{make_market(folder / 'market')}"}
    vectors = {**VECTORS, "data": f"vectors:{two_views(folder / 'rows.npz')}"}
    pairs = {**PAIRS, "data": make_pairs(folder / "pairs.npz", 180)}
    labels = {**LABELS, "data": f"folder:{digits_side_by_side(folder / 'labels', wide=1)}"}
    others = {"market": market, "vectors": vectors, "pairs": pairs, "labels": labels}
    cases = {
        name: (n, {**SHORT, **options, **others.get(name.rpartition(" ")[2], {})})
        for name, (n, options) in (ROWS | COLUMNS | VALIDATED | COPIES).items()
    }
    for processes in (2, 4):
        mine = {name: options for name, (n, options) in cases.items() if n == processes}
        (folder / f"{processes}.json").write_text(json.dumps(mine))
        arguments = str(folder / f"{processes}.json"), str(folder / "several")
        finish(start(processes, *arguments, module="distributed_worker"))

    def both(name: str, **changes: Any) -> tuple[Trainer, Path]:
        own = {"mesh": "", "shares": "", "fsdp": False}
        run = Run(Path(tempfile.mkdtemp(dir=folder)))
        config = TrainConfig(**{**cases[name][1], **own, **changes})
        return build_trainer(config, run, None, StopRequest()), folder / "several" / name

    return both


def compared(trained: Trained, name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    trainer, several = trained(name, **changes)
    with intra_op_threads(1):
        assert trainer.fit()
        trainer.finish()
    assert trainer.progress.step >= 20 or "market" in name
    return content(trainer.saver.run.folder), content(several)


@pytest.mark.parametrize("name", ROWS)
def test_students_over_rows_are_bit_for_bit_those_of_one_process(
    name: str, trained: Trained
) -> None:
    one, several = compared(trained, name)
    assert not differences(one, several)


@pytest.mark.parametrize("name", COLUMNS)
def test_images_over_columns_change_roundings_only(name: str, trained: Trained) -> None:
    one, several = compared(trained, name)
    assert differences(one, several)  # so it was not the same computation
    if "amp" not in name:
        assert farthest(one, several) < (1e-13 if "float64" in name else 2e-6)
        for mine, theirs in zip(
            one["line 2"]["students"], several["line 2"]["students"], strict=True
        ):
            for key in ("loss", "ce", "kl"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
        return
    # each column rounds its gradients to bf16, which changes less than bf16 itself does
    exact, _ = compared(trained, name, amp=False)
    assert 0 < distance(one, several) < distance(one, exact)


@pytest.mark.parametrize("name", VALIDATED)
def test_validation_over_columns_counts_every_image_once(name: str, trained: Trained) -> None:
    trainer, several = trained(name)
    path = several / "last.pt"
    trainer.saver.resume(path)
    scores, ensemble = validate(
        trainer.engine.cohort, trainer.data, trainer.precision, True, "market1501"
    )
    line = Run(several).metrics()[-1]
    for mine, theirs in zip(scores, line["students"], strict=True):
        assert mine.items() <= theirs.items()
    assert {f"ensemble_{key}": value for key, value in ensemble.items()}.items() <= line.items()


def test_copies_and_shards_learn_the_same_from_features(trained: Trained) -> None:
    copies, shards = (content(trained(name)[1]) for name in COPIES)
    assert farthest(copies, shards) < 1e-5  # the bins of a histogram have corners
    students = copies["line 2"]["students"]
    for mine, theirs in zip(students, shards["line 2"]["students"], strict=True):
        assert mine["mihash"] < -0.01
        assert mine["mihash"] == pytest.approx(theirs["mihash"], rel=1e-4)


def test_final_weights_are_one_file_a_student(trained: Trained) -> None:
    for name in ("4x1", "1x2 fsdp"):
        trainer, several = trained(name)
        assert trainer.fit()
        trainer.finish()
        files = sorted(path.name for path in trainer.saver.run.folder.glob("*.safetensors"))
        assert files == sorted(path.name for path in several.glob("*.safetensors"))
        assert len(files) == len(trainer.engine.cohort)
        for file in files:
            mine, theirs = load_file(trainer.saver.run.folder / file), load_file(several / file)
            assert mine.keys() == theirs.keys()
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if name == "4x1" else 2e-6)
