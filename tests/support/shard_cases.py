"""Tar shards for the tests: of the photographs' pieces, of CIFAR's JPEGs, and damaged ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from data_cases import pieces

from dml_fast.data import DataSet, open_dataset

Files = Iterable[tuple[str, bytes]]


def write_tar(path: Path, files: Files, format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar of (name, content), as webdataset.TarWriter does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # pax needs a header more for a fraction
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, image: bytes, label: int, suffix: str = ".jpg") -> list[tuple[str, bytes]]:
    return [(key + suffix, image), (f"{key}.cls", str(label).encode())]


def shards_of(folder: Path, out: Path, each: int = 10) -> Path:
    """Pack a `folder:` into shards of ``each`` samples, in its order, with the class names."""
    classes = sorted(path.name for path in (folder / "train").iterdir())
    for part in sorted(path.name for path in folder.iterdir()):
        rows = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / part / name).iterdir())
        ]
        for start in range(0, len(rows), each):
            files: list[tuple[str, bytes]] = []
            for path, label in rows[start : start + each]:
                key = f"{path.parent.name}/{path.stem}"
                files += sample(key, path.read_bytes(), label, path.suffix)
            write_tar(out / f"{part}-{start // each:03}.tar", files)
    (out / "classes.txt").write_text("\n".join(classes) + "\n")
    return out


def both(root: Path, count: int = 25, each: int = 10, **options: object) -> tuple[Path, Path]:
    """Write the same pieces of photographs as a folder and as shards."""
    usual: dict = {"parts": ("train", "val"), "sizes": [(24, 24)]}
    folder = pieces(root / "folder", count, **(usual | options))
    return folder, shards_of(folder, root / "shards", each)


def opened(root: Path, loader: str = "fallback", **options: object) -> DataSet:
    return open_dataset(f"shards:{root}", loader=loader, **options)  # type: ignore[arg-type]


def cifar(archive: Path, root: Path, each_class: int) -> Path:
    """Unpack the first JPEGs of each class and part of CIFAR-10 to a folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or int(Path(member.name).stem) >= each_class:
                continue
            target = root.joinpath(*Path(member.name).parts[-3:])
            target.parent.mkdir(parents=True, exist_ok=True)
            stream = tar.extractfile(member)
            assert stream is not None
            target.write_bytes(stream.read())
    return root
