"""The data set of a file of pairs: which are to train with, and with which offsets."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from dml_fast.data.labelling import Labelling
from dml_fast.data.offset_files import offsets_in
from dml_fast.data.pairs import Ids, PairSet, displacement_names
from dml_fast.data.readers.pairs import check_room, read_pairs
from dml_fast.data.sets import DataSet
from dml_fast.data.splits import split_validation, take_fraction
from dml_fast.errors import UserError, brief
from dml_fast.foreign import shown

_log = logging.getLogger("dml_fast")


def open_pairs(
    path: Path, how: Labelling, *, search: int, patch: int, offsets: str, every: bool
) -> DataSet:
    """Read a file of pairs, and set some aside for validation.

    Args:
        path: of the file.
        how: the fractions and the seed; nothing else of it is used.
        search: see `PairSet`.
        patch: see there.
        offsets: a file with the offset of each pair to train with, in place of that in ``path``; ""
            for none. Pairs for validation keep theirs.
        every: whether pairs that ``offsets`` leaves out stay, with the offset that ``path`` has.
            They do not count for the fingerprint.

    Raises:
        UserError: a file is wrong, or no pair is left to train or to validate with.
    """
    pairs = read_pairs(path, search=search, patch=patch, seed=how.seed)
    alike = np.zeros(len(pairs), np.int64)
    rows, aside = split_validation(alike, how.val_fraction)
    if how.train_fraction < 1.0:
        rows = rows[take_fraction(alike[rows], how.train_fraction, how.seed)]
    train, val = pairs.subset(rows), pairs.subset(aside)
    used = train
    if offsets:
        train, listed = _moved(train, pairs, offsets)
        used = train.subset(listed)
    classes = displacement_names(search)
    return DataSet(
        name=path.stem,
        classes=classes,
        train=train if every else used,
        val=val,
        test=None,
        mean=(),
        std=(),
        pad=0,
        flip=False,
        fingerprint=_fingerprint(classes, used, val),
    )


def _moved(train: PairSet, pairs: PairSet, offsets: str) -> tuple[PairSet, Ids]:
    """Return pairs with the offsets of a file, and which of them it lists, (n,) int64."""
    where = f"--offsets {shown(offsets)}"
    given = offsets_in(offsets)
    known = set(pairs.names)
    for name in given:
        if name not in known:
            raise UserError(
                f"{where} names {brief(name)}, and the pairs are called 0 to {len(pairs) - 1}: "
                "give the file that was written for these pairs"
            )
    places = {name: place for place, name in enumerate(train.names) if name in given}
    if not places:
        raise UserError(f"{where} names none of {len(train)} pairs to train with: name some")
    listed = np.array([*places.values()], np.int64)
    offset = train.offset.copy()
    offset[listed] = [given[name] for name in places]
    moved = replace(train, offset=offset)
    check_room(moved, f"{where}:")
    _log.info(
        "%s: %d training pairs have an offset, %d are left out%s",
        where,
        len(listed),
        len(train) - len(listed),
        f"; {len(given) - len(listed)} that it names are not to train with"
        if len(given) > len(listed)
        else "",
    )
    return moved, listed


def _fingerprint(classes: tuple[str, ...], *parts: PairSet) -> str:
    shapes = [(part.a.shape, part.b.shape) for part in parts]
    digest = hashlib.sha256(json.dumps({"classes": classes, "shapes": shapes}).encode())
    for part in parts:
        for pixels in (part.a, part.b):
            digest.update(np.ascontiguousarray(pixels.astype("<f4", copy=False)).data)
        for numbers in (part.offset, part.labels):
            digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
    return digest.hexdigest()
