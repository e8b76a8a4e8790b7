"""Images per second of whole epochs: loading, augmentation, steps, metrics; no evaluation.

    python -m benchmarks.bench_train [--data digits] [--arch resnet32] [--json FILE]
    pytest benchmarks/bench_train.py --benchmark-only

Ours is `dml_fast.train` itself, for one epoch per turn. It is compared with the loop that users
write, with torch's DataLoader over the same images, augmented one image at a time, and with PyPI's
pytorch-dml with that loader. An image counts once, though every student sees it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.machine import provenance
from benchmarks.common.step_case import SGD, trainer_of_pytorch_dml
from benchmarks.peers.loss import AbsentError, naive_losses
from dml_fast.config import TrainConfig
from dml_fast.data import DataSet, open_dataset
from dml_fast.models import create_model
from dml_fast.reporting.markdown import table
from dml_fast.runs.folder import Run
from dml_fast.training.build import build_trainer
from dml_fast.training.signals import StopRequest

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Epoch = Callable[[], float]  # images a second
OURS = {
    "cpu": ("sequential fp32", "sequential bf16", "threads fp32", "threads bf16", "auto bf16"),
    "cuda": ("sequential bf16", "streams bf16", "graph bf16", "auto bf16"),
}


class Images(Dataset[tuple[Tensor, int]]):
    """Pad, crop at random, flip and normalise one image at a time, as users write it."""

    def __init__(self, data: DataSet) -> None:
        self.images = torch.from_numpy(data.train.pixels)
        self.labels = data.train.labels
        self.pad, self.flip = data.pad, data.flip
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (self.images[index].float() / 255 - self.mean) / self.std
        _, height, width = image.shape
        top, left = (int(torch.randint(2 * self.pad + 1, ())) for _ in range(2))
        image = F.pad(image, (self.pad,) * 4)[:, top : top + height, left : left + width]
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image, int(self.labels[index])


def epoch_of(name: str, config: TrainConfig, data: DataSet) -> Epoch:
    """Return the contestant of that name; each call trains it for one epoch.

    Raises:
        AbsentError: it is not installed.
    """
    if name not in OURS[DEVICE.type]:
        return _others(name, config, data)
    executor, kind = name.split(" ")
    options = {**config.to_dict(), "executor": executor, "amp": kind == "bf16", "epochs": 1}

    def epoch() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder) / "run")
            trainer = build_trainer(TrainConfig(**options), run, None, StopRequest())
            trainer.fit()
            trainer.reporter.close()
            return float(trainer.progress.history[0]["images_per_s"])

    return epoch


def _others(name: str, config: TrainConfig, data: DataSet) -> Epoch:
    size = data.train.pixels.shape
    models = []
    for k, arch in enumerate(config.architectures):
        torch.manual_seed(k)
        model = create_model(
            arch, num_classes=len(data.classes), in_channels=size[1], image_size=size[2:]
        )
        models.append(model.to(DEVICE))
    optimizers = [torch.optim.SGD(m.parameters(), **SGD) for m in models]  # type: ignore[arg-type]
    loader = DataLoader(Images(data), config.batch_size, shuffle=True, drop_last=True)
    trainer = trainer_of_pytorch_dml(models, optimizers, DEVICE) if name != "naive fp32" else None

    def epoch() -> float:
        start = time.perf_counter()
        if trainer is not None:
            trainer.train_epoch(loader, 0)
        else:
            for images, labels in loader:
                x, y = images.to(DEVICE), labels.to(DEVICE)
                losses = naive_losses([model(x) for model in models], y)
                for loss, optimizer in zip(losses, optimizers, strict=True):
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                [loss.item() for loss in losses]
        return len(loader) * config.batch_size / (time.perf_counter() - start)

    return epoch


def names() -> list[str]:
    """All contestants."""
    return ["naive fp32", "pytorch-dml fp32", *OURS[DEVICE.type]]


@pytest.mark.parametrize("name", names())
def bench_train(benchmark: Any, name: str) -> None:
    """One epoch of a tenth of the digits."""
    config = TrainConfig(cohort=2, arch="resnet8", train_fraction=0.2)
    data = open_dataset(config.data, **config.data_options)
    try:
        epoch = epoch_of(name, config, data)
    except AbsentError as reason:
        pytest.skip(str(reason))
    rates: list[float] = []
    benchmark.group = "an epoch of 2 resnet8 on the digits"
    benchmark.pedantic(lambda: rates.append(epoch()), rounds=2, warmup_rounds=0)
    assert all(rate > 0 for rate in rates)
    benchmark.extra_info["images_per_s"] = max(rates)


def compare(config: TrainConfig, data: DataSet, rounds: int) -> list[dict[str, Any]]:
    """Return images per second of each, in turns and a new order each round, after a warm-up."""
    rows: list[dict[str, Any]] = []
    epochs: dict[str, Epoch] = {}
    for name in names():
        row: dict[str, Any] = {"name": name}
        rows.append(row)
        try:
            epochs[name] = epoch_of(name, config, data)
        except AbsentError as reason:
            row["left_out"] = str(reason)
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(rounds + 1):
        for name in order.sample(list(epochs), len(epochs)):
            samples[name].append(epochs[name]())
    for row in rows:
        if row["name"] in samples:
            rates = samples[row["name"]][1:]
            row["images_per_s"], row["max_images_per_s"] = statistics.median(rates), max(rates)
            baseline = statistics.median(samples["naive fp32"][1:])
            row["over_naive"] = row["images_per_s"] / baseline
    return rows


def describe(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    timed = [row for row in result["contestants"] if "images_per_s" in row]
    cells = [
        [
            row["name"],
            f"{row['images_per_s']:.0f}",
            f"{row['max_images_per_s']:.0f}",
            f"{row['over_naive']:.2f}",
        ]
        for row in timed
    ]
    missing = [f"- {r['name']}: {r['left_out']}" for r in result["contestants"] if "left_out" in r]
    return "\n".join(
        [
            f"{result['students']} x {result['arch']}, batch {result['batch']}, {result['data']} "
            f"({result['image']}); {result['rounds']} rounds in turns:",
            "",
            table(["contestant", "images/s, median", "best", "over naive"], cells),
            *(["", "Not timed:", *missing] if missing else []),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and write a report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits")
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--train-fraction", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the report there")
    args = parser.parse_args(argv)
    config = TrainConfig(
        data=args.data,
        arch=args.arch,
        cohort=args.students,
        batch_size=args.batch,
        train_fraction=args.train_fraction,
    )
    data = open_dataset(config.data, **config.data_options)
    result = {
        "arch": args.arch,
        "students": args.students,
        "batch": args.batch,
        "data": data.name,
        "image": " x ".join(map(str, data.train.pixels.shape[1:])),
        "rounds": args.rounds,
        "contestants": compare(config, data, args.rounds),
    }
    report = {"benchmark": "train", **provenance(DEVICE), "results": [result]}
    print(describe(result))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
