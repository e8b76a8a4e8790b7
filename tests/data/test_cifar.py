"""Both CIFAR distributions, rebuilt small from real digits; hostile files; downloads."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import shutil
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import serving

from dml_fast.data import check_data_spec, open_dataset
from dml_fast.data.readers import cifar
from dml_fast.errors import UserError

KINDS = ("cifar10", "cifar100")
PER_FILE = 40


def digit_rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Make CIFAR rows of real digits: 32x32, each channel of a different brightness."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    count = 6 * PER_FILE
    gray = digits.images[:count].repeat(4, 1).repeat(4, 2)
    pixels = np.stack([gray * 15, 255 - gray * 7, gray * 3 + 11], axis=1).astype(np.uint8)
    labels = digits.target[:count] * (1 if kind == "cifar10" else 11)
    return pixels.reshape(count, 3072), labels


def python2_pickle(fields: dict[bytes, object]) -> bytes:
    """Pickle with the opcodes of Python 2's cPickle (protocol 2), as in the published batches."""

    def string(value: bytes) -> bytes:
        short = len(value) < 256
        return struct.pack("<cB" if short else "<ci", b"U" if short else b"T", len(value)) + value

    def encode(value: object) -> bytes:
        if isinstance(value, bytes):
            return string(value)
        if isinstance(value, int):
            return b"M" + struct.pack("<H", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(encode, value)) + b"e"
        assert isinstance(value, np.ndarray)
        shape = b"".join(map(encode, value.shape)) + b"\x86"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01" + shape + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            + string(value.tobytes())
            + b"tb"
        )

    items = b"".join(string(key) + encode(value) for key, value in fields.items())
    return b"\x80\x02}(" + items + b"u."


def class_names(kind: str) -> list[bytes]:
    return [b"class_%03d" % number for number in range(10 if kind == "cifar10" else 100)]


def write(kind: str, form_name: str, parent: Path, dump=python2_pickle) -> Path:
    """Write the folder of a distribution below ``parent`` and return it."""
    form = getattr(cifar.CIFAR[kind], form_name)
    folder = parent / form.folder
    folder.mkdir(parents=True)
    pixels, labels = digit_rows(kind)
    pieces = np.split(np.arange(len(labels)), 6)
    parts = dict(zip((*form.train, form.test), pieces, strict=False))
    if kind == "cifar100":
        parts = {form.train[0]: np.concatenate(pieces[:5]), form.test: pieces[5]}
    for name, ids in parts.items():
        if form_name == "python":
            batch = {form.label_key.encode(): labels[ids].tolist(), b"data": pixels[ids]}
            batch |= {b"batch_label": b"x", b"filenames": [b"%d.png" % i for i in ids]}
            if kind == "cifar100":
                batch[b"coarse_labels"] = [0] * len(ids)
            (folder / name).write_bytes(dump(batch))
        else:
            columns = [labels[ids, None], pixels[ids]]
            if kind == "cifar100":
                columns.insert(0, np.zeros((len(ids), 1)))
            (folder / name).write_bytes(np.hstack(columns).astype(np.uint8).tobytes())
    if form_name == "python":
        (folder / form.names).write_bytes(dump({form.names_key.encode(): class_names(kind)}))
    else:
        (folder / form.names).write_bytes(b"\n".join(class_names(kind)) + b"\n\n")
    return folder


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_hold_the_same_images_labels_and_classes(kind: str, tmp_path: Path) -> None:
    pixels, labels = digit_rows(kind)
    found = []
    for form_name in ("python", "binary"):
        write(kind, form_name, tmp_path / form_name)
        data = open_dataset(f"{kind}:{tmp_path / form_name}")
        assert data.test is not None
        np.testing.assert_array_equal(data.test.images, pixels[-PER_FILE:].reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(data.test.labels, labels[-PER_FILE:])
        assert data.classes == tuple(name.decode() for name in class_names(kind))
        train = {image.tobytes() for part in (data.train, data.val) for image in part.images}
        assert train == {row.tobytes() for row in pixels[:-PER_FILE]}
        assert len(data.val) == 20 and (data.pad, data.flip, data.name) == (4, True, kind)
        pair = dict(zip((row.tobytes() for row in pixels), labels, strict=True))
        for image, label in zip(data.train.images, data.train.labels, strict=True):
            assert pair[image.tobytes()] == label
        found.append(data)
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].mean == found[1].mean


def test_images_are_named_by_their_number_in_the_files(tmp_path: Path) -> None:
    pixels, labels = digit_rows("cifar10")
    write("cifar10", "binary", tmp_path)
    data = open_dataset(f"cifar10:{tmp_path}")
    assert data.test is not None
    for part in (data.train, data.val, data.test):
        for name, image in zip(part.names, part.pixels, strict=True):
            assert image.tobytes() == pixels[int(name)].tobytes()
    file = tmp_path / "labels.tsv"
    rows = [int(name) for name in list(data.train.names)[3:60]]
    file.write_text("".join(f"{row}\tclass_{labels[row]:03d}\n" for row in rows))
    given = open_dataset(f"cifar10:{tmp_path}", labels=str(file)).train
    assert given.labels[3:60].tolist() == labels[rows].tolist()
    assert (given.labels[:3] < 0).all() and (given.labels[60:] < 0).all()
    np.testing.assert_array_equal(given.hidden, data.train.labels)


