"""Damaged files of every kind that data/ parses: the same result, another valid file, or an error.

What has a checksum (PNG, gzip, headers of a tar) is never read with other content.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from data_cases import picture
from mutations import mutations, outcome
from PIL import Image
from several_cases import digits_side_by_side
from shard_cases import sample, write_tar

from dml_fast.data import DataSet, check_data_spec, open_dataset
from dml_fast.data.decode import decode_image
from dml_fast.data.loaders.encoded import encoded
from dml_fast.data.readers import cifar, digits
from dml_fast.data.readers.market1501 import identity_and_camera
from dml_fast.data.readers.samples import read_index
from dml_fast.data.readers.several_labels import read_table
from dml_fast.data.scan import decoded, glanced_at
from dml_fast.data.storage import CorruptImageError, LooseFiles

COUNT = 210


def tried(path: Path, read: Callable[[], object], count: int = COUNT) -> list[object]:
    """Damage a file again and again, and return what reading it returned."""
    whole, found = path.read_bytes(), []
    for damaged in mutations(whole, count):
        path.write_bytes(damaged)
        found.append(outcome(read))
    path.write_bytes(whole)
    assert read() is not None
    return [result for result in found if result is not None]


def cifar10(root: Path, form: str) -> Path:
    """Write CIFAR-10 with four images in each file."""
    names = getattr(cifar.CIFAR["cifar10"], form)
    folder = root / names.folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*names.train, names.test):
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, 4)
        if form == "python":
            batch = {"data": pixels, "labels": labels.tolist(), "filenames": ["a.png"] * 4}
            (folder / name).write_bytes(pickle.dumps(batch, 2))
        else:
            rows = np.hstack([labels[:, None], pixels]).astype(np.uint8)
            (folder / name).write_bytes(rows.tobytes())
    classes = [f"class {number}" for number in range(10)]
    if form == "python":
        (folder / names.names).write_bytes(pickle.dumps({"label_names": classes}, 2))
    else:
        (folder / names.names).write_text("\n".join(classes))
    return folder


def plausible(data: object) -> bool:
    assert isinstance(data, DataSet)
    for part in (data.train, data.val, data.test):
        assert part is not None and part.pixels.shape == (len(part), 3, 32, 32)
        assert part.labels.min() >= 0 and part.labels.max() < len(data.classes)
    return True


@pytest.mark.parametrize(
    ("form", "file"),
    [("python", "data_batch_3"), ("python", "batches.meta"), ("binary", "data_batch_3.bin"),
     ("binary", "batches.meta.txt")],
)  # fmt: skip
def test_cifar(form: str, file: str, tmp_path: Path) -> None:
    folder = cifar10(tmp_path, form)
    results = tried(folder / file, lambda: open_dataset(f"cifar10:{tmp_path}"))
    assert all(map(plausible, results))


def test_opcodes_of_pickles(tmp_path: Path) -> None:
    """Damage the part before the pixels; most of a file is pixels."""
    from dml_fast.data.readers.unpickle import read_batch

    batch = {"labels": [1, 2, 300, 70_000, 2**40], "data": np.arange(6, dtype=np.uint8),
             "filenames": ["a.png", b"b"], "x": {"y": (1, 2.5, None, True)}}  # fmt: skip
    for protocol in range(6):
        if protocol == 1:
            continue
        for raw in mutations(pickle.dumps(batch, protocol), COUNT, protocol):
            found = outcome(lambda raw=raw: read_batch(raw, "batch"))  # type: ignore[misc]
            assert found is None or all(isinstance(key, str) for key in found)


def test_archives_of_cifar(tmp_path: Path) -> None:
    """The checksum of gzip is compared: other content is never read."""
    import tarfile

    folder = cifar10(tmp_path / "whole", "binary")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    expected = open_dataset(f"cifar10:{tmp_path}").fingerprint
    results = tried(archive, lambda: open_dataset(f"cifar10:{tmp_path}").fingerprint)
    assert set(results) <= {expected}


def test_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 10, (5, 65))
    path = tmp_path / "datasets" / "data" / "digits.csv.gz"
    path.parent.mkdir(parents=True)
    text = "\n".join(",".join(map(str, row)) for row in rows)
    path.write_bytes(gzip.compress(text.encode()))
    spec = ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(digits, "find_spec", lambda name: spec)
    monkeypatch.setattr(digits, "_COUNT", 5)
    for found in tried(path, digits._rows):
        np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("format", range(3), ids=["ustar", "gnu", "pax"])
def test_tar_shards(format: int, tmp_path: Path) -> None:
    """Names, offsets and sizes are the same; the content of a label may be another."""
    long = "folder/" + "x" * 120 + os.fsdecode(b"\xe9")
    files = [f for i in range(8) for f in sample(f"{i}" if format == 0 or i % 2 else f"{long}{i}",
                                                 bytes(20 + i), i)]  # fmt: skip
    path = write_tar(tmp_path / "train.tar", files, format)
    expected = read_index(path).images

    def read() -> object:
        index = read_index(path)
        assert index.damage.isprintable() or os.fsdecode(b"\xe9") in index.damage
        if not index.damage:
            assert index.images == expected and len(index.labels) == 8
        assert len(index.labels) == len(index.images) and set(index.images) <= set(expected)
        return index

    assert any(index.damage for index in tried(path, read))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_shards_as_a_data_set(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(picture(1, 8, 8)).save(out, "PNG")
    files = [f for i in range(20) for f in sample(f"{i}", out.getvalue(), i % 4, ".png")]
    path = write_tar(tmp_path / "train.tar", files)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    for file in (path, tmp_path / "classes.txt"):
        for data in tried(file, lambda: open_dataset(f"shards:{tmp_path}", loader="resident")):
            assert isinstance(data, DataSet) and len(data.train) + len(data.val) == 20
            assert all((image == data.train.pixels[0]).all() for image in data.train.pixels)
            assert data.train.labels.max() < len(data.classes)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True, "icc_profile": bytes(5000)}), ("PNG", {}),
     ("GIF", {}), ("BMP", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {}), ("PPM", {})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, of damaged TIFF files
def test_images(kind: str, options: dict, tmp_path: Path) -> None:
    """By each decoder and by both scans; for PNG the pixels are the same."""
    out = io.BytesIO()
    Image.fromarray(picture(1, 20, 30)).save(out, kind, **options)
    expected = decode_image(out.getvalue())
    path = tmp_path / "image"
    for raw in mutations(out.getvalue(), COUNT):
        path.write_bytes(raw)
        results = []
        for read in (decode_image, encoded):
            try:
                results.append(read(raw))
            except CorruptImageError as error:
                results.append(None)
                assert str(error)
        pixels, file = results
        if isinstance(pixels, np.ndarray):
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            if kind == "PNG":
                np.testing.assert_array_equal(pixels, expected)
        if file is not None and pixels is not None:
            assert (file.height, file.width) == pixels.shape[:2]
        files = LooseFiles.of([path])
        assert bool(decoded(files, 0)) == (pixels is None)
        assert isinstance(glanced_at(files, 0), str)


def test_names_of_identities() -> None:
    for raw in mutations(b"0002_c1s1_000451_03.jpg", COUNT):
        if (found := identity_and_camera(os.fsdecode(raw))) is not None:
            known = [number for number in found if number is not None]
            assert np.array(known, np.int64).tolist() == known and found[0] >= -1


def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a message quotes the path, whose length is checked
    specs = [
        f"{kind}:./{{a,b{{0..3}}}}/*[x].tar"
        for kind in ("folder", "market1501", "cifar10", "shards")
    ]
    specs.append("shards:https://user:secret@host:80/%20p/train-{000..003}.tar?signature=%2Fx#f")
    for spec in specs:
        for raw in mutations(spec.encode(), COUNT):
            if len(raw) < 200:
                outcome(lambda raw=raw: check_data_spec(os.fsdecode(raw)))  # type: ignore[misc]


def test_labels_of_images_that_have_several(tmp_path: Path) -> None:
    root = digits_side_by_side(tmp_path, {"train": 4, "val": 2})
    tried(root / "labels.csv", lambda: read_table(root / "labels.csv").classes)
