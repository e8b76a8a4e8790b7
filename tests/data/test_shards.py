"""Tar shards as a data set: the same as `folder:` for the same images, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import ALL, STREAMING, holder, loader_of, skipped, tensors
from data_cases import opened as opened_folder
from shard_cases import both, cifar, opened, sample, shards_of, write_tar

from dml_fast.config import TrainConfig
from dml_fast.data import DataSet, check_data_spec, open_dataset
from dml_fast.data.__main__ import main as data_command
from dml_fast.data.loaders import evaluation_batches
from dml_fast.data.plan import Augmentation
from dml_fast.data.readers.samples import read_index
from dml_fast.data.sampling import ShardOrder
from dml_fast.data.splits import split_validation
from dml_fast.errors import UserError

EVERYTHING = Augmentation(pad=4, flip=True, erasing=0.5, jitter=0.4, mixup=0.3, cutmix=1.0)


def walk(data: DataSet, how: Augmentation = EVERYTHING, **options: object) -> list:
    loader = loader_of(data, how, **options)
    found = [[t.clone() for t in tensors(b)] for epoch in range(2) for b in loader.epoch(epoch)]
    loader.close()
    return found


def assert_equal(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, a, b))


def evaluation(data: DataSet) -> list:
    options = {"mean": data.mean, "std": data.std, "batch_size": 7, "device": "cpu"}
    return [list(batch) for batch in evaluation_batches(data.val, **options)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train",)])
def test_batches_are_those_of_the_folder(name: str, parts: tuple, tmp_path: Path) -> None:
    """Compare order, pixels, augmentation, statistics and the split, bit for bit."""
    folder, shards = both(tmp_path, parts=parts, suffixes=(".jpg", ".png", ".webp", ".bmp"))
    ours, theirs = opened(shards, name), opened_folder(folder, name)
    assert holder(ours) == name and ours.name == "shards" and ours.pad == theirs.pad
    assert ours.classes == theirs.classes == ("china", "flower")
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)
    assert_equal(walk(ours, views=2), walk(theirs, views=2))
    assert_equal(evaluation(ours), evaluation(theirs))
    assert (ours.test is None) == (theirs.test is None)
    assert ours.fingerprint == opened(shards, "resident").fingerprint != theirs.fingerprint


@pytest.mark.parametrize("name", STREAMING)
def test_random_parts_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    folder, shards = both(tmp_path, sizes=[(40, 60), (50, 30)])
    how = Augmentation(flip=True, resized=True)
    found = [
        walk(open_(root, name, image_size=24, resized=True), how)
        for open_, root in ((opened, shards), (opened_folder, folder))
    ]
    assert_equal(*found)


def test_large_images_are_cut_to_random_parts_as_a_folders_are() -> None:
    for size, resized in (("128", True), ("64", False)):
        for kind in ("folder", "shards"):
            assert TrainConfig(data=f"{kind}:DIR", image_size=size).resized_crop == resized


@pytest.fixture(scope="module")
def of_cifar(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> tuple[Path, Path]:
    """400 training and 400 test images as a folder and as shards."""
    root = tmp_path_factory.mktemp("cifar")
    folder = cifar(shared_data / "cifar10-jpeg.tar.xz", root / "folder", 40)
    return folder, shards_of(folder, root / "shards", 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_real_jpegs_of_cifar_are_those_of_the_folder_on_one_rank_or_two(
    name: str, of_cifar: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shards = of_cifar
    ours, theirs = opened(shards, name), opened_folder(folder, name)
    assert len(ours.classes) == 10 and ours.train.images.shape == (360, 3, 32, 32)
    assert ours.test is not None and len(ours.test) == 400
    whole = walk(ours, batch_size=64)
    assert_equal(whole, walk(theirs, batch_size=64))
    monkeypatch.setattr("dml_fast.data.sampling.WINDOW", 100)
    several = walk(ours, batch_size=64, how=Augmentation(pad=4, flip=True))
    assert len(set(torch.cat([batch[-1] for batch in several[:5]]).tolist())) == 320
    assert [b[-1].tolist() for b in several] != [b[-1].tolist() for b in whole]
    halves = [
        walk(ours, batch_size=32, rank=rank, ranks=2, how=Augmentation(pad=4, flip=True))
        for rank in range(2)
    ]
    pairs = zip(*halves, strict=True)
    assert_equal([list(map(torch.cat, zip(*pair, strict=True))) for pair in pairs], several)


@pytest.mark.parametrize("name", ALL)
def test_each_sample_once_an_epoch_on_any_number_of_ranks_and_from_any_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use several windows of 20 images; the rows of all ranks together are one batch."""
    monkeypatch.setattr("dml_fast.data.sampling.WINDOW", 20)
    _, shards = both(tmp_path, 33)
    data = opened(shards, name)
    whole = [batch[-1] for batch in walk(data)][:8]
    assert len(whole) == 8 and len(set(torch.cat(whole).tolist())) == 64
    expected = ShardOrder(np.arange(66) // 10, 8, 3, 20)(0)
    assert [ids.tolist() for ids in whole] == expected.tolist()
    for ranks in (2, 4):
        loaders = [
            loader_of(data, batch_size=8 // ranks, rank=r, ranks=ranks) for r in range(ranks)
        ]
        for start in (0, 3):  # the run before may have had a different number of ranks
            epochs = [[b.ids for b in loader.epoch(0, start)] for loader in loaders]
            assert all(map(torch.equal, map(torch.cat, zip(*epochs, strict=True)), whole[start:]))
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("name", ALL)
def test_what_is_left_after_the_split_still_knows_its_shard(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dml_fast.data.sampling.WINDOW", 20)
    _, shards = both(tmp_path, 33, parts=("train",))
    data = opened(shards, name)
    left, _ = split_validation(np.arange(66) // 33, 0.1)
    expected = ShardOrder(left // 10, 8, 3, 20)(0)
    assert len(expected) == 7
    assert [batch[-1].tolist() for batch in walk(data)[:7]] == expected.tolist()


def test_names_tell_training_validation_and_test_shards_apart(tmp_path: Path) -> None:
    image = _image()
    layouts = [
        ("train-0.tar", "train-1.tar", "val-0.tar", "test-0.tar"),
        ("train/0.tar", "train/1.tar", "val/0.tar", "test/0.tar"),
        ("imagenet-train-0.tar", "imagenet-train-1.tar", "imagenet-validation.tar", "x_test.tar"),
        ("0.tar", "1.tar"),
        ("contest-0.tar", "interval-1.tar"),  # no words of their own
    ]
    for number, names in enumerate(layouts):
        root = tmp_path / f"train{number}"  # the folder's own name says nothing
        for name in names:
            files = [f for i in range(10) for f in sample(f"{i}", image, i % 2)]
            write_tar(root / name, files)
        data = opened(root)
        assert len(data.train) == (20 if len(names) == 4 else 18)
        assert len(data.val) == (10 if len(names) == 4 else 2)
        assert (data.test is not None) == (len(names) == 4)
        assert data.classes == ("0", "1")


@pytest.mark.slow
def test_braces_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = _image()
    for name in ("a/train-08", "a/train-09", "a/train-10", "b/val-0", "a/other"):
        files = [f for i in range(10) for f in sample(f"{i}", image, i % 2)]
        write_tar(tmp_path / f"{name}.tar", files)
    for spec, counts in [
        ("a/train-{08..10}.tar", (27, 3)),
        ("{a/train-{09..10},b/val-0}.tar", (20, 10)),
        ("{a,b}/[tv]*.tar", (30, 10)),
        ("a/train-0?.tar", (18, 2)),
        ("a/train-08.tar", (9, 1)),
    ]:
        data = open_dataset(f"shards:{tmp_path}/{spec}", loader="fallback")
        assert (len(data.train), len(data.val)) == counts, spec
        assert open_dataset(f"shards:{spec}").fingerprint == data.fingerprint  # relative
    for spec, message in [
        ("a/train-{08..11}.tar", r"does not exist: there is no .*train-11\.tar"),
        ("a/train-{3..1}.tar", r"\{3\.\.1\} counts down"),
        ("a/train-{0..9999999}.tar", "counts too far"),
        ("{0..999}{0..999}{0..999}.tar", "names more than 1000000 files"),
        ("a/nothing*.tar", "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            check_data_spec(f"shards:{tmp_path}/{spec}")


def _image() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(out, "JPEG")
    return out.getvalue()


def test_the_fingerprint_is_of_names_and_sizes_wherever_they_lie(tmp_path: Path) -> None:
    _, shards = both(tmp_path)
    first = opened(shards)
    elsewhere = shards.rename(tmp_path / "elsewhere")
    assert opened(elsewhere).fingerprint == first.fingerprint
    globbed = open_dataset(f"shards:{elsewhere}/*.tar", loader="fallback")
    assert globbed.fingerprint == first.fingerprint and globbed.classes == first.classes
    (elsewhere / "train-000.tar").rename(elsewhere / "train-9.tar")
    assert opened(elsewhere).fingerprint != first.fingerprint


def refused(spec: object, message: str, **options: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(f"shards:{spec}", loader="fallback", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_nothing_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.tar.gz").write_bytes(b"")
    for spec, message in [
        (tmp_path / "no", "does not exist"),
        (tmp_path / "empty", "holds no tar files: put train-000.tar"),
        (tmp_path / "text", r"holds no tar files \(but 1 compressed \(a\.tar\.gz\)\): put"),
        ("s3://bucket/train-0.tar", "is at s3://, which is not supported"),
        ("https://host/*.tar", "a server lists no files"),
        ("https:///x.tar", "is not the URL of a file"),
        ("https://host/folder/", "is not the URL of a file"),
        ("https://[host/x.tar", "is not the URL of a file"),
        ("{" + ",".join(["x" * 99] * 9) + "}.tar", "does not exist"),
        ("{https://h/a.tar,b.tar}", "is not the URL of a file"),
        ("http://h/{a,a}.tar?{1,2}", "differs from another URL only after"),
    ]:
        refused(spec, message)
        with pytest.raises(UserError, match=message):
            check_data_spec(f"shards:{spec}")
    with pytest.raises(UserError, match="write shards:DIR"):
        check_data_spec("shards:")
    with pytest.raises(UserError, match="is downloaded if it is a URL: leave out --download"):
        check_data_spec(f"shards:{tmp_path}", download=True)


def test_labels_and_classes_must_fit(tmp_path: Path) -> None:
    image = _image()
    write_tar(tmp_path / "train-0.tar", [f for i in range(4) for f in sample(f"{i}", image, i)])
    write_tar(tmp_path / "val-0.tar", sample("v", image, 4))
    refused(tmp_path, r"val-0\.tar/v\.jpg has label 4 and the training shards have 4 classes")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    refused(tmp_path, r"v\.jpg has label 4 and .*classes\.txt names 4 classes")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert opened(tmp_path).classes == tuple("abcde")
    (tmp_path / "classes.txt").write_text("a\n\nc\nd\ne\n")
    refused(tmp_path, r"classes\.txt has no name in line 2")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    refused(tmp_path, r"classes\.txt is damaged \(Unicode")
    (tmp_path / "classes.txt").unlink()
    write_tar(tmp_path / "train-1.tar", sample("x", image, 10**9))
    refused(tmp_path, "the largest label is 1000000000")
    write_tar(tmp_path / "odd.tar", sample("x", image, 0))
    refused(tmp_path, r"odd\.tar is not named train, val or test")
    write_tar(tmp_path / "alone" / "val.tar", sample("x", image, 0))
    refused(tmp_path / "alone", "has no training shards")
    half = [*sample("a", image, 0), ("x.jpg", image)]
    write_tar(tmp_path / "half" / "0.tar", half)
    refused(tmp_path / "half", r"has no label \(x\.cls\) .*shards of their own", skip_corrupt=True)


def test_a_training_shard_without_labels_is_one_of_images_without_labels(tmp_path: Path) -> None:
    image = _image()
    write_tar(
        tmp_path / "train-0.tar", [f for i in range(20) for f in sample(f"{i}", image, i % 2)]
    )
    without = [(f"{i}.jpg", image) for i in range(5)]
    write_tar(tmp_path / "train-1.tar", without)
    data = opened(tmp_path)
    assert data.classes == ("0", "1") and (data.train.labels < 0).sum() == 5
    rows = np.flatnonzero(data.train.labels < 0)
    assert [data.train.names[i] for i in rows] == [f"train-1.tar/{i}.jpg" for i in range(5)]
    assert len(data.val) == 2 and (data.val.labels >= 0).all()
    each = 512 + -(-len(image) // 512) * 512  # bytes of a header and an image
    cut = (tmp_path / "train-1.tar").read_bytes()[: 3 * each + 600]
    (tmp_path / "train-1.tar").write_bytes(cut)
    damaged = opened(tmp_path, skip_corrupt=True)  # the third image's label may have been lost
    assert (damaged.train.labels < 0).sum() == 2
    (tmp_path / "train-0.tar").unlink()
    write_tar(tmp_path / "train-1.tar", without)
    refused(tmp_path, "no training shard has labels .*give --labels FILE")
    write_tar(tmp_path / "train-0.tar", sample("a", image, 0))
    write_tar(tmp_path / "val-0.tar", without)
    refused(tmp_path, r"val-0\.tar has no labels .*which only training shards may lack")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_bytes(b"no tar at all" * 100)


def without_samples(path: Path) -> None:
    write_tar(path, [("readme.txt", b"nothing")])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    """Cut a tar in the middle of the fourth sample."""
    path.write_bytes(path.read_bytes()[: read_index(path).images[3].offset + 10])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("harm", "kept", "why"),
    [(empty, 0, "empty"), (text, 0, "not a tar file"), (without_samples, 0, "no sample"),
     (folder, 0, "directory"), (cut, 3, "truncated")],
)  # fmt: skip
def test_a_damaged_shard_is_named_or_skipped_and_counted(
    name: str,
    harm: Callable[[Path], None],
    kept: int,
    why: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, shards = both(tmp_path)
    bad = shards / "train-002.tar"
    harm(bad)
    message = rf"shard {bad} is damaged \(.*{why}.*the {kept} whole samples .*--skip-corrupt"
    with pytest.raises(UserError, match=message) as caught:
        opened(shards, name)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "dml_fast"):
        data = opened(shards, name, skip_corrupt=True)
    assert len(data.train) == 40 + kept and skipped(data) == ("train-002.tar",)
    assert [
        r.message for r in caplog.records if "skipped 1 corrupt files: train-002.tar (" in r.message
    ]
    assert len(walk(data)) == 10


@pytest.mark.parametrize("name", ALL)
def test_a_damaged_image_in_a_shard_is_named_or_skipped(name: str, tmp_path: Path) -> None:
    folder, shards = both(tmp_path)
    (folder / "train" / "flower" / "003.jpg").write_bytes(b"this is no image")
    (folder / "val" / "china" / "001.jpg").write_bytes(b"")
    shards_of(folder, shards)
    with pytest.raises(
        UserError,
        match=r"(train-002\.tar/flower/003|val-000\.tar/china/001)\.jpg cannot be decoded \(.+\)",
    ):
        data = opened(shards, name)
        walk(data)
    ours = opened(shards, name, skip_corrupt=True)
    theirs = opened_folder(folder, name, skip_corrupt=True)
    assert_equal(walk(ours), walk(theirs))
    assert_equal(evaluation(ours), evaluation(theirs))
    assert set(skipped(ours)) == {"train-002.tar/flower/003.jpg", "val-000.tar/china/001.jpg"}


def test_nothing_whole_is_left(tmp_path: Path) -> None:
    _, shards = both(tmp_path, each=50)
    text(shards / "train-000.tar")
    refused(shards, "the training shards of .* hold no complete sample", skip_corrupt=True)
    _, shards = both(tmp_path / "again", each=50)
    text(shards / "val-000.tar")
    refused(shards, "no val shard of .* holds an image", skip_corrupt=True)


def test_scanning_shards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, shards = both(tmp_path)
    assert data_command(["scan", f"shards:{shards}"]) == 0
    assert "100 files looked at, 0 bad" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"holds tar files: give shards:{shards}"):
        data_command(["scan", str(shards)])
    (folder / "train" / "flower" / "003.jpg").write_bytes(b"this is no image")
    (folder / "val" / "china" / "001.jpg").write_bytes(b"")
    shards_of(folder, shards)
    cut(shards / "train-000.tar")
    for options in ([], ["--decode"]):
        assert data_command(["scan", f"shards:{shards}", *options]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("\t")[0] for line in lines] == [
            "train-000.tar", "train-002.tar/flower/003.jpg", "val-000.tar/china/001.jpg",
        ]  # fmt: skip
        assert "truncated" in lines[0] and "identify" in lines[1] and lines[2].split("\t")[1]
