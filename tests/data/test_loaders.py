"""The loaders against one another on real images: all execute the same plan."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import (
    ALL,
    DALI,
    STREAMING,
    batch_of,
    holder,
    loader_of,
    opened,
    pieces,
    tensors,
)
from PIL import Image

from dml_fast.data import open_dataset
from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.plan import Augmentation
from dml_fast.errors import UserError

EVERYTHING = Augmentation(
    pad=4, flip=True, policy="trivial", erasing=0.5, jitter=0.4, mixup=0.3, cutmix=1.0
)


def walk(loader: object, epochs: int = 2, start: int = 0) -> list:
    return [
        [t.clone() for t in tensors(batch)]
        for epoch in range(epochs)
        for batch in loader.epoch(epoch, start if epoch == 0 else 0)  # type: ignore[attr-defined]
    ]


def assert_equal(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", STREAMING)
def test_batches_equal_the_resident_loaders_bit_for_bit(name: str, tmp_path: Path) -> None:
    suffixes = (".jpg", ".png", ".webp", ".bmp")
    pieces(tmp_path, 25, [(32, 48)], suffixes=suffixes, parts=("train", "val"))
    found, data = [], []
    for loader_name in ("resident", name):
        data.append(opened(tmp_path, loader_name))
        assert holder(data[-1]) == loader_name
        loader = loader_of(data[-1], EVERYTHING, views=2)
        found.append(walk(loader))
        loader.close()
    assert_equal(found[1], found[0])
    assert data[0].fingerprint == data[1].fingerprint
    assert (data[0].mean, data[0].std) == (data[1].mean, data[1].std)
    options = {"mean": data[0].mean, "std": data[0].std, "batch_size": 7, "device": "cpu"}
    both = [[list(b) for b in evaluation_batches(d.val, **options)] for d in data]
    assert_equal(both[1], both[0])


@pytest.mark.parametrize("name", STREAMING)
def test_real_jpegs_decode_to_the_resident_loaders_pixels(
    name: str, tmp_path: Path, shared_data: Path
) -> None:
    import tarfile

    with tarfile.open(shared_data / "cifar10-jpeg.tar.xz") as tar:
        for member in tar:
            if member.isfile() and len(list(tmp_path.rglob("*.jpg"))) < 300:
                target = tmp_path / "train" / f"{len(member.name) % 2}" / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = tar.extractfile(member)
                assert stream is not None
                target.write_bytes(stream.read())
            elif member.isfile():
                break
    found = [walk(loader_of(opened(tmp_path, n), batch_size=64)) for n in ("resident", name)]
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("name", STREAMING)
def test_resuming_anywhere_and_swapping_loader_and_threads(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 24, [(32, 32)])
    how = Augmentation(pad=4, flip=True, policy="trivial")
    whole = walk(loader_of(opened(tmp_path, "resident"), how))
    steps = len(whole) // 2
    for threads, start in ((1, 3), (3, 1), (2, steps - 1)):
        loader = loader_of(opened(tmp_path, name, threads=threads), how)
        assert_equal(walk(loader, start=start), whole[start:])
        again = batch_of(loader, 1, 2)  # out of turn
        assert all(map(torch.equal, tensors(again), whole[steps + 2]))
        loader.close()


@pytest.mark.parametrize("name", STREAMING)
def test_leaving_an_epoch_early_costs_nothing_later(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 24, [(32, 32)])
    loader = loader_of(opened(tmp_path, name))
    expected = walk(loader, epochs=1)
    for epoch in range(3):
        for _ in loader.epoch(epoch):
            break
    assert_equal(walk(loader, epochs=1), expected)
    before = threading.active_count()
    loader.close()
    gc.collect()
    assert threading.active_count() <= before


@pytest.mark.dali
@pytest.mark.parametrize("size", [48, (40, 24), 100])
def test_resized_crops_are_equal_and_evaluation_is_within_the_resizers_tolerance(
    size: int | tuple[int, int], tmp_path: Path
) -> None:
    """Evaluation: within 1 of 255, and more on the border, where only DALI repeats the edge."""
    sizes = [(90, 130), (130, 90), (64, 64), (250, 100)]
    pieces(tmp_path, 20, sizes, parts=("train", "val"))
    how = Augmentation(flip=True, resized=True, erasing=0.3)
    found, evaluated = [], []
    for name in ("fallback", "dali"):
        data = opened(tmp_path, name, image_size=size, resized=True)
        found.append(walk(loader_of(data, how, views=2)))
        plain = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "device": "cpu", "batch_size": 16}
        evaluated.append([list(batch) for batch in evaluation_batches(data.val, **plain)])
    assert_equal(*found)
    for ours, theirs in zip(*evaluated, strict=True):
        check_resized((ours[0] - theirs[0]).abs())


@pytest.mark.dali
def test_decoding_only_the_part_that_is_shown_changes_no_pixel(tmp_path: Path) -> None:
    """With one view only that part is decoded; it equals the first of two views."""
    pieces(tmp_path, 32, [(401, 399), (90, 131), (64, 64), (427, 640)])
    forms: list[dict] = [{"subsampling": n} for n in range(3)]
    forms += [{"progressive": True}, {"quality": 50}, {"restart_marker_blocks": 3}]
    for number, path in enumerate(sorted(tmp_path.rglob("*.jpg"))):
        with Image.open(path) as image:
            mode = ("RGB", "RGB", "L", "CMYK")[number // 6 % 4]
            image.convert(mode).save(path, **forms[number % 6])
    data = opened(tmp_path, "dali", image_size=48, resized=True)
    how = Augmentation(flip=True, resized=True)
    alone, beside = (walk(loader_of(data, how, views=n), epochs=4) for n in (1, 2))
    assert_equal([[batch[0]] for batch in alone], [[batch[0]] for batch in beside])


def check_resized(difference: torch.Tensor) -> None:
    assert difference.max() < 20 and difference.mean() < 0.3
    assert difference[..., 2:-2, 2:-2].max() < 1.01


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sample_once_an_epoch_on_all_ranks(name: str, ranks: int, tmp_path: Path) -> None:
    pieces(tmp_path, 17, [(24, 24)], parts=("train", "val"))
    data = opened(tmp_path, name)
    trained, evaluated = [], []
    for rank in range(ranks):
        loader = loader_of(data, batch_size=8 // ranks, rank=rank, ranks=ranks)
        trained += [i for batch in loader.epoch(1) for i in batch.ids.tolist()]
        loader.close()
        options = {"mean": data.mean, "std": data.std, "device": "cpu", "batch_size": 5}
        for batch in evaluation_batches(data.val, rank=rank, ranks=ranks, **options):
            assert batch.target.tolist() == data.val.labels[batch.ids.numpy()].tolist()
            evaluated += batch.ids.tolist()
    assert len(trained) == len(set(trained)) == 32
    assert sorted(evaluated) == list(range(34))


@pytest.mark.parametrize("name", ALL)
def test_market1501_of_different_shapes_comes_in_one_size(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / part).mkdir()
        for pid in range(1, 9):
            for camera, frame in ((1, 1), (1, 2), (2, 1)):
                shape = (int(rng.integers(30, 60)), int(rng.integers(15, 30)), 3)
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                image.save(tmp_path / part / f"{pid:04}_c{camera}s1_{frame:06}_00.jpg", quality=95)
    data = open_dataset(
        f"market1501:{tmp_path}", loader=name, image_size=(32, 16), val_fraction=0.25
    )  # type: ignore[arg-type]
    assert holder(data) == name and data.train.images.shape == (18, 3, 32, 16)
    loader = loader_of(data, num_instances=2)
    for batch in loader.epoch(0):
        assert torch.unique(batch.target, return_counts=True)[1].tolist() == [2] * 4
        assert batch.inputs.shape == (8, 3, 32, 16)
    loader.close()
    options = {"mean": data.mean, "std": data.std, "device": "cpu", "batch_size": 4}
    ids = [i for batch in evaluation_batches(data.val, **options) for i in batch.ids.tolist()]
    assert ids == list(range(len(data.val)))


@pytest.mark.parametrize("name", ALL)
def test_fewer_images_than_a_batch_are_refused(name: str, tmp_path: Path) -> None:
    data = opened(pieces(tmp_path, 3, [(24, 24)], parts=("train", "val")), name)
    with pytest.raises(UserError, match=r"batch size 8 does not fit 6 training rows"):
        loader_of(data)


@pytest.mark.parametrize("name", [DALI])
def test_a_gpu_that_is_not_there_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dml_fast.data.loaders.dali import DaliDecoder
    from dml_fast.data.loaders.stream import Source

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = opened(pieces(tmp_path, 3, [(24, 24)]), name)
    with pytest.raises(UserError, match="cuda, which is not available"):
        DaliDecoder(Source(data.train.images), device=torch.device("cuda"), batch_size=4)  # type: ignore[arg-type]


def test_dali_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dml_fast.data.reading.dali_is_installed", lambda: False)
    pieces(tmp_path, 3, [(24, 24)])
    with pytest.raises(UserError, match=r"pip install 'dml_fast\[dali\]'.*--loader fallback"):
        opened(tmp_path, "dali")
    monkeypatch.setattr("dml_fast.data.reading.available_bytes", lambda: 1000)
    data = opened(tmp_path, "auto")
    assert holder(data) == "fallback"
    assert "loader: fallback (slow: pip install 'dml_fast[dali]'); 6 images" in data.choice


def test_auto_takes_memory_if_the_images_fit(tmp_path: Path) -> None:
    pieces(tmp_path, 3, [(24, 24)])
    data = opened(tmp_path, "auto")
    assert holder(data) == "resident"
    assert data.choice.startswith("loader: resident; 6 images of 24x24 take 0.00 GiB, ")
    assert holder(opened(tmp_path, "auto", resized=True)) in ("dali", "fallback")
    with pytest.raises(UserError, match="--crop pad"):
        opened(tmp_path, "resident", resized=True)
    with pytest.raises(
        UserError, match=r"--loader fallback is only for folder:, shards: and market1501:"
    ):
        open_dataset("digits", loader="fallback")


@pytest.mark.parametrize("loader_name", STREAMING)
def test_one_pixel_too_many_is_refused_by_name(loader_name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 20, [(24, 24)])
    Image.new("RGB", (25, 24)).save(tmp_path / "train" / "flower" / "odd.jpg")
    with pytest.raises(UserError, match=r"odd\.jpg is 24x25 .*000\.jpg is 24x24.*--image-size"):
        walk(loader_of(opened(tmp_path, loader_name)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", STREAMING)
def test_cuda_gives_the_cpus_batches(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 24, [(32, 48)])
    data = opened(tmp_path, name)
    ours = walk(loader_of(data, EVERYTHING, device="cuda"))
    for a, b in zip(ours, walk(loader_of(data, EVERYTHING)), strict=True):
        # nvJPEG's inverse transform and colours round differently from libjpeg's
        assert (a[0].cpu() - b[0]).abs().mean() < 0.02
        assert torch.equal(a[2].cpu(), b[2])
