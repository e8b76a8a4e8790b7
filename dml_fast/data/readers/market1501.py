"""``market1501:DIR``: images of identities by several cameras, in folders as in Market-1501.

DIR/bounding_box_train holds the identities to learn, DIR/query the queries, and
DIR/bounding_box_test the gallery. A name such as ``0002_c1s1_000451_03.jpg`` is identity 2 seen by
camera 1; identity -1 is junk, and 0 a distractor (Zheng et al., ICCV 2015) where it is not among
those to learn. If no name has a camera (``0002_000451.jpg``), cameras do not matter.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.listing import BESIDE, OTHER, PassedOver, entries, is_folder, take_image
from dml_fast.data.names import Names
from dml_fast.data.reading import Loaded, Reading, load
from dml_fast.data.sets import ImageSet, RawData, RetrievalSet
from dml_fast.data.splits import split_identities
from dml_fast.data.storage import LooseFiles
from dml_fast.errors import UserError
from dml_fast.foreign import shown
from dml_fast.ranking.labels import check_search

JUNK = -1
_TRAIN, _QUERY, _GALLERY = PARTS = ("bounding_box_train", "query", "bounding_box_test")
_NAME = re.compile(r"(-1|\d{1,18})(?:_c(\d{1,18})|(?!_c\d))\D")

_log = logging.getLogger("dml_fast")

Ids = npt.NDArray[np.int64]


class _Image(NamedTuple):
    path: Path
    pid: int
    cam: int | None


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


def check_market1501_searches(root: Path, *, val_fraction: float, camera_rule: bool) -> None:
    """Check by the files' names that a query has a match, without reading images.

    Args:
        root: the folder.
        val_fraction: as in `read_market1501`.
        camera_rule: as there.

    Raises:
        UserError: a folder is missing, a name is wrong, or no query has a match, for validation or
            in the test set.
    """
    train, query, gallery = _parts(root, PassedOver())
    if val_fraction > 0:
        split_identities(_pids(train), _cams(train) if camera_rule else None, val_fraction)
    q_cams, g_cams = _cams(query), _cams(gallery)
    try:
        check_search(
            _pids(query),
            _pids(gallery),
            q_cams,
            g_cams,
            camera_rule=camera_rule and q_cams is not None,
            without_cameras="--val-protocol all",
        )
    except UserError as error:
        where = f"{root}/{_QUERY} and {_GALLERY}"
        raise UserError(f"{where}: {error}") from None


def read_market1501(root: Path, how: Reading, *, val_fraction: float, camera_rule: bool) -> RawData:
    """Read a data set of identities as RGB, or list its files for a decoder.

    The classes are the identities to learn, sorted. Files without the suffix of an image (such as
    Thumbs.db) and folders below are passed over; one log line counts them.

    Args:
        root: the folder.
        how: how to read it.
        val_fraction: the fraction of the training identities that is for validation, in [0, 1).
            With 0 the test images are also the validation images.
        camera_rule: whether a query for validation needs a match by another camera.

    Raises:
        UserError: a folder is missing, a file name is wrong, a file is corrupt, sizes differ, or
            the images do not fit in memory.
    """
    passed = PassedOver()
    parts = _parts(root, passed)
    passed.report(root)
    if parts[0][0].cam is None:
        _log.warning(
            "market1501:%s: no file's name has a camera (_c1): cameras do not matter to searches",
            shown(root),
        )
    flat = [image for part in parts for image in part]
    files = LooseFiles.of([image.path for image in flat])
    loaded = load(root, files, how)
    names = Names.of_files(root, files)[loaded.kept]
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
    test = _retrieval_set(loaded, names, np.arange(ends[0], ends[-1]), search, queries=len(kept[1]))
    pids, cams = _pids(train), _cams(train) if camera_rule else None
    learned, query, gallery = split_identities(pids, cams, val_fraction)
    val = test
    if val_fraction > 0:
        chosen = np.concatenate([query, gallery])
        held_out = [train[i] for i in chosen]
        val = _retrieval_set(loaded, names, chosen, held_out, queries=len(query))
    known, labels = np.unique(pids[learned], return_inverse=True)
    return RawData(
        name=root.resolve().name,
        classes=tuple(f"{pid:04d}" for pid in known.tolist()),
        train=ImageSet(
            loaded.images[learned],
            labels.astype(np.int64),
            manifest=loaded.manifest[learned],
            names=names[learned],
        ),
        val=val,
        test=test,
        pad=min(loaded.images.shape[2:]) // 8,
        flip=True,
        corrupt=loaded.corrupt,
        choice=loaded.choice,
    )


def identity_and_camera(name: str) -> tuple[int, int | None] | None:
    """Return what an image's name says, the camera None if it has none; None if it says nothing."""
    if (match := _NAME.match(name)) is None:
        return None
    return int(match[1]), None if match[2] is None else int(match[2])


def _parts(root: Path, passed: PassedOver) -> list[list[_Image]]:
    """Return the images to learn from, the queries and the gallery, by their names.

    Raises:
        UserError: a folder is missing or empty, or a name is wrong.
    """
    check_market1501(root)
    for entry in entries(root, passed):
        if entry.name not in PARTS:
            passed.add(BESIDE if is_folder(entry) else OTHER, entry.path)
    parts = [_list_part(root / part, passed) for part in PARTS]
    for image in parts[0]:
        if image.pid == JUNK:
            raise UserError(
                f"{image.path} is of identity -1, which is junk and cannot be learned: move "
                f"it to {_GALLERY}"
            )
    everything = [image for part in parts for image in part]
    without = [image for image in everything if image.cam is None]
    if 0 < len(without) < len(everything):
        other = next(image for image in everything if image.cam is not None)
        raise UserError(
            f"the name of {without[0].path} has no camera and that of {other.path} "
            "has: name all like 0002_c1s1_000451_03.jpg (identity 2, camera 1), or none"
        )
    return parts


def _pids(images: list[_Image]) -> Ids:
    return np.array([image.pid for image in images], np.int64)


def _cams(images: list[_Image]) -> Ids | None:
    """Return the cameras, None if no name has one."""
    known = [image.cam for image in images if image.cam is not None]
    return np.array(known, np.int64) if len(known) == len(images) else None


def _list_part(folder: Path, passed: PassedOver) -> list[_Image]:
    """Return the images of a folder, sorted by name."""
    images = []
    for entry in entries(folder, passed):
        if is_folder(entry):
            passed.add("folders below", entry.path)
            continue
        if not take_image(entry, passed):
            continue
        images.append(_image(folder / entry.name))
    if not images:
        raise UserError(f"{folder} holds no images: fill it")
    return images


def _image(path: Path) -> _Image:
    """Return what a name says.

    Raises:
        UserError: it says nothing.
    """
    if (known := identity_and_camera(path.name)) is None:
        raise UserError(
            f"the name of {path} has no identity and camera: name it like "
            "0002_c1s1_000451_03.jpg (identity 2, camera 1; up to 18 digits), or move it away"
        )
    return _Image(path, *known)


def _retrieval_set(
    loaded: Loaded, names: Names, rows: Ids, images: list[_Image], queries: int
) -> RetrievalSet:
    return RetrievalSet(
        images=loaded.images[rows],
        manifest=loaded.manifest[rows],
        labels=_pids(images),
        cams=_cams(images),
        names=names[rows],
        queries=queries,
    )
