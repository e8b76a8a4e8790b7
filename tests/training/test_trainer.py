"""That every option reaches what it is meant for, at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import batch_of

from dml_fast.config import TrainConfig
from dml_fast.engine import StepResult
from dml_fast.engine.optim import lr_factor, ramp
from dml_fast.eval import validation
from dml_fast.eval.classification import Classified, ClassScores
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest
from dml_fast.training.trainer import Trainer

QUICK = {"arch": "resnet8", "cohort": 3, "train_fraction": 0.25}


def build(folder: Path, **options: Any) -> Trainer:
    config = TrainConfig(**{**QUICK, **options})
    run = Run(folder)
    run.prepare(0)
    return build_trainer(config, run, None, StopRequest())


def test_options_reach_the_engine_the_optimizers_and_the_loader(tmp_path: Path) -> None:
    trainer = build(
        tmp_path / "run",
        temperature=3.0,
        label_smoothing=0.2,
        peer_reduction="sum",
        update="alternating",
        kl_weight=0.6,
        momentum=0.7,
        weight_decay=0.01,
        lr=0.04,
        amp=True,
        amp_dtype="bf16",
        augment=False,
    )
    engine = trainer.engine
    assert (engine.term.temperature, engine.term.label_smoothing, engine.kl_weight) == (
        3.0,
        0.2,
        0.6,
    )
    assert (engine.term.peer_reduction, engine.update, engine.method) == (
        "sum",
        "alternating",
        "dml",
    )
    assert trainer.precision.dtype is torch.bfloat16
    for student in trainer.engine.cohort:
        group = student.optimizer.param_groups[0]
        assert (group["momentum"], group["weight_decay"]) == (0.7, 0.01)
        assert float(group["lr"]) == pytest.approx(0.04)
        assert len(student.optimizer.state) == len(student.parameters)  # momentum starts at zero
        conv = student.model.get_parameter("blocks.0.conv1.weight")
        assert conv.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(trainer.data.mean), torch.tensor(trainer.data.std)
    batch = batch_of(trainer.loader, 0, 0)
    pixels = (batch.inputs * std + mean)[:, 0] * 255
    originals = torch.from_numpy(trainer.data.train.images)[batch.ids, 0]
    torch.testing.assert_close(pixels, originals.float(), rtol=0, atol=1e-3)  # not augmented


def test_augmentation_and_memory_order_by_default_and_turned_off(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", augment=False, channels_last=False)
    usual = build(tmp_path / "usual")
    assert not torch.equal(batch_of(plain.loader, 0, 0).inputs, batch_of(usual.loader, 0, 0).inputs)
    assert torch.equal(batch_of(plain.loader, 0, 0).ids, batch_of(usual.loader, 0, 0).ids)
    conv = plain.engine.cohort.models[0].get_parameter("blocks.0.conv1.weight")
    assert conv.is_contiguous()
    assert usual.engine.kl_weight == 1.0
    assert build(tmp_path / "alone", method="independent").engine.kl_weight == 0.0


def test_the_prior_is_that_of_the_labels_that_training_has(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build(tmp_path / "none").engine.term.prior is None
    noisy = build(tmp_path / "all", prior="balance", label_noise=0.4, seed=2)
    train = noisy.data.train
    assert train.hidden is not None and (train.labels != train.hidden).any()
    shares = torch.from_numpy(train.labels).bincount() / len(train)
    torch.testing.assert_close(noisy.engine.term.prior, shares.log())
    lines = [f"{train.names[i]}\t{train.labels[i]}" for i in range(100) if train.labels[i] != 9]
    labels = tmp_path / "labels.tsv"
    labels.write_text("\n".join(lines) + "\n")
    few = {"prior": "balance", "labels": str(labels), "seed": 2}
    trainer = build(tmp_path / "few", **few)
    counts = [max(sum(line.endswith(f"\t{c}") for line in lines), 1) for c in range(10)]
    assert counts[9] == 1
    shares = torch.tensor(counts) / sum(counts)
    torch.testing.assert_close(trainer.engine.term.prior, shares.log())
    assert "prior: a class without a label counts as if it had one" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["dml", "distill"])
def test_every_step_gets_its_rate_ramp_and_roles(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 3, "warmup": 0.5, "kl_warmup": 1.5, "schedule": "cosine", "lr": 0.2}
    trainer = build(tmp_path / "run", method=method, **options)
    seen: list[tuple[float, float, tuple[int, ...], int | None]] = []
    left_out: list[float] = []

    def step(
        inputs: Any,
        target: Any,
        *,
        views: bool,
        kl_scale: float,
        small_loss_scale: float,
        learners: Any,
        teacher: Any,
    ) -> Any:
        assert not views
        left_out.append(small_loss_scale)
        rates = {float(s.optimizer.param_groups[0]["lr"]) for s in trainer.engine.cohort}
        assert len(rates) == 1
        seen.append((rates.pop(), kl_scale, learners, teacher))
        zeros = torch.zeros(len(learners))
        return StepResult(*[zeros] * 7, zeros.bool())

    monkeypatch.setattr(trainer.engine, "step", step)
    assert trainer.fit()
    per_epoch = trainer.loader.steps_per_epoch
    phases: list[tuple[tuple[int, ...], int | None]] = [((0, 1, 2), None)]
    if method == "distill":
        phases = [((0,), None), ((1, 2), 0)]
    expected = [
        (0.2 * lr_factor("cosine", n / per_epoch, 3, 0.5), ramp(n / per_epoch, 1.5), *roles)
        for roles in phases
        for n in range(3 * per_epoch)
    ]
    assert len(seen) == len(expected)
    for mine, theirs in zip(seen, expected, strict=True):
        assert mine == (pytest.approx(theirs[0], abs=1e-7), pytest.approx(theirs[1]), *theirs[2:])
    assert len({kl for _, kl, _, _ in seen}) > per_epoch  # a ramp, not a stair of whole epochs
    scales = [n / per_epoch / 3 for n in range(3 * per_epoch)]  # too few steps for another ramp
    assert left_out == pytest.approx(scales * len(phases))


def test_images_per_second_are_those_of_the_epoch(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", epochs=2)
    trainer.fit()
    images = trainer.loader.steps_per_epoch * trainer.config.batch_size
    for line in trainer.progress.history:
        assert line["images_per_s"] * line["seconds"] == pytest.approx(images, rel=0.02)
    assert trainer.progress.seconds == 0.0  # each epoch's time starts anew


def test_saving_every_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []
    trainer = build(tmp_path / "run", epochs=1, save_every="0.0001s")
    progress = trainer.progress
    monkeypatch.setattr(trainer.saver, "save", lambda best=False: saves.append(progress.step))
    trainer.fit()
    steps = trainer.loader.steps_per_epoch
    assert saves == [*range(1, steps + 1), steps]


def test_only_skips_in_a_row_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path / "run", epochs=4, max_skipped=2, log_every=1)
    calls = 0

    def step(inputs: Any, target: Any, **rest: Any) -> StepResult:
        nonlocal calls
        calls += 1
        zeros = torch.zeros(3)
        return StepResult(*[zeros] * 7, torch.tensor([False, calls % 2 == 0, False]))

    monkeypatch.setattr(trainer.engine, "step", step)
    assert trainer.fit()
    assert sum(line["students"][1]["skipped"] for line in trainer.progress.history) == calls // 2


def test_the_best_checkpoint_is_the_best_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.3, 0.9, 0.5])

    def evaluate(models: Any, *rest: Any, **options: Any) -> Classified:
        score = ClassScores(next(scores), 0.5, ())
        return Classified((score,) * len(models), score, 1)

    monkeypatch.setattr(validation, "evaluate", evaluate)
    trainer = build(tmp_path / "run", epochs=3)
    trainer.fit()
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["step"] == 2 * trainer.loader.steps_per_epoch
