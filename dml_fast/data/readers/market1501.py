"""``market1501:DIR``: images of identities by several cameras, in folders as in Market-1501.

DIR/bounding_box_train holds the identities to learn, DIR/query the queries, and
DIR/bounding_box_test the gallery. A name such as ``0002_c1s1_000451_03.jpg`` is identity 2 seen by
camera 1; identity -1 is junk, 0 a distractor (Zheng et al., ICCV 2015).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.listing import BESIDE, OTHER, PassedOver, entries, is_folder, take_image
from dml_fast.data.reading import Loaded, Reading, load
from dml_fast.data.sets import ImageSet, RawData, RetrievalSet
from dml_fast.data.splits import split_identities
from dml_fast.data.storage import LooseFiles
from dml_fast.errors import UserError

JUNK, DISTRACTOR = -1, 0
_TRAIN, _QUERY, _GALLERY = PARTS = ("bounding_box_train", "query", "bounding_box_test")
_NAME = re.compile(r"(-1|\d{1,18})_c(\d{1,18})\D")

Ids = npt.NDArray[np.int64]


class _Image(NamedTuple):
    path: Path
    pid: int
    cam: int


def check_market1501(root: Path) -> None:
    """Check that the three folders exist, without reading images.

    Raises:
        UserError: one is missing.
    """
    for part in PARTS:
        if not os.path.isdir(root / part):
            found = f"has no folder {part}" if os.path.isdir(root) else "does not exist"
            raise UserError(
                f"market1501:{root} {found}: put images in {root}/ in the folders "
                f"{_TRAIN}, {_QUERY} and {_GALLERY}"
            )


def read_market1501(root: Path, how: Reading, *, val_fraction: float) -> RawData:
    """Read a data set of identities as RGB, or list its files for a decoder.

    The classes are the identities to learn, sorted. Files without the suffix of an image (such as
    Thumbs.db) and folders below are passed over; one log line counts them.

    Args:
        root: the folder.
        how: how to read it.
        val_fraction: the fraction of the training identities that is for validation, in [0, 1).
            With 0 the test images are also the validation images.

    Raises:
        UserError: a folder is missing, a file name is wrong, a file is corrupt, sizes differ, or
            the images do not fit in memory.
    """
    check_market1501(root)
    passed = PassedOver()
    for entry in entries(root, passed):
        if entry.name not in PARTS:
            passed.add(BESIDE if is_folder(entry) else OTHER, entry.path)
    parts = [_list_part(root / part, passed) for part in PARTS]
    passed.report(root)
    flat = [image for part in parts for image in part]
    loaded = load(root, LooseFiles.of([image.path for image in flat]), how)
    whole = set(loaded.kept.tolist())
    starts = np.cumsum([0] + [len(part) for part in parts])
    kept = [
        [image for row, image in enumerate(part, start) if row in whole]
        for part, start in zip(parts, starts.tolist(), strict=False)
    ]
    for part, images in zip(PARTS, kept, strict=True):
        if not images:
            raise UserError(f"{root / part} holds no image that can be decoded: replace them")
    ends = np.cumsum([len(part) for part in kept])
    train, search = kept[0], kept[1] + kept[2]
    test = _retrieval_set(root, loaded, np.arange(ends[0], ends[-1]), search, queries=len(kept[1]))
    pids = np.array([image.pid for image in train], np.int64)
    if len(bad_id := np.flatnonzero(pids <= DISTRACTOR)):
        raise UserError(
            f"{train[bad_id[0]].path} is of identity {pids[bad_id[0]]}, which cannot be learned: "
            "move junk (-1) and distractors (0) to bounding_box_test"
        )
    cams = np.array([image.cam for image in train], np.int64)
    learned, query, gallery = split_identities(pids, cams, val_fraction)
    val = test
    if val_fraction > 0:
        chosen = np.concatenate([query, gallery])
        held_out = [train[i] for i in chosen]
        val = _retrieval_set(root, loaded, chosen, held_out, queries=len(query))
    known, labels = np.unique(pids[learned], return_inverse=True)
    return RawData(
        name=root.resolve().name,
        classes=tuple(f"{pid:04d}" for pid in known.tolist()),
        train=ImageSet(
            loaded.images[learned], labels.astype(np.int64), manifest=loaded.manifest[learned]
        ),
        val=val,
        test=test,
        pad=min(loaded.images.shape[2:]) // 8,
        flip=True,
        corrupt=loaded.corrupt,
        choice=loaded.choice,
    )


def identity_and_camera(name: str) -> tuple[int, int] | None:
    """Return what an image's name says, None if it has another form."""
    match = _NAME.match(name)
    return None if match is None else (int(match[1]), int(match[2]))


def _list_part(folder: Path, passed: PassedOver) -> list[_Image]:
    """Return the images of a folder, sorted by name."""
    images = []
    for entry in entries(folder, passed):
        if is_folder(entry):
            passed.add("folders below", entry.path)
            continue
        if not take_image(entry, passed):
            continue
        name = entry.name
        if (known := identity_and_camera(name)) is None:
            raise UserError(
                f"the name of {folder / name} has no identity and camera: name it like "
                "0002_c1s1_000451_03.jpg (identity 2, camera 1; up to 18 digits), or move it away"
            )
        images.append(_Image(folder / name, *known))
    if not images:
        raise UserError(f"{folder} holds no images: fill it")
    return images


def _retrieval_set(
    root: Path, loaded: Loaded, rows: Ids, images: list[_Image], queries: int
) -> RetrievalSet:
    return RetrievalSet(
        images=loaded.images[rows],
        manifest=loaded.manifest[rows],
        labels=np.array([image.pid for image in images], np.int64),
        cams=np.array([image.cam for image in images], np.int64),
        names=tuple(image.path.relative_to(root).as_posix() for image in images),
        queries=queries,
    )
