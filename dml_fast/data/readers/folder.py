"""``folder:DIR``: images in DIR/train/CLASS/, and optionally DIR/val/CLASS/ and DIR/test/CLASS/."""

from __future__ import annotations

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
from dml_fast.data.reading import Loaded, Reading, load
from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.storage import SUFFIXES, LooseFiles, is_image
from dml_fast.errors import UserError

_PARTS = ("train", "val", "test")

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
    if not os.path.isdir(root / "train"):
        raise UserError(f"folder:{root} has no train folder: {wanted}")
    if not _class_folders(root / "train", PassedOver()):
        raise UserError(f"{root}/train has no class folders: {wanted}")


def read_folder(root: Path, how: Reading) -> RawData:
    """Read a folder of images as RGB, or list its files for a decoder.

    Classes are the sorted names of the folders in train/. The images of a class are all below its
    folder, in the order of `images_below`. Hidden files and files without the suffix of an image
    are passed over; one log line counts them.

    Args:
        root: the folder.
        how: how to read it.

    Raises:
        UserError: a folder is missing or empty, classes do not match, a file is corrupt, sizes
            differ, or the images do not fit in memory.
    """
    check_folder(root)
    passed = PassedOver()
    for entry in entries(root, passed):
        if entry.name not in _PARTS or not is_folder(entry):
            passed.add(BESIDE if is_folder(entry) else OTHER, entry.path)
    listings = {
        part: _list_part(root / part, passed) for part in _PARTS if os.path.isdir(root / part)
    }
    passed.report(root)
    classes = tuple(listings["train"])
    for part, listing in listings.items():
        if unknown := [name for name in listing if name not in classes]:
            raise UserError(
                f"{root / part / unknown[0]} is a class that {root}/train does not have: add "
                "training images for it or remove it"
            )
    sets, loaded = _load_parts(root, listings, classes, how)
    return RawData(
        name=root.resolve().name,
        classes=classes,
        train=sets["train"],
        val=sets.get("val"),
        test=sets.get("test"),
        pad=min(sets["train"].images.shape[2:]) // 8,
        flip=True,
        corrupt=loaded.corrupt,
        choice=loaded.choice,
    )


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
    index = {name: label for label, name in enumerate(classes)}
    rows = [
        (index[name], path)
        for listing in listings.values()
        for name, files in listing.items()
        for path in files
    ]
    loaded = load(root, LooseFiles.of([path for _, path in rows]), how)
    labels = np.array([label for label, _ in rows], dtype=np.int64)[loaded.kept]
    sets, end = {}, 0
    for part, listing in listings.items():
        start, end = end, end + sum(map(len, listing.values()))
        piece = loaded.among(start, end)
        sets[part] = ImageSet(loaded.images[piece], labels[piece], manifest=loaded.manifest[piece])
        present = set(labels[piece].tolist())
        for name in listing:
            if index[name] not in present:
                raise UserError(
                    f"class folder {root / part / name} holds no image that can be decoded: add "
                    "some or remove it"
                )
    return sets, loaded
