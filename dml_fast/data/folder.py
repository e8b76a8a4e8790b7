"""``folder:DIR``: images in DIR/train/CLASS/, and optionally DIR/val/CLASS/ and DIR/test/CLASS/."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from dml_fast.data.decode import BadImage, Size, decode_all
from dml_fast.data.sets import ImageSet, RawData
from dml_fast.errors import UserError

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_PARTS = ("train", "val", "test")
_log = logging.getLogger("dml_fast")

Listing = dict[str, list[Path]]  # class name -> its files, both sorted


def check_folder(root: Path) -> None:
    """Checks that there is a train folder with classes, without looking at images.

    Raises:
        UserError: there is not.
    """
    wanted = f"put images in {root}/train/CLASS/, one folder a class"
    if not root.is_dir():
        raise UserError(f"folder:{root} does not exist: {wanted}")
    if not any(root.iterdir()):
        raise UserError(f"folder:{root} is empty: {wanted}")
    if not (root / "train").is_dir():
        raise UserError(f"folder:{root} has no train folder: {wanted}")
    if not _class_folders(root / "train"):
        raise UserError(f"{root}/train has no class folders: {wanted}")


def read_folder(root: Path, *, image_size: Size, skip_corrupt: bool) -> RawData:
    """Reads a folder of images as RGB.

    Classes are the sorted names of the folders in train/; files are taken in sorted order, hidden
    ones and those without an image's suffix are passed over.

    Args:
        root: the folder.
        image_size: see `decode_all`.
        skip_corrupt: whether to leave out files that cannot be decoded.

    Raises:
        UserError: a folder is missing or empty, classes do not match, a file is corrupt, sizes
            differ, or the images do not fit in memory.
    """
    check_folder(root)
    listings = {part: _list_part(root / part) for part in _PARTS if (root / part).is_dir()}
    classes = tuple(listings["train"])
    for part, listing in listings.items():
        if unknown := [name for name in listing if name not in classes]:
            raise UserError(
                f"{root / part / unknown[0]} is a class that {root}/train does not have: add "
                "training images for it or remove it"
            )
    sets, skipped = _decode_parts(root, listings, classes, image_size, skip_corrupt)
    return RawData(
        name=root.resolve().name,
        classes=classes,
        train=sets["train"],
        val=sets.get("val"),
        test=sets.get("test"),
        pad=min(sets["train"].images.shape[2:]) // 8,
        flip=True,
        skipped=skipped,
    )


def _class_folders(part: Path) -> list[Path]:
    return sorted(
        path for path in part.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _list_part(part: Path) -> Listing:
    listing = {folder.name: _image_files(folder) for folder in _class_folders(part)}
    if not listing:
        raise UserError(f"{part} has no class folders: fill it or remove it")
    for name, files in listing.items():
        if not files:
            raise UserError(
                f"class folder {part / name} holds no images ({' '.join(sorted(SUFFIXES))}): "
                "add some or remove it"
            )
    return listing


def _image_files(folder: Path) -> list[Path]:
    # names are sorted before they become paths, which takes a fifth of the time
    return [
        folder / name
        for name in sorted(os.listdir(folder))
        if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
    ]


def _decode_parts(
    root: Path,
    listings: dict[str, Listing],
    classes: tuple[str, ...],
    image_size: Size,
    skip_corrupt: bool,
) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    """Decodes all parts at once, since one size must hold for all of them."""
    rows = [
        (part, classes.index(name), path)
        for part, listing in listings.items()
        for name, files in listing.items()
        for path in files
    ]
    images, bad = decode_all(
        [path for *_, path in rows], image_size=image_size, skip_corrupt=skip_corrupt
    )
    bad_paths = {path for path, _ in bad}
    rows = [row for row in rows if row[2] not in bad_paths]
    part_of = np.array([part for part, *_ in rows])
    labels = np.array([label for _, label, _ in rows], dtype=np.int64)
    sets = {}
    for part, listing in listings.items():
        chosen = np.flatnonzero(part_of == part)
        # the parts lie one after another, so a slice serves and copies nothing
        piece = slice(chosen[0], chosen[-1] + 1) if len(chosen) else slice(0)
        sets[part] = ImageSet(images[piece], labels[piece])
        for name in listing:
            if classes.index(name) not in sets[part].labels:
                raise UserError(
                    f"class folder {root / part / name} holds no image that can be decoded: add "
                    "some or remove it"
                )
    return sets, report_skipped(root, bad)


def report_skipped(root: Path, bad: list[BadImage]) -> tuple[str, ...]:
    """Logs what was left out, in one line, and returns the relative names."""
    names = tuple(path.relative_to(root).as_posix() for path, _ in bad)
    if bad:
        shown = "; ".join(
            f"{name} ({reason})" for name, (_, reason) in zip(names[:5], bad, strict=False)
        )
        more = "; ..." if len(bad) > 5 else ""
        _log.warning("skipped %d corrupt images: %s%s", len(bad), shown, more)
    return names
