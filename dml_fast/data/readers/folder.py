"""``folder:DIR``: images in DIR/train/CLASS/, and optionally DIR/val/CLASS/ and DIR/test/CLASS/.

DIR/train/unlabelled/ is no class: the images below it have no label. With DIR/labels.csv, which
gives images several labels, `dml_fast.data.readers.several_labels` reads the folder.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from dml_fast.data.listing import (
    BESIDE,
    OTHER,
    PassedOver,
    entries,
    images_below,
    is_folder,
    take_image,
)
from dml_fast.data.names import Names
from dml_fast.data.readers.several_labels import (
    check_several_labels,
    has_label_table,
    read_several_labels,
)
from dml_fast.data.reading import Loaded, Reading, image_data, load
from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.storage import SUFFIXES, LooseFiles, is_image
from dml_fast.errors import UserError
from dml_fast.foreign import shown

_PARTS = ("train", "val", "test")
UNLABELLED = "unlabelled"
_log = logging.getLogger("dml_fast")

Listing = dict[str, list[str]]  # for each class its files, both sorted


def check_folder(root: Path) -> None:
    """Check that there is a train folder with classes, without reading images.

    Raises:
        UserError: there is none.
    """
    wanted = f"put images in {root}/train/CLASS/, one folder for each class"
    if not os.path.isdir(root):
        raise UserError(f"folder:{root} does not exist: {wanted}")
    if not entries(root, PassedOver()):
        raise UserError(f"folder:{root} is empty: {wanted}")
    if has_label_table(root):
        check_several_labels(root)
        return
    if not os.path.isdir(root / "train"):
        raise UserError(f"folder:{root} has no train folder: {wanted}")
    if not set(_class_folders(root / "train", PassedOver())) - {UNLABELLED}:
        raise UserError(f"{root}/train has no class folders: {wanted}")


def read_folder(root: Path, how: Reading) -> RawData:
    """Read a folder of images as RGB, or list its files for a decoder.

    Classes are the sorted names of the folders in train/, without unlabelled/, whose images have no
    label and come last. Beside it a class may be empty: its labels may come from a file. The
    images of a class are all below its folder, in the order of `images_below`. Hidden files and
    files without the suffix of an image are passed over; one log line counts them.

    Args:
        root: the folder.
        how: how to read it.

    Raises:
        UserError: a folder is missing or empty, classes do not match, a file is corrupt, sizes
            differ, or the images do not fit in memory.
    """
    check_folder(root)
    if has_label_table(root):
        return read_several_labels(root, how)
    passed = PassedOver()
    for entry in entries(root, passed):
        if entry.name not in _PARTS or not is_folder(entry):
            passed.add(BESIDE if is_folder(entry) else OTHER, entry.path)
    listings = {
        part: _list_part(root / part, passed) for part in _PARTS if os.path.isdir(root / part)
    }
    passed.report(root)
    classes = tuple(name for name in listings["train"] if name != UNLABELLED)
    if "unlabeled" in classes:
        _log.warning(
            "%s is a class: images without a label belong in train/%s",
            shown(root / "train" / "unlabeled"),
            UNLABELLED,
        )
    for part in ("val", "test"):
        if UNLABELLED in listings.get(part, ()):
            raise UserError(
                f"{root / part / UNLABELLED} holds images without a label, which only {root}/train "
                "may have: move them there, or remove them"
            )
    for part, listing in listings.items():
        if part == "train":
            continue
        if unknown := [name for name in listing if name not in classes]:
            raise UserError(
                f"{root / part / unknown[0]} is a class that {root}/train does not have: add "
                "training images for it or remove it"
            )
    sets, loaded = _load_parts(root, listings, classes, how)
    return image_data(root, classes, sets, loaded)


def _class_folders(part: Path, passed: PassedOver) -> list[str]:
    folders = []
    for entry in entries(part, passed):
        if is_folder(entry):
            folders.append(entry.name)
        elif is_image(entry.name):
            passed.add("beside the classes", entry.path)
        else:
            take_image(entry, passed)
    return folders


def _list_part(part: Path, passed: PassedOver) -> Listing:
    listing = {name: images_below(part / name, passed) for name in _class_folders(part, passed)}
    if not listing:
        raise UserError(f"{part} has no class folders: fill it or remove it")
    if UNLABELLED in listing:
        listing[UNLABELLED] = listing.pop(UNLABELLED)
        if not any(listing.values()):
            raise UserError(f"{part} holds no images: add some to its folders")
        return listing
    for name, files in listing.items():
        if not files:
            raise UserError(
                f"class folder {part / name} holds no images ({' '.join(sorted(SUFFIXES))}): "
                "add some or remove it"
            )
    return listing


def _load_parts(
    root: Path, listings: dict[str, Listing], classes: tuple[str, ...], how: Reading
) -> tuple[dict[str, ImageSet], Loaded]:
    """Load all parts at once: all images must have the same size."""
    index = {UNLABELLED: -1} | {name: label for label, name in enumerate(classes)}
    rows = [
        (index[name], path)
        for listing in listings.values()
        for name, files in listing.items()
        for path in files
    ]
    files = LooseFiles.of([path for _, path in rows])
    loaded = load(root, files, how)
    names = Names.of_files(root, files)[loaded.kept]
    labels = np.array([label for label, _ in rows], dtype=np.int64)[loaded.kept]
    sets, end = {}, 0
    for part, listing in listings.items():
        start, end = end, end + sum(map(len, listing.values()))
        piece = loaded.among(start, end)
        sets[part] = ImageSet(
            loaded.images[piece],
            labels[piece],
            manifest=loaded.manifest[piece],
            names=names[piece],
        )
        present = set(labels[piece].tolist())
        for name, paths in listing.items():
            if name != UNLABELLED and paths and index[name] not in present:
                raise UserError(
                    f"class folder {root / part / name} holds no image that can be decoded: add "
                    "some or remove it"
                )
    return sets, loaded
