"""Every public option that is a word or a number: a misspelt or impossible value is refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from engine_cases import networks, optimizer_of, student

from dml_fast.config import TrainConfig
from dml_fast.data import open_dataset
from dml_fast.data.plan import Augmentation
from dml_fast.engine import Cohort
from dml_fast.errors import UserError

PACKAGES = ("", ".engine", ".loss", ".models", ".eval", ".data", ".data.loaders")


IDS = {"q_pids": np.array([0, 0, 1, 1]), "g_pids": np.array([0, 1, 1, 0])}
CAMERAS = {"q_cams": np.zeros(4, int), "g_cams": np.ones(4, int)}
VECTORS = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
CODES = np.packbits(VECTORS > 0, axis=1)
SETS = {"query": VECTORS, "gallery": VECTORS, **IDS, **CAMERAS}
DIGITS = open_dataset("digits")
LOGITS = {"logits": torch.zeros(2, 3, 4), "target": torch.zeros(3, dtype=torch.int64)}
HIDDEN = {"hidden": torch.zeros(2, 3, 5), "weight": torch.zeros(2, 4, 5)}
NETWORK = {"num_classes": 3, "in_channels": 1, "image_size": 8}

USUAL: dict[str, dict[str, Any]] = {
    "Cohort": {},  # and networks
    "Engine": {},  # and a cohort
    "FusedLinearMutualLoss": {},
    "FusedMutualLoss": {},
    "MIHashLoss": {},
    "SingleShot": {},
    "Threads": {"cohort": 2},
    "create_model": {"name": "resnet8", **NETWORK},
    "evaluation_batches": {
        "part": DIGITS.test, "batch_size": 8, "mean": DIGITS.mean, "std": DIGITS.std,
        "device": "cpu",
    },
    "linear_mutual_loss": {**HIDDEN, "target": LOGITS["target"]},
    "mihash_loss": {"u": LOGITS["logits"][0], "target": LOGITS["target"]},
    "mutual_loss": LOGITS,
    "mutual_loss_and_grad": LOGITS,
    "open_dataset": {"spec": "digits"},
    "peer_divergence": {"logits": LOGITS["logits"]},
    "pool_queries": {"query": VECTORS, "q_pids": IDS["q_pids"], "q_cams": CAMERAS["q_cams"]},
    "rank_distances": {"dist": np.zeros((4, 4), np.float32), **IDS, **CAMERAS},
    "rank_features": SETS,
    "rank_hamming": {**SETS, "query": CODES, "gallery": CODES},
    "rank_sets": SETS,
    "rerank": {**SETS, "k1": 2, "k2": 1},
    "train_loader": {
        "data": DIGITS, "augmentation": Augmentation(), "batch_size": 8, "seed": 0, "device": "cpu",
    },
}  # fmt: skip
"""Arguments with which each works; those that are not here have no such option."""
FREE = {
    *(("DataSet", name) for name in ("choice", "pad")), ("Student", "arch"), ("Teacher", "arch"),
    ("Teacher", "view"),
    ("open_dataset", "device"), ("open_dataset", "labels"), ("open_dataset", "offsets"),
    ("evaluation_batches", "rank"),
    ("evaluation_batches", "ranks"), ("train_loader", "rank"), ("train_loader", "ranks"),
}  # fmt: skip
"""Options that may be any word, and those that the engine itself fills in."""


def public() -> dict[str, Callable[..., Any]]:
    found = {}
    for package in PACKAGES:
        module = import_module(f"dml_fast{package}")
        found |= {name: getattr(module, name) for name in module.__all__}
    del found["TrainConfig"]  # see below
    del found["FeatureLoss"]  # a type
    return {name: value for name, value in found.items() if callable(value)}


def options(kinds: tuple[type, ...]) -> Iterator[tuple[str, str, Any]]:
    """Name each public callable's options whose default is of these types, and the defaults."""
    for name, call in sorted(public().items()):
        parameters = inspect.signature(call).parameters.values()
        if name == "FusedLinearMutualLoss":  # its signature is *args, **options
            parameters = inspect.signature(public()["FusedMutualLoss"]).parameters.values()
        for option in parameters:
            if name == "FusedLinearMutualLoss" and option.name == "distribution":
                continue  # it has none
            if type(option.default) in kinds and (name, option.name) not in FREE:
                yield name, option.name, option.default


def call(name: str, **given: Any) -> Any:
    usual = dict(USUAL[name])
    if name == "Cohort":
        usual |= {"students": networks(2), "optimizers": optimizer_of}
    if name == "Engine":
        usual["cohort"] = Cohort([student(m) for m in networks(2)])
    made = public()[name](**{**usual, **given})
    if name == "SingleShot":  # it is checked where it is used
        call("rank_distances", protocol=made)
    if name == "evaluation_batches":
        next(made)
    return made


@pytest.mark.parametrize("name", USUAL)
def test_the_usual_arguments_work(name: str) -> None:
    call(name)


@pytest.mark.parametrize(("name", "option", "default"), list(options((str,))))
def test_a_misspelt_word_is_refused_with_the_nearest(name: str, option: str, default: str) -> None:
    for wrong in (f"{default}x", default.upper(), "", None, 3, [default]):
        with pytest.raises(UserError) as refused:
            call(name, **{option: wrong})
        assert option in str(refused.value)
        assert default in str(refused.value)


@pytest.mark.parametrize(("name", "option", "default"), list(options((int, float))))
def test_what_is_no_number_is_refused(name: str, option: str, default: float) -> None:
    for wrong in (math.nan, "3", [1]):
        with pytest.raises(UserError) as refused:
            call(name, **{option: wrong})
        assert option in str(refused.value)


def test_options_of_a_run_by_name_and_type() -> None:
    """The command line and TOML are typed; a program that makes a TrainConfig is not."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    TrainConfig().check()
    checked = 0
    for field in fields(TrainConfig):
        hint, default = hints[field.name], field.default
        wrong: list[Any] = [None, [default], 3 if isinstance(default, str | bool) else "3"]
        if get_origin(hint) is Union:  # auto or a number
            wrong[2:] = ["3", "autox", -1, math.nan]
        if get_args(hint)[:1] == (float | str,):  # for all, or one per student
            wrong[2:] = ["x", "0.1,", -1, math.nan]
        if get_origin(hint) is Literal:
            wrong += [f"{default}x", default.upper()]
        if isinstance(default, float):
            wrong += [math.nan]
        for value in wrong:
            with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} is "):
                TrainConfig(**{field.name: value}).check()  # type: ignore[arg-type]
            checked += 1
    assert checked > 150
    with pytest.raises(UserError, match=r"--schedule is 'cosin', .* did you mean cosine"):
        TrainConfig(schedule="cosin").check()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--epochs is 1\.5: give a value of type int"):
        TrainConfig(epochs=1.5).check()  # type: ignore[arg-type]


def test_an_augmentation_is_checked_when_it_is_made() -> None:
    for name, wrong in (
        ("pad", -1), ("pad", 1.5), ("erasing", 1.1), ("erasing", math.nan), ("jitter", "0.4"),
        ("mixup", -1), ("cutmix", math.inf),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{name} is "):
            Augmentation(**{name: wrong})  # type: ignore[arg-type]
