"""Both CIFAR distributions, rebuilt small from real digits; hostile files; downloads."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dml_fast.data import check_data_spec, open_dataset
from dml_fast.data.readers import cifar
from dml_fast.data.readers.unpickle import read_batch
from dml_fast.errors import UserError

KINDS = ("cifar10", "cifar100")
PER_FILE = 40


def digit_rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Real digits as CIFAR rows: 32x32, each channel another brightness; labels below C."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    count = 6 * PER_FILE
    gray = digits.images[:count].repeat(4, 1).repeat(4, 2)
    pixels = np.stack([gray * 15, 255 - gray * 7, gray * 3 + 11], axis=1).astype(np.uint8)
    labels = digits.target[:count] * (1 if kind == "cifar10" else 11)
    return pixels.reshape(count, 3072), labels


def python2_pickle(fields: dict[bytes, object]) -> bytes:
    """The opcodes that Python 2's cPickle (protocol 2) wrote for the published batches."""

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
    """Writes a distribution's folder below ``parent`` and returns it."""
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


class Attack:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def canary_attacks(canary: Path) -> dict[str, bytes]:
    """Each would create ``canary`` (or reach what could) if it were run by pickle.load."""
    touch = f"open({str(canary)!r}, 'w').close()"
    array = np.arange(3, dtype=np.uint8)
    write_array = (np.ndarray.tofile, array, str(canary))
    return {
        "posix.system": pickle.dumps(Attack(os.system, f"touch {canary}")),
        "os.system": f"cos\nsystem\n(S'touch {canary}'\ntR.".encode(),
        "builtins.eval": pickle.dumps(Attack(eval, touch)),
        "builtins.exec": pickle.dumps(Attack(exec, touch)),
        "__builtin__.eval": pickle.dumps(Attack(eval, touch), protocol=2),
        "builtins.getattr": pickle.dumps(Attack(*write_array), protocol=4),
        "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "numpy.load": b"\x80\x02cnumpy\nload\n.",
        "numpy.__builtins__": b"\x80\x02cnumpy\n__builtins__\n.",
        "numpy.core.multiarray.fromfile": b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
        "numpy.dtype.__class__": b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
        "_codecs.decode": b"\x80\x02c_codecs\ndecode\n.",
        "_codecs.encode.__self__": b"\x80\x04\x8c\x07_codecs\x8c\x0fencode.__self__\x93.",
        "os.popen": f"(S'touch {canary}'\nios\npopen\n.".encode(),  # INST, of protocol 0
    }


@pytest.mark.parametrize("name", canary_attacks(Path("x")))
def test_attacks_are_refused_by_name_and_not_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    raw = canary_attacks(canary)[name]
    with pytest.raises(UserError, match=rf"data_batch_1 is refused \(it asks for {name}\)"):
        read_batch(raw, "data_batch_1")
    assert not canary.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """The same bytes do harm in pickle.loads, or the test above would show nothing."""
    for name in ("posix.system", "os.system", "builtins.eval", "builtins.exec"):
        canary = tmp_path / name
        pickle.loads(canary_attacks(canary)[name])
        assert canary.exists()


STUB = b"c_codecs\nencode\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\n"


