"""Folders of images: layout, sizes, corrupt files, real JPEGs."""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_cases import picture, save, skipped
from PIL import Image

from dml_fast.data import DataSet, check_data_spec, decode, open_dataset
from dml_fast.errors import UserError
from dml_fast.machine import available_bytes


def make_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), count: int = 10) -> Path:
    """Make three classes of ``count`` PNGs in each part."""
    for row, part in enumerate(parts):
        for column, name in enumerate(("ant", "Bee", "cat")):
            for number in range(count):
                seed = (row * 3 + column) * count + number
                save(root / part / name / f"{number}.png", picture(seed))
    return root


def opened(root: Path, **options: object) -> DataSet:
    return open_dataset(f"folder:{root}", **options)  # type: ignore[arg-type]


def test_content_is_that_of_the_files_and_classes_are_sorted(tmp_path: Path) -> None:
    make_folder(tmp_path / "insects", ("train", "val", "test"))
    (tmp_path / "insects/train/ant/4.png").rename(tmp_path / "insects/train/ant/4.PNG")
    data = opened(tmp_path / "insects")
    assert data.classes == ("Bee", "ant", "cat") and data.name == "insects"
    assert (data.pad, data.flip, skipped(data)) == (2, True, ())
    for part_name in ("train", "val", "test"):
        part = getattr(data, part_name)
        expected = [
            (np.asarray(Image.open(path)).transpose(2, 0, 1), label)
            for label, name in enumerate(data.classes)
            for path in sorted((tmp_path / "insects" / part_name / name).iterdir())
        ]
        np.testing.assert_array_equal(part.images, np.stack([image for image, _ in expected]))
        assert part.labels.tolist() == [label for _, label in expected]
        assert part.images.dtype == np.uint8 and part.labels.dtype == np.int64


def test_without_val_a_stratified_part_of_train_validates(tmp_path: Path) -> None:
    data = opened(make_folder(tmp_path), val_fraction=0.2)
    assert np.bincount(data.val.labels).tolist() == [2, 2, 2]
    assert np.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert data.test is not None and len(data.test) == 30
    images = [image.tobytes() for part in (data.train, data.val) for image in part.images]
    assert len(set(images)) == 30


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    plain = opened(tmp_path / "a").fingerprint
    assert opened(tmp_path / "b" / "c").fingerprint == plain
    (tmp_path / "b/c/train/ant").rename(tmp_path / "b/c/train/aphid")
    (tmp_path / "b/c/test/ant").rename(tmp_path / "b/c/test/aphid")
    assert opened(tmp_path / "b" / "c").fingerprint != plain


def test_other_files_are_passed_over_and_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dml_fast")
    plain = opened(make_folder(tmp_path)).fingerprint
    assert not caplog.records
    for name in ("train/ant/Thumbs.db", "train/ant/._0.png", "train/README", "notes.txt"):
        (tmp_path / name).write_text("not an image")
    for name in ("train/.cache", "valid/ant", "train/ant/none"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path / "train" / "lost.png", picture(1))
    (tmp_path / "train" / "dog").symlink_to("nowhere")
    (tmp_path / "train" / "self").symlink_to("self")
    (tmp_path / "train" / "ant" / "up").symlink_to(tmp_path / "train" / "ant")
    assert opened(tmp_path).fingerprint == plain
    (record,) = caplog.records
    assert record.getMessage() == (
        f"in {tmp_path} was passed over: 3 of another kind (notes.txt, train/README, "
        "train/ant/Thumbs.db); 1 beside the parts (valid); 2 hidden (train/.cache, "
        "train/ant/._0.png); 2 links to nothing (train/dog, train/self); 1 beside the classes "
        "(train/lost.png); 1 links to a folder above (train/ant/up)"
    )


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    """To read it would wait for ever."""
    plain = opened(make_folder(tmp_path)).fingerprint
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")
    assert opened(tmp_path).fingerprint == plain


def test_images_below_a_class_are_those_of_torchvision(tmp_path: Path) -> None:
    """In its order: its `ImageFolder` sorts what os.walk yields."""
    names = ("b", "a/2", "a/1/x", "a-b/3", "c/deep/er/4", "z")
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            for number, place in enumerate(names * 2):
                save(tmp_path / part / name / f"{place}{number // 6}.png", picture(number))
    save(tmp_path / "train" / "fox" / "linked.png", picture(99))
    (tmp_path / "train" / "bee" / "m").symlink_to(tmp_path / "train" / "fox")
    (tmp_path / "train" / "bee" / "twice").symlink_to("a")  # as often as it is linked
    (tmp_path / "train" / "cat").symlink_to("bee")
    expected = [
        Path(folder, file)
        for name in ("ant", "bee", "cat", "fox")
        for folder, _, files in sorted(os.walk(tmp_path / "train" / name, followlinks=True))
        for file in sorted(files)
    ]
    assert len(expected) == 12 + 2 * (12 + 1 + 4) + 1
    data = opened(tmp_path, loader="fallback", val_fraction=0.02)
    files = data.train.images.files  # type: ignore[union-attr]
    found = [files.path(i) for i in range(len(files))]
    left_out = [path for path in expected if path not in found]
    assert len(left_out) == 1 and found == [path for path in expected if path not in left_out]
    classes = [path.relative_to(tmp_path / "train").parts[0] for path in found]
    assert [data.classes[label] for label in data.train.labels] == classes
    assert data.test is not None and len(data.test) == 24