@pytest.mark.parametrize("form_name", ["python", "binary"])
def test_the_folder_its_parent_and_the_archive_are_the_same_data(
    form_name: str, tmp_path: Path
) -> None:
    folder = write("cifar10", form_name, tmp_path / "a")
    packed = tmp_path / "b"
    packed.mkdir()
    pack(folder, packed / getattr(cifar.CIFAR["cifar10"], form_name).archive)
    places = (folder, folder.parent, packed)
    for place in places:
        check_data_spec(f"cifar10:{place}")
    prints = {open_dataset(f"cifar10:{place}").fingerprint for place in places}
    assert len(prints) == 1
    assert len([*packed.iterdir()]) == 1  # nothing was unpacked


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_pickled_again_by_python_3_are_read(protocol: int, tmp_path: Path) -> None:
    write("cifar10", "python", tmp_path / "a")
    write("cifar10", "python", tmp_path / "b", lambda batch: pickle.dumps(batch, protocol))
    prints = {open_dataset(f"cifar10:{tmp_path / name}").fingerprint for name in "ab"}
    assert len(prints) == 1


def damaged(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("form_name", "name", "change", "message"),
    [
        ("python", "data_batch_3", None, "lacks data_batch_3"),
        ("binary", "batches.meta.txt", None, "lacks batches.meta.txt"),
        ("python", "data_batch_2", lambda raw: raw[:-5000], "data_batch_2 is damaged"),
        ("binary", "test_batch.bin", lambda raw: raw[:-7], "test_batch.bin is damaged: .* 3073"),
        ("binary", "test_batch.bin", lambda raw: b"", "test_batch.bin holds no images"),
        ("binary", "data_batch_1.bin", lambda raw: b"\x63" + raw[1:], "_1.bin has labels .* 99"),
        ("python", "data_batch_1", lambda raw: b"\x80\x02}.", "data_batch_1 is not a CIFAR batch"),
        ("python", "batches.meta", lambda raw: b"\x80\x02}.", "batches.meta has no 'label_names'"),
    ],
)
def test_missing_and_damaged_files_are_named(
    form_name: str, name: str, change, message: str, tmp_path: Path
) -> None:
    folder = write("cifar10", form_name, tmp_path)
    if change is None:
        (folder / name).unlink()
    else:
        damaged(folder / name, change)
    with pytest.raises(UserError, match=message):
        open_dataset(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_damaged_archive_is_named(kept: float, tmp_path: Path) -> None:
    archive = pack(write("cifar10", "python", tmp_path / "a"), tmp_path / "cifar-10-python.tar.gz")
    shutil.rmtree(tmp_path / "a")
    damaged(archive, lambda raw: raw[: int(len(raw) * kept)])
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz (is damaged|lacks)"):
        open_dataset(f"cifar10:{tmp_path}")


def test_only_known_regular_files_of_an_archive_are_read(tmp_path: Path) -> None:
    folder = write("cifar10", "python", tmp_path / "a")
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in cifar.CIFAR["cifar10"].python.files[1:]:
            tar.add(folder / name, f"{folder.name}/{name}")
        link = tarfile.TarInfo(f"{folder.name}/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "data_batch_1")
        tar.addfile(link)
        outside = tarfile.TarInfo("../outside")
        outside.size = 4
        tar.addfile(outside, io.BytesIO(b"evil"))
    shutil.copytree(folder, tmp_path / "kept")
    shutil.rmtree(folder)
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(UserError, match="lacks data_batch_1:"):
        open_dataset(f"cifar10:{tmp_path}")
    assert sorted(tmp_path.parent.iterdir()) == before


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make --download fetch a small archive from a server here; give its path."""
    folder = write("cifar10", "python", tmp_path / "made")
    archive = pack(folder, tmp_path / "published.tar.gz")
    with serving(tmp_path) as (address, _):
        source = cifar.CIFAR["cifar10"]._replace(
            url=f"{address}/{archive.name}",
            sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        )
        monkeypatch.setitem(cifar.CIFAR, "cifar10", source)
        yield archive


def test_download_fetches_once_checks_and_reads(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "new" / "data"
    spec = f"cifar10:{target}"
    check_data_spec(spec, download=True)
    with caplog.at_level(logging.INFO, "dml_fast"):
        data = open_dataset(spec, download=True)
    assert "downloading" in caplog.text and "100%" in caplog.text
    assert [path.name for path in target.iterdir()] == ["cifar-10-python.tar.gz"]
    published.unlink()  # so that a second download would fail
    assert open_dataset(spec, download=True).fingerprint == data.fingerprint


def test_a_download_with_a_wrong_hash_leaves_nothing(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = cifar.CIFAR["cifar10"]._replace(sha256="0" * 64)
    monkeypatch.setitem(cifar.CIFAR, "cifar10", wrong)
    with pytest.raises(UserError, match=r"instead of 0000.*try again"):
        open_dataset(f"cifar10:{tmp_path / 'new'}", download=True)
    assert not [*(tmp_path / "new").iterdir()]


def test_a_download_that_fails_says_why_and_leaves_nothing(published: Path, tmp_path: Path) -> None:
    published.unlink()
    with pytest.raises(UserError, match=r"could not download http:.*File not found.*other means"):
        open_dataset(f"cifar10:{tmp_path / 'new'}", download=True)
    assert not [*(tmp_path / "new").iterdir()]


def test_a_target_that_is_no_folder_is_refused(published: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="could not download"):
        open_dataset(f"cifar10:{tmp_path / 'file'}", download=True)
    assert (tmp_path / "file").read_text() == "x"
