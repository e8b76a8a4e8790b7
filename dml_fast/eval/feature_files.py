"""Features in .npz files, from any network, ranked without one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from dml_fast.data.npz import arrays_in
from dml_fast.errors import UserError
from dml_fast.eval import RankingResult, rank_features, rank_hamming, rerank
from dml_fast.eval.checks import check_reranking
from dml_fast.ranking.inputs import as_ids
from dml_fast.ranking.labels import check_search, junk_mask

JUNK = -1

_log = logging.getLogger("dml_fast")
_SAVE = "save with numpy.savez(PATH, features=..., pids=..., cams=...)"


class FeatureFile(NamedTuple):
    """What one file holds.

    Attributes:
        path: of the file.
        features: (N, D) floats, or (N, B) uint8 codes of 8 B bits.
        pids: (N,) identities.
        cams: (N,) cameras, or None.
        coded: whether it says that the features are codes: an array ``bits`` is there.
    """

    path: Path
    features: NDArray[Any]
    pids: NDArray[Any]
    cams: NDArray[Any] | None
    coded: bool = False

    @classmethod
    def read(cls, path: Path) -> FeatureFile:
        """Read ``numpy.savez(path, features=..., pids=..., cams=...)``; pickles are not opened.

        Other arrays are not read. The archive's checksums are tested.

        Raises:
            UserError: the file is missing, damaged or no .npz file, lacks an array, or its arrays
                do not belong together.
        """
        name = f"--features {path}"
        if not path.is_file():
            raise UserError(f"{name} does not exist: give two .npz files")
        with arrays_in(path, name, _SAVE) as file:
            _check_names(name, file.names)
            features, pids = file.read("features"), file.read("pids")
            cams = file.read("cams") if "cams" in file.names else None
            coded = "bits" in file.names
        if features.ndim != 2 or features.dtype.kind not in "fiu":
            raise UserError(
                f"{name} has features of shape {features.shape} and type {features.dtype}: save "
                "numbers, (N, D)"
            )
        as_ids(pids, f"pids in {name}", len(features))
        if cams is not None:
            as_ids(cams, f"cams in {name}", len(features))
        return cls(path, features, pids, cams, coded)


def _check_names(name: str, found: Sequence[str]) -> None:
    missing = [key for key in ("features", "pids") if key not in found]
    if missing == ["pids"]:
        raise UserError(
            f"{name} has no pids: without identities nothing can be scored, so add the array pids, "
            "one for each row of features"
        )
    if missing:
        there = ", ".join(found) or "no array"
        raise UserError(f"{name} has {there} and no {' and no '.join(missing)}: {_SAVE}")


def rank_files(
    query: Path, gallery: Path, *, metric: str, protocol: str, reranked: bool
) -> RankingResult:
    """Rank the features of one file among those of another; identity -1 is junk.

    Args:
        query: a file with Q features or codes.
        gallery: a file with G.
        metric: cosine, euclidean or hamming.
        protocol: market1501, cuhk03, or all, which needs no cameras.
        reranked: whether to correct the distances with mutual neighbours.

    Raises:
        UserError: a file is not as `FeatureFile.read` needs it, or its arrays cannot be ranked.
    """
    if reranked and metric == "hamming":
        raise UserError("--rerank goes with features and not with --metric hamming")
    q, g = FeatureFile.read(query), FeatureFile.read(gallery)
    for file in (q, g):
        if file.coded and metric != "hamming":
            raise UserError(
                f"--features {file.path} holds codes of bits, whose bytes --metric {metric} would "
                "take for numbers: give --metric hamming"
            )
        if file.cams is None and protocol != "all":
            raise UserError(
                f"--features {file.path} has no cams: add the array cams, one for each row "
                "of features, or give --protocol all, which ranks without cameras"
            )
    labels = (q.pids, g.pids, q.cams, g.cams)
    check_search(*labels, camera_rule=protocol != "all", without_cameras="--protocol all")
    if reranked:
        check_reranking(len(q.pids) + len(g.pids))
    junk = int(junk_mask(g.pids, JUNK).sum())
    if junk:
        _log.warning("%d of %d gallery items are junk (identity -1): left out", junk, len(g.pids))
    rule: Any = {"protocol": protocol, "junk_pid": JUNK}
    if metric == "hamming":
        return rank_hamming(q.features, g.features, *labels, **rule)
    rank_gallery = rerank if reranked else rank_features
    return rank_gallery(q.features, g.features, *labels, metric=metric, **rule)