def test_images_of_other_sizes_need_image_size(tmp_path: Path) -> None:
    make_folder(tmp_path)
    save(tmp_path / "test" / "cat" / "3.png", picture(0, 12, 20))
    message = r"test/cat/3.png is 12x20 pixels .*train/Bee/0.png is 16x16: pass --image-size"
    with pytest.raises(UserError, match=message):
        opened(tmp_path)
    data = opened(tmp_path, image_size=8)
    assert data.test is not None and data.pad == 1
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (3, 8, 8)


def test_images_need_not_be_square(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(10):
            save(tmp_path / "train" / name / f"{number}.png", picture(number, 32, 16))
    data = opened(tmp_path)
    assert data.train.images.shape[1:] == (3, 32, 16) and data.pad == 2 and data.test is None


def corrupt_bytes() -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    return {"empty": b"", "truncated": jpeg[: len(jpeg) // 2], "foreign": b"not an image" * 9}


@pytest.mark.parametrize("kind", corrupt_bytes())
@pytest.mark.parametrize("name", ["train/Bee/0.png", "train/cat/7.png"])
def test_a_corrupt_image_is_named_or_skipped(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path)
    (tmp_path / name).write_bytes(corrupt_bytes()[kind])
    with pytest.raises(UserError, match=rf"{name} cannot be decoded \(.+\): .*--skip-corrupt"):
        opened(tmp_path)
    with caplog.at_level(logging.WARNING, "dml_fast"):
        data = opened(tmp_path, skip_corrupt=True)
    assert skipped(data) == (name,)
    (record,) = caplog.records
    assert "skipped 1 corrupt files" in record.getMessage() and name in record.getMessage()
    (tmp_path / name).unlink()
    assert (
        opened(tmp_path).fingerprint == data.fingerprint
    )  # the other images are in the same parts


def test_many_corrupt_images_are_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path)
    for number in range(7):
        (tmp_path / "train" / "ant" / f"{number}.png").write_bytes(b"")
    assert len(skipped(opened(tmp_path, skip_corrupt=True))) == 7
    (record,) = caplog.records
    assert "skipped 7 corrupt files" in record.getMessage()
    assert record.getMessage().endswith("; ...")


def test_skipping_may_not_empty_a_class_or_the_folder(tmp_path: Path) -> None:
    make_folder(tmp_path, count=3)
    for path in (tmp_path / "train" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="train/cat holds no image that can be decoded"):
        opened(tmp_path, skip_corrupt=True)
    for path in tmp_path.glob("*/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 18 images"):
        opened(tmp_path, skip_corrupt=True)


def remove(root: Path, name: str) -> None:
    shutil.rmtree(root / name)


@pytest.mark.parametrize(
    ("spoil", "message", "cheap"),
    [
        (lambda root: remove(root, "."), r"does not exist: put images in .*/train/CLASS/", True),
        (lambda root: [remove(root, p) for p in ("train", "test")], "is empty: put", True),
        (lambda root: remove(root, "train"), "has no train folder: put", True),
        (lambda root: [remove(root, f"train/{c}") for c in ("ant", "Bee", "cat")], "has no", True),
        (lambda root: (root / "train" / "dog").mkdir(), "train/dog holds no images .*add", False),
        (lambda root: (root / "val").mkdir(), "val has no class folders: fill it", False),
        (lambda root: (root / "val" / "ant").mkdir(parents=True), "val/ant holds no im", False),
        (
            lambda root: save(root / "test" / "dog" / "0.png", picture(0)),
            "test/dog is a class that .*/train does not have: add",
            False,
        ),
    ],
)
def test_a_folder_of_another_shape_is_refused(
    spoil, message: str, cheap: bool, tmp_path: Path
) -> None:
    root = make_folder(tmp_path / "data", count=2)
    check_data_spec(f"folder:{root}")
    spoil(root)
    for refuse in (open_dataset, check_data_spec)[: 1 + cheap]:
        with pytest.raises(UserError, match=message):
            refuse(f"folder:{root}")


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^image_size is -1: give a whole number of at least 0$"):
        opened(make_folder(tmp_path, count=2), image_size=-1)


def test_images_that_do_not_fit_in_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path)
    assert available_bytes() > 2**20
    needed = 2 * 60 * 3 * 16 * 16
    monkeypatch.setattr(decode, "available_bytes", lambda: needed)
    opened(tmp_path)
    monkeypatch.setattr(decode, "available_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=r"60 images of 16x16 pixels need .*smaller --image-size"):
        opened(tmp_path)


@pytest.fixture(scope="module")
def real_jpegs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of the archive, aeroplanes of CIFAR-10, as two classes of 150 JPEGs."""
    archive = shared_data / "cifar10-jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"no real JPEGs: {archive} is missing")
    root = tmp_path_factory.mktemp("jpegs")
    with tarfile.open(archive, "r|xz") as tar:  # a stream: it ends where we stop
        found = 0
        for member in tar:
            if member.isreg():
                stream = tar.extractfile(member)
                assert stream is not None
                path = root / "train" / f"class{found % 2}" / Path(member.name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())
                found += 1
            if found == 300:
                return root
    raise AssertionError(f"{archive} holds only {found} images")


def test_real_jpegs_decode_as_pillow_does(real_jpegs: Path) -> None:
    data = opened(real_jpegs)
    assert (len(data.train), len(data.val), data.pad, data.test) == (270, 30, 4, None)
    decoded = {
        (image.tobytes(), data.classes[label])
        for part in (data.train, data.val)
        for image, label in zip(part.images, part.labels, strict=True)
    }
    expected = {
        (np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(), path.parent.name)
        for path in real_jpegs.rglob("*.jpg")
    }
    assert decoded == expected
    assert all(0.4 < mean < 0.7 for mean in data.mean)  # blue and grey skies


def test_images_of_train_unlabelled_have_no_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = opened(make_folder(tmp_path))
    for number in range(4):
        save(tmp_path / "train" / "unlabelled" / f"{number}.png", picture(100 + number))
    save(tmp_path / "train" / "unlabelled" / "below" / "5.png", picture(105))
    caplog.set_level(logging.INFO, "dml_fast")
    data = opened(tmp_path)
    assert data.classes == plain.classes == ("Bee", "ant", "cat")
    assert data.train.labels.tolist() == [*plain.train.labels.tolist(), *[-1] * 5]
    assert list(data.train.names)[-5:] == [
        *(f"train/unlabelled/{number}.png" for number in range(4)),
        "train/unlabelled/below/5.png",
    ]
    assert list(data.val.names) == list(plain.val.names)
    assert "27 training rows have a label and 5 have none" in caplog.text
    assert opened(tmp_path, unlabelled_share=0).fingerprint == plain.fingerprint
    for loader in ("resident", "fallback"):
        names = list(opened(tmp_path, loader=loader).train.names)
        assert names == list(data.train.names)
    labels = tmp_path / "labels.tsv"
    labels.write_text("train/unlabelled/2.png\tcat\ntrain/ant/3.png\tant\n")
    given = opened(tmp_path, labels=str(labels))
    known = {given.train.names[i]: given.train.labels[i] for i in given.train.labels.nonzero()[0]}
    assert known["train/unlabelled/2.png"] == 2 and known["train/ant/3.png"] == 1
    assert (given.train.labels < 0).sum() == 30


def test_only_train_may_hold_images_without_a_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, ("train", "val", "test"))
    for part in ("val", "test"):
        save(tmp_path / part / "unlabelled" / "0.png", picture(100))
        message = rf"{part}/unlabelled holds images without a label, which only .*/train may have"
        with pytest.raises(UserError, match=message):
            opened(tmp_path)
        shutil.rmtree(tmp_path / part / "unlabelled")
    save(tmp_path / "train" / "unlabeled" / "0.png", picture(100))
    assert "unlabeled" in opened(tmp_path).classes
    assert "train/unlabeled is a class: images without a label belong in" in caplog.text


def test_beside_unlabelled_an_empty_folder_declares_a_class(tmp_path: Path) -> None:
    """So labels may come from a file alone; without it, an empty class stays an error."""
    make_folder(tmp_path, ("test",))
    for number in range(40):
        save(tmp_path / "train" / "unlabelled" / f"{number}.png", picture(100 + number))
    with pytest.raises(UserError, match="has no class folders"):
        opened(tmp_path)
    for name in ("ant", "Bee", "cat"):
        (tmp_path / "train" / name).mkdir()
    with pytest.raises(UserError, match="none of 40 training rows has a label"):
        opened(tmp_path)
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"train/unlabelled/{i}.png\tcat\n" for i in range(20)))
    data = opened(tmp_path, labels=str(labels))
    assert data.val.labels.tolist() == [2, 2] and (data.train.labels == 2).sum() == 18
    shutil.rmtree(tmp_path / "train" / "unlabelled")
    with pytest.raises(UserError, match=r"class folder .*train/Bee holds no images"):
        opened(tmp_path)
