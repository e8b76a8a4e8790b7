"""How well the codes of students with a hash head find rows of one class or identity."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dml_fast.data import RetrievalSet
from dml_fast.data.loaders.assemble import Batch
from dml_fast.data.names import some_of
from dml_fast.data.sets import Part
from dml_fast.engine.precision import Precision
from dml_fast.errors import UserError
from dml_fast.eval.checks import known_protocol
from dml_fast.eval.prediction_files import new_file
from dml_fast.eval.retrieval import Features, Retrieval, embed
from dml_fast.ranking.codes import rank_hamming
from dml_fast.ranking.result import RankingResult

Codes: TypeAlias = NDArray[np.uint8]

_log = logging.getLogger("dml_fast")


@dataclass(frozen=True)
class CodedRows:
    """The codes of N rows that have a label.

    Attributes:
        students: K arrays (N, b) float32: +1 for a bit that is 1 and -1 for 0; other numbers, which
            are not finite, are no code.
        labels: (N,) int64, indices of classes, or identities.
        cams: (N,) int64, the camera of each image; None where there are none.
        names: of the N rows.
        unlabelled: how many rows were left out because they have no label.
    """

    students: list[Features]
    labels: NDArray[np.int64]
    cams: NDArray[np.int64] | None
    names: Sequence[str]
    unlabelled: int

    def packed(self, students: Sequence[int]) -> Codes:
        """Return the codes of these students side by side, (N, ceil(K b / 8)) uint8."""
        bits = np.concatenate([self.students[k] > 0 for k in students], axis=1)
        return np.packbits(bits, axis=1)

    def rows(self, ids: slice) -> CodedRows:
        """Return some of the rows."""
        cams = None if self.cams is None else self.cams[ids]
        students = [bits[ids] for bits in self.students]
        return CodedRows(students, self.labels[ids], cams, self.names[ids], self.unlabelled)


@dataclass(frozen=True)
class CodeSearch:
    """Queries, the gallery that they search in, and what they find there.

    Attributes:
        queries: Q rows.
        gallery: G rows.
        protocol: whose rules were followed.
        good: the numbers of the students whose codes were ranked.
        found: the rankings; mean scores over all orders of equal distances.
    """

    queries: CodedRows
    gallery: CodedRows
    protocol: str
    good: list[int]
    found: Retrieval

    @property
    def bits(self) -> int:
        """The length b of each student's codes."""
        bits: int = self.queries.students[self.good[0]].shape[1]
        return bits

    @property
    def unlabelled(self) -> int:
        """How many rows were left out because they have no label."""
        return self.queries.unlabelled + self.gallery.unlabelled


def search_codes(
    models: Sequence[nn.Module],
    queries: Sequence[Part],
    gallery: Sequence[Part],
    batches: Callable[[Part], Iterable[Batch]],
    precision: Precision,
    *,
    protocol: str = "all",
    topk: int = 0,
) -> CodeSearch:
    """Let the codes of each student, and of all side by side, search by Hamming distance.

    Args:
        models: K networks with ``embed``, `dml_fast.models.hashing.HashNet`.
        queries: the parts that search; one `RetrievalSet` has its own gallery.
        gallery: the parts in which they search.
        batches: returns the batches of a part in order; corrupt files may be left out.
        precision: as in training.
        protocol: as in `rank_hamming`, for a `RetrievalSet`.
        topk: as there, for the ensemble alone.

    Raises:
        UserError: no student's codes are finite, or no query has a match.
    """
    if isinstance(queries[0], RetrievalSet):
        images = queries[0]
        both = _coded(models, queries, batches, precision)
        found, there = both.rows(slice(images.queries)), both.rows(slice(images.queries, None))
        protocol = known_protocol(images, protocol)
    else:
        found = _coded(models, queries, batches, precision)
        there = _coded(models, gallery, batches, precision)
        protocol = "all"
    good = _finite(found, there)
    if not good:
        raise UserError(
            "no student gives codes, for none is of finite numbers: evaluate an earlier checkpoint "
            "with --checkpoint"
        )
    each = [_rank(found, there, [k], protocol) if k in good else None for k in range(len(models))]
    ensemble = _rank(found, there, good, protocol, topk)
    return CodeSearch(found, there, protocol, good, Retrieval(tuple(each), ensemble))


