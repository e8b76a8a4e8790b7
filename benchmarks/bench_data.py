"""Images per second of each loader and of torchvision, and how long a training step waits for data.

    python -m benchmarks.bench_data CASE --data DIR [--json FILE]

CASE is cifar (32x32 JPEGs), reid (128x64, resized), photos (400x400 to random resized 224x224),
shards (32x32 JPEGs in tar shards and in a folder, and reading the headers of the tars), memory
(CIFAR as an array), views (four versions of each image, and one) or wait (the share of a training
step that is spent waiting for data). DIR holds train/CLASS/*, or for reid the folders of
Market-1501; photos and views make their own images from two photographs of scikit-learn.
Contestants take turns, each with one pass over the same number of images; the results are medians.
They are added to FILE, one entry for each case. torchvision is left out if it is not installed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.machine import installed, provenance
from benchmarks.peers import data as data_peers
from benchmarks.peers.data import Pass
from dml_fast.data import DataSet, open_dataset
from dml_fast.data.loaders import train_loader
from dml_fast.data.loaders.assemble import Loader
from dml_fast.data.plan import Augmentation
from dml_fast.data.readers.samples import read_index
from dml_fast.data.reading import dali_is_installed
from dml_fast.machine import keep_freed_memory

BATCH = 64
CASES = ("cifar", "shards", "reid", "photos", "memory", "views", "wait")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def streaming() -> dict[str, dict[str, Any]]:
    """Return the options of the streaming loaders, by name."""
    dali = {f"dali, {n} threads": {"loader": "dali", "threads": n} for n in (1, 2)}
    fallback = {f"fallback, {n} threads": {"loader": "fallback", "threads": n} for n in (1, 2)}
    return (dali if dali_is_installed() else {}) | fallback


def passes(loader: Loader, images: int) -> Pass:
    """Return a pass over the first ``images`` images of an epoch, a new epoch each time."""
    epochs = iter(range(10**6))
    steps = min(images // BATCH, loader.steps_per_epoch)

    def once() -> int:
        seen = 0
        for _, batch in zip(range(steps), loader.epoch(next(epochs)), strict=False):
            seen += len(batch.ids)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return seen

    return once


def loader_of(data: DataSet, how: Augmentation, **options: Any) -> Loader:
    return train_loader(data, how, batch_size=BATCH, seed=0, device=DEVICE, **options)


def ours(spec: str, how: Augmentation, images: int, **options: Any) -> dict[str, Pass]:
    """Return a pass of each of our streaming loaders over a data set."""
    found = {}
    for name, choice in streaming().items():
        data = open_dataset(spec, **options, **choice)
        found[name] = passes(loader_of(data, how, threads=choice["threads"]), images)
    return found


def resident(data: DataSet, how: Augmentation, images: int) -> dict[str, Pass]:
    return {
        f"resident, {n} threads": passes(loader_of(data, how, threads=n), images) for n in (1, 2)
    }


def torchvision(make: Callable[[int], Pass]) -> dict[str, Pass]:
    """Return a pass of torchvision with 0, 1 and 2 workers, if it is installed."""
    if not data_peers.has_torchvision():
        print("torchvision is not installed and is left out", file=sys.stderr)
        return {}
    return {f"torchvision, {n} workers": make(n) for n in (0, 1, 2)}


@contextmanager
def photographs(count: int, side: int) -> Iterator[Path]:
    """Make a folder of pieces of two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [np.asarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for part, number in (("train", count), ("val", 2)):
            for label, photo in enumerate(photos):
                target = Path(folder, part, f"class{label}")
                target.mkdir(parents=True)
                for index in range(number // 2):
                    top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
                    piece = Image.fromarray(photo[top : top + side, left : left + side])
                    piece.save(target / f"{index:05}.jpg", quality=90)
        yield Path(folder)


def thinned(root: Path, target: Path, count: int) -> Path:
    """Link ``count`` of the images in ``root``/CLASS/, equally many of each class."""
    for part in sorted(path for path in root.iterdir() if path.is_dir()):
        (target / part.name).mkdir(parents=True)
        for file in sorted(part.iterdir())[: count // 10]:
            (target / part.name / file.name).symlink_to(file)
    return target


def cifar(root: Path) -> Iterator[dict[str, Pass]]:
    images = 4_000
    how = Augmentation(pad=4, flip=True)
    with tempfile.TemporaryDirectory() as folder:
        train = thinned(root.absolute() / "train", Path(folder) / "train", images)
        (Path(folder) / "val").symlink_to(root.absolute() / "test")
        spec = f"folder:{folder}"
        theirs = torchvision(lambda n: data_peers.image_folder(train, "cifar", BATCH, n))
        kept = open_dataset(spec, loader="resident")
        yield theirs | ours(spec, how, images) | resident(kept, how, images)


def shards(root: Path) -> Iterator[dict[str, Pass]]:
    """Copy the files, so that folder and shards are on one disk; all is in the page cache."""
    images, each = 10_000, 2_000
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(path for path in (root / "train").rglob("*.jpg"))
        classes = sorted({path.parent.name for path in files})
        chosen = files[:: len(files) // images][:images]
        for start in range(0, images, each):
            with tarfile.open(Path(folder, f"train-{start // each:03}.tar"), "w") as tar:
                for number, path in enumerate(chosen[start : start + each]):
                    label = str(classes.index(path.parent.name)).encode()
                    for name, content in ((".jpg", path.read_bytes()), (".cls", label)):
                        info = tarfile.TarInfo(f"{number:06}{name}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        for path in chosen:
            target = Path(folder, "train", path.parent.name, path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        how = Augmentation(pad=4, flip=True)
        tars = sorted(Path(folder).glob("*.tar"))
        yield {
            "headers, ours": lambda: sum(len(read_index(path).images) for path in tars),
            "headers, tarfile": lambda: sum(data_peers.samples_of(path) for path in tars),
        } | {
            f"{kind}, {name}": run
            for kind, spec in (("folder", folder), ("shards", f"{folder}/*.tar"))
            for name, run in ours(f"{kind}:{spec}", how, 4_000).items()
        }


def reid(root: Path) -> Iterator[dict[str, Pass]]:
    how, images = Augmentation(pad=8, flip=True, erasing=0.5), 1_500
    spec, options = f"market1501:{root}", {"image_size": (128, 64), "val_fraction": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "all" / "x"
        target.mkdir(parents=True)
        for file in sorted((root.absolute() / "bounding_box_train").iterdir())[:images]:
            (target / file.name).symlink_to(file)
        theirs = torchvision(lambda n: data_peers.image_folder(target.parent, "reid", BATCH, n))
        kept = open_dataset(spec, loader="resident", **options)  # type: ignore[arg-type]
        yield theirs | ours(spec, how, images, **options) | resident(kept, how, images)


def photos(_: Path) -> Iterator[dict[str, Pass]]:
    how, images = Augmentation(flip=True, resized=True), 512
    with photographs(images, 400) as root:
        theirs = torchvision(lambda n: data_peers.image_folder(root / "train", "photos", BATCH, n))
        yield theirs | ours(f"folder:{root}", how, images, image_size=224, resized=True)


def memory(root: Path) -> Iterator[dict[str, Pass]]:
    images = 20_000
    with tempfile.TemporaryDirectory() as folder:
        thinned(root.absolute() / "train", Path(folder) / "train", images)
        (Path(folder) / "val").symlink_to(root.absolute() / "test")
        data = open_dataset(f"folder:{folder}", loader="resident")
    pixels = np.ascontiguousarray(data.train.pixels.transpose(0, 2, 3, 1))
    few = pixels[:4_000], data.train.labels[:4_000]
    found = torchvision(lambda n: data_peers.data_loader(data_peers.InMemory(*few), BATCH, n))
    if dali_is_installed():
        for threads in (1, 2):
            name = f"dali external_source, {threads} threads"
            found[name] = data_peers.dali_in_memory(pixels, BATCH, threads)
    yield found | resident(data, Augmentation(pad=4, flip=True), images)


def views(_: Path) -> Iterator[dict[str, Pass]]:
    found = {}
    loader = {"loader": "dali" if dali_is_installed() else "fallback", "threads": 2}
    with photographs(256, 400) as root:
        spec = f"folder:{root}"
        kinds = {
            "400x400, cut to 224": (Augmentation(flip=True, resized=True), 224),
            "400x400, shifted": (Augmentation(flip=True, pad=8), 0),
        }
        for kind, (how, size) in kinds.items():
            for count in (1, 4):
                data = open_dataset(spec, image_size=size, resized=how.resized, **loader)  # type: ignore[arg-type]
                found[f"{kind}, {count} views"] = passes(loader_of(data, how, views=count), 256)
        yield found


def wait(root: Path) -> Iterator[dict[str, Pass]]:
    """Time passes of 6 steps of two ResNet-32; the shares of waiting go to `WAITED`."""
    from dml_fast.config import TrainConfig
    from dml_fast.engine import Engine
    from dml_fast.engine.precision import Precision
    from dml_fast.models import InputSpec
    from dml_fast.training.students import build_cohort

    config = TrainConfig(cohort=2, arch="resnet32", batch_size=BATCH)
    precision = Precision(DEVICE)
    image = InputSpec("image", (3, 32, 32))
    cohort = build_cohort(config, precision, num_classes=10, inputs=[image])
    engine = Engine(cohort)
    how = Augmentation(pad=4, flip=True)

    def steps(loader: Loader, waited: list[float]) -> Pass:
        epochs = iter(range(10**6))

        def once() -> int:
            batches = loader.epoch(next(epochs))
            begun, lost = time.perf_counter(), 0.0
            for _ in range(6):
                asked = time.perf_counter()
                batch = next(batches)
                lost += time.perf_counter() - asked
                engine.step(batch.inputs, batch.target, views=isinstance(batch.inputs, tuple))
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            waited.append(lost / (time.perf_counter() - begun))
            batches.close()
            return 6 * BATCH

        return once

    found = {}
    for name, options in {"resident": {"loader": "resident"}, **streaming()}.items():
        data = open_dataset(f"folder:{root}", **options)  # type: ignore[arg-type]
        found[name] = steps(loader_of(data, how), WAITED.setdefault(name, []))
    yield found


WAITED: dict[str, list[float]] = {}


def measure(turns: dict[str, Pass], rounds: int) -> dict[str, dict[str, float]]:
    """Measure images per second of each pass, over rounds after one warm-up round."""
    order = random.Random(0)
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name in order.sample(list(turns), len(turns)):
            begun = time.perf_counter()
            seen = turns[name]()
            if number:
                speeds[name].append(seen / (time.perf_counter() - begun))
    return {
        name: {
            "images_per_s": round(statistics.median(found), 1),
            "lowest": round(min(found), 1),
            "highest": round(max(found), 1),
            **({"waiting": round(statistics.median(WAITED[name]), 4)} if WAITED else {}),
        }
        for name, found in speeds.items()
    }


@contextmanager
def measured(case: str, data: Path) -> Iterator[dict[str, Pass]]:
    """Yield the passes of a case, as long as its folders exist."""
    kinds = {f.__name__: f for f in (cifar, shards, reid, photos, memory, views, wait)}
    yield from kinds[case](data)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and add it to the report if one is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", type=Path, default=Path(), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="add the report there")
    args = parser.parse_args(argv)
    if DEVICE.type == "cpu":
        keep_freed_memory()  # as in dml_fast.train; all contestants benefit
        if args.case != "wait":
            torch.set_num_threads(1)
    report = provenance(DEVICE)
    for name in ("torchvision", "nvidia-dali-cuda130", "simplejpeg", "pillow"):
        report["versions"][name] = installed(name)
    with measured(args.case, args.data) as turns:
        report["contestants"] = found = measure(turns, args.rounds)
    width = max(map(len, found))
    for name, row in found.items():
        waiting = f"  waits {row['waiting']:.2%}" if "waiting" in row else ""
        print(f"{name:{width}}  {row['images_per_s']:>10,.0f} images/s{waiting}")
    if args.json:
        cases = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(cases | {args.case: report}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