@pytest.mark.parametrize(
    "body",
    [
        STUB + b"}U\x01aK\x01sb",  # BUILD with a dict: would set attributes of a function
        STUB + b"N}U\x0c__defaults__K\x01s\x86b",  # BUILD with slot state: setattr
        DTYPE + b"}b",
        ARRAY + b")\x81",  # NEWOBJ of a stub
        b"cnumpy\nndarray\n)R",  # calling ndarray
        DTYPE + b"U\x02O8\x85R",  # an array of objects
        DTYPE + b"U\x02f4\x85R",
        STUB + b"(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR",  # another codec
        STUB + b"(K\x01X\x06\x00\x00\x00latin1tR",
        ARRAY + b")R(K\x01K\x05\x85" + DTYPE + b"U\x02u1\x85R\x89U\x03abctb",  # 5 of 3 bytes
        ARRAY
        + b")R(K\x01J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86"
        + DTYPE
        + b"U\x02u1\x85R\x89U\x03abctb",
        ARRAY + b")R(K\x01K\x03\x85U\x02u1\x89U\x03abctb",  # a dtype that is no dtype
        ARRAY + b")R}U\x05valueK\x01sb",  # state of another form
        b"P1\n",  # a persistent id
        b"\x97",  # an out-of-band buffer
        b"\x82\x01",  # an extension code
    ],
)
def test_misuse_of_what_is_allowed_is_refused(body: bytes) -> None:
    with pytest.raises(UserError, match="the_file is refused") as caught:
        read_batch(b"\x80\x02}U\x01a" + body + b"s.", "the_file")
    assert "\n" not in str(caught.value)
    honest = {"text": b"x", "pixels": np.arange(3, dtype=np.uint8)}  # the stubs are as before
    batch = read_batch(pickle.dumps(honest, 2), "x")
    assert batch["text"] == b"x" and batch["pixels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("raw", [b"", b"\x80\x02", pickle.dumps(1), pickle.dumps([1])])
def test_what_is_no_pickled_dict_is_refused(raw: bytes) -> None:
    with pytest.raises(UserError, match=r"the_file is (refused|not a CIFAR batch)"):
        read_batch(raw, "the_file")


def test_arrays_keep_shape_and_order() -> None:
    source = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (source, np.asfortranarray(source), source[:0]):
        batch = read_batch(pickle.dumps({"a": array}, 4), "x")
        np.testing.assert_array_equal(batch["a"], array)


def damaged(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("form_name", "name", "change", "message"),
    [
        ("python", "data_batch_3", None, "lacks data_batch_3"),
        ("binary", "batches.meta.txt", None, "lacks batches.meta.txt"),
        ("python", "data_batch_2", lambda raw: raw[:-5000], "data_batch_2 is refused"),
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


def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str = "") -> Path:
    """Makes a small archive the one that --download fetches."""
    folder = write("cifar10", "python", tmp_path / "made")
    archive = pack(folder, tmp_path / "published.tar.gz")
    digest = sha256 or hashlib.sha256(archive.read_bytes()).hexdigest()
    source = cifar.CIFAR["cifar10"]._replace(url=archive.as_uri(), sha256=digest)
    monkeypatch.setitem(cifar.CIFAR, "cifar10", source)
    return archive


def test_download_fetches_once_checks_and_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    archive = published(tmp_path, monkeypatch)
    target = tmp_path / "new" / "data"
    spec = f"cifar10:{target}"
    check_data_spec(spec, download=True)
    with caplog.at_level(logging.INFO, "dml_fast"):
        data = open_dataset(spec, download=True)
    assert "downloading" in caplog.text and "100%" in caplog.text
    assert [path.name for path in target.iterdir()] == ["cifar-10-python.tar.gz"]
    archive.unlink()  # so that a second download would fail
    assert open_dataset(spec, download=True).fingerprint == data.fingerprint


def test_a_download_with_a_wrong_hash_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path, monkeypatch, sha256="0" * 64)
    with pytest.raises(UserError, match=r"instead of 0000.*try again"):
        open_dataset(f"cifar10:{tmp_path / 'new'}", download=True)
    assert not [*(tmp_path / "new").iterdir()]


def test_a_download_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path, monkeypatch).unlink()
    with pytest.raises(UserError, match=r"could not download file:.*No such file.*other means"):
        open_dataset(f"cifar10:{tmp_path / 'new'}", download=True)
    assert not [*(tmp_path / "new").iterdir()]


def test_a_connection_that_ends_early_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path, monkeypatch)
    reply = io.BytesIO(b"half")
    reply.headers = {"Content-Length": "8"}  # type: ignore[attr-defined]
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: reply)
    with pytest.raises(UserError, match="ended after 4 of 8 bytes"):
        open_dataset(f"cifar10:{tmp_path / 'new'}", download=True)
    assert not [*(tmp_path / "new").iterdir()]


def test_a_target_that_is_no_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path, monkeypatch)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="could not download"):
        open_dataset(f"cifar10:{tmp_path / 'file'}", download=True)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar11:x", "unknown data 'cifar11:x': did you mean .*cifar10"),
        ("Digits", "did you mean digits"),
        ("zzz", "did you mean digits or cifar10 or cifar100 or folder"),
        ("{tmp}", "or folder:{tmp}"),
        ("digits:x", "should be 'digits' alone"),
        ("cifar10", "write cifar10:DIR"),
        ("folder:", "write folder:DIR"),
        ("cifar10:{tmp}", "has no CIFAR files: add --download, or put cifar-10-python.tar.gz"),
        ("cifar100:{tmp}/no", "does not exist: add --download, or put cifar-100-python.tar.gz"),
    ],
)
def test_specs_are_refused_with_a_remedy(spec: str, message: str, tmp_path: Path) -> None:
    spec, message = (text.replace("{tmp}", str(tmp_path)) for text in (spec, message))
    for refuse in (check_data_spec, open_dataset):
        with pytest.raises(UserError, match=message) as caught:
            refuse(spec)
        assert "\n" not in str(caught.value)


def test_a_folder_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --download"):
        check_data_spec(f"folder:{tmp_path}", download=True)