def _coded(
    models: Sequence[nn.Module],
    parts: Sequence[Part],
    batches: Callable[[Part], Iterable[Batch]],
    precision: Precision,
) -> CodedRows:
    """Return the codes of all rows of some parts that have a label; of a search, of all rows."""
    students: list[list[Features]] = [[] for _ in models]
    labels: list[NDArray[np.int64]] = []
    cams: list[NDArray[np.int64]] = []
    names: list[str] = []
    unlabelled = 0
    for part in parts:
        seen: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        bits = embed(models, _noted(batches(part), seen), precision)
        ids = np.concatenate(seen)
        if not len(ids):
            continue
        kept = np.ones(len(ids), bool) if isinstance(part, RetrievalSet) else part.labels[ids] >= 0
        unlabelled += int((~kept).sum())
        for mine, features in zip(students, bits, strict=True):
            mine.append(features[kept])
        labels.append(part.labels[ids[kept]])
        names += list(some_of(part.names, ids[kept]))
        if isinstance(part, RetrievalSet) and part.cams is not None:
            cams.append(part.cams[ids[kept]])
    return CodedRows(
        [np.concatenate(mine) for mine in students],
        np.concatenate(labels),
        np.concatenate(cams) if cams else None,
        names,
        unlabelled,
    )


def _noted(batches: Iterable[Batch], seen: list[NDArray[np.int64]]) -> Iterator[Batch]:
    for batch in batches:
        if len(batch.ids):  # all of its files may be corrupt
            seen.append(batch.ids.cpu().numpy())
            yield batch


def _finite(*rows: CodedRows) -> list[int]:
    """Return the numbers of the students whose codes are finite."""
    good = []
    for k in range(len(rows[0].students)):
        if all(np.isfinite(part.students[k]).all() for part in rows):
            good.append(k)
        else:
            _log.warning("student %d's codes are not finite: it is left out of the search", k)
    return good


def _rank(
    queries: CodedRows,
    gallery: CodedRows,
    students: Sequence[int],
    protocol: str,
    topk: int = 0,
) -> RankingResult:
    return rank_hamming(
        queries.packed(students),
        gallery.packed(students),
        queries.labels,
        gallery.labels,
        queries.cams,
        gallery.cams,
        protocol=protocol,
        ties="expected",
        camera_rule=queries.cams is not None,
        junk_pid=-1,
        topk=topk,
    )


def write_codes(path: Path, search: CodeSearch, classes: Sequence[str]) -> None:
    """Write the codes of a search as .npz, without pickles.

    The arrays, with ``query`` and ``gallery`` for PART: ``PART_codes_K`` (N, ceil(b / 8)) uint8 of
    student K, ``PART_codes_ensemble`` (N, ceil(K b / 8)), ``PART_names`` (N,), and either
    ``PART_labels`` (N,), indices of ``classes``, or ``PART_pids`` (N,) and, where they are known,
    ``PART_cams`` (N,); ``bits`` is b.

    Args:
        path: the new file.
        search: what was found.
        classes: of the labels; none for identities.

    Raises:
        UserError: it cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for part, rows in (("query", search.queries), ("gallery", search.gallery)):
        for k in search.good:
            arrays[f"{part}_codes_{k}"] = rows.packed([k])
        arrays[f"{part}_codes_ensemble"] = rows.packed(search.good)
        arrays[f"{part}_labels" if classes else f"{part}_pids"] = rows.labels
        if rows.cams is not None:
            arrays[f"{part}_cams"] = rows.cams
        arrays[f"{part}_names"] = np.array(list(rows.names), dtype=np.str_)
    if classes:
        arrays["classes"] = np.array(list(classes), dtype=np.str_)
    arrays["bits"] = np.array(search.bits)
    with new_file("--codes", path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
