"""Features in .npz files, from any network, ranked without one."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml_fast.errors import UserError, reason
from dml_fast.eval import RankingResult, rank_features, rank_hamming, rerank

_NEEDED = ("features", "pids")


class FeatureFile(NamedTuple):
    """What one file holds.

    Attributes:
        features: (N, D) floats, or (N, B) uint8 codes of 8 B bits.
        pids: (N,) identities.
        cams: (N,) cameras, or None.
    """

    features: NDArray[Any]
    pids: NDArray[Any]
    cams: NDArray[Any] | None

    @classmethod
    def read(cls, path: Path) -> FeatureFile:
        """Read ``numpy.savez(path, features=..., pids=..., cams=...)``; pickles are not opened.

        Raises:
            UserError: the file is missing, damaged or no .npz file, or lacks an array.
        """
        if not path.is_file():
            raise UserError(f"--features {path} does not exist: give two .npz files")
        how = "np.savez(PATH, features=..., pids=..., cams=...)"
        try:
            file = np.load(path, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"--features {path} is one array: save several with {how}")
            with file:
                if missing := [name for name in _NEEDED if name not in file]:
                    raise UserError(
                        f"--features {path} has {', '.join(file) or 'nothing'} and no "
                        f"{' and no '.join(missing)}: save with {how}"
                    )
                return cls(file["features"], file["pids"], file.get("cams"))
        except UserError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"--features {path} cannot be read ({reason(error)}): save with {how}"
            ) from None


def rank_files(
    query: Path, gallery: Path, *, metric: str, protocol: str, reranked: bool
) -> RankingResult:
    """Rank the features of one file among those of another.

    Args:
        query: a file with Q features or codes.
        gallery: a file with G.
        metric: cosine, euclidean or hamming.
        protocol: market1501, cuhk03, or all, which needs no cameras.
        reranked: whether to correct the distances with mutual neighbours.

    Raises:
        UserError: a file is not as `FeatureFile.read` needs it, or its arrays cannot be ranked.
    """
    q, g = FeatureFile.read(query), FeatureFile.read(gallery)
    rule: Any = {"protocol": protocol}
    if metric == "hamming":
        if reranked:
            raise UserError("--rerank goes with features and not with --metric hamming")
        return rank_hamming(q.features, g.features, q.pids, g.pids, q.cams, g.cams, **rule)
    rank_gallery = rerank if reranked else rank_features
    return rank_gallery(
        q.features, g.features, q.pids, g.pids, q.cams, g.cams, metric=metric, **rule
    )
