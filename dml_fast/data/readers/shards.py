"""``shards:DIR`` or ``shards:URL``: tar files of samples, as WebDataset writes them.

A sample is an image and its label: ``0001.jpg``, and ``0001.cls`` with the number of its class. In
a training shard without any ``.cls``, no image has a label. The tar files are not unpacked.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dml_fast.data.corrupt import BadImage, CorruptFiles
from dml_fast.data.names import Names
from dml_fast.data.readers.samples import TarMembers, read_index
from dml_fast.data.readers.shard_names import CLASSES, ShardNames, find_shards
from dml_fast.data.reading import Reading, image_data, load
from dml_fast.data.sets import ImageSet, RawData
from dml_fast.data.storage import Ids
from dml_fast.errors import UserError
from dml_fast.foreign import content, reading
from dml_fast.machine import cores

_MOST_CLASSES = 1 << 20  # without a file of names: one wrong label must not take all memory
_log = logging.getLogger("dml_fast")


def read_shards(spec: str, how: Reading) -> RawData:
    """Read tar shards as RGB, or list their images for a decoder.

    Args:
        spec: see `find_shards`.
        how: how to read them.

    Raises:
        UserError: shards are missing or damaged, a sample is incomplete, a label is out of range,
            an image is corrupt, sizes differ, or the images do not fit in memory; or a shard for
            validation or testing has no labels.
    """
    names = find_shards(spec)
    corrupt = CorruptFiles(names.root, allowed=how.skip_corrupt)
    members = index_shards(names, corrupt)
    corrupt.report()
    names.passed.report(names.root)
    labels = members.labels
    shards = np.cumsum([0, *map(len, names.parts.values())])
    ends = np.searchsorted(members.tar, shards).tolist()
    if not ends[1]:
        raise UserError(
            f"the training shards of shards:{spec} hold no complete sample: replace them"
        )
    if len(without := ends[1] + np.flatnonzero(labels[ends[1] :] < 0)):
        raise UserError(
            f"{members.shard(without[0])} has no labels (0001.cls and so on), which only training "
            "shards may lack: add them, or rename it"
        )
    classes = _classes(names.root / CLASSES, labels[: ends[1]])
    _check_labels(names.root, members, classes)
    loaded = load(names.root, members, how, corrupt=corrupt)
    of_files = Names.of_files(names.root, members)
    sets = {}
    for part, start, end in zip(names.parts, ends, ends[1:], strict=False):
        piece = loaded.among(start, end)
        rows = loaded.kept[piece]
        if not len(rows):
            raise UserError(
                f"no {part} shard of shards:{spec} holds an image that can be decoded: replace them"
            )
        sets[part] = ImageSet(
            loaded.images[piece],
            labels[rows],
            manifest=loaded.manifest[piece],
            shard=members.tar[rows],
            names=of_files[rows],
        )
    return image_data(names.root, classes, sets, loaded)


def index_shards(names: ShardNames, corrupt: CorruptFiles) -> TarMembers:
    """Read the headers of all shards and find their samples, in the order of ``names``.

    Args:
        names: the shards; ``passed`` also counts members that are no part of a sample.
        corrupt: records damaged shards, of which the samples before the damage are kept.

    Raises:
        UserError: a shard is damaged and that is not allowed, or a sample is incomplete.
    """
    tars = [path for part in names.parts.values() for path in part]
    with ThreadPoolExecutor(cores()) as pool:
        indices = list(pool.map(read_index, tars))
    for path, index in zip(tars, indices, strict=True):
        names.passed.merge(index.passed)
        if not index.damage:
            continue
        if not corrupt.allowed:
            raise UserError(
                f"shard {path} is damaged ({index.damage}): replace it, or keep the "
                f"{len(index.images)} whole samples before the damage with --skip-corrupt"
            )
        corrupt.add(BadImage(path, f"{index.damage}; {len(index.images)} samples of it are kept"))
    members = TarMembers.of(tars, indices)
    _log.info("%d samples in %d shards", len(members), len(tars))
    return members


def _classes(path: Path, train: Ids) -> tuple[str, ...]:
    """Return the class names: the lines of ``path`` or, without that file, all labels as text."""
    text = ""
    if os.path.exists(path):
        with reading(path, "replace it"):
            text = content(path, "replace it").decode("utf-8").strip()
    if not text:
        count = int(train.max()) + 1
        if not count:
            raise UserError(
                f"no training shard has labels (0001.cls and so on): add some, or name all classes "
                f"in {path} and give --labels FILE"
            )
        if count > _MOST_CLASSES:
            raise UserError(
                f"the largest label is {count - 1}: number the classes from 0 without gaps, or "
                f"name them all in {path}"
            )
        return tuple(map(str, range(count)))
    classes = tuple(line.strip() for line in text.splitlines())
    if not all(classes):
        row = classes.index("") + 1
        raise UserError(f"{path} has no name in line {row}: write one class in each line")
    return classes


def _check_labels(root: Path, members: TarMembers, classes: tuple[str, ...]) -> None:
    labels = members.labels
    if not len(wrong := np.flatnonzero(labels >= len(classes))):
        return
    known = (
        f"{root / CLASSES} names {len(classes)}"
        if os.path.exists(root / CLASSES)
        else f"the training shards have {len(classes)}"
    )
    raise UserError(
        f"{members.path(wrong[0])} has label {labels[wrong[0]]} and {known} classes, counted from "
        "0: correct one or the other"
    )
