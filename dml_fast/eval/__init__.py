"""How good students are: classification, and retrieval by `dml_fast.ranking`.

The names of that package are imported lazily: ranking a matrix does not need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dml_fast.ranking.codes import rank_hamming
    from dml_fast.ranking.distances import rank_distances
    from dml_fast.ranking.features import rank_features
    from dml_fast.ranking.protocol import SingleShot
    from dml_fast.ranking.reranking import rerank
    from dml_fast.ranking.result import RankingResult
    from dml_fast.ranking.sets import pool_queries, rank_sets

_HOMES = {
    "RankingResult": "result",
    "SingleShot": "protocol",
    "rank_distances": "distances",
    "rank_features": "features",
    "rank_hamming": "codes",
    "rank_sets": "sets",
    "rerank": "reranking",
    "pool_queries": "sets",
}

__all__ = [
    "RankingResult",
    "SingleShot",
    "pool_queries",
    "rank_distances",
    "rank_features",
    "rank_hamming",
    "rank_sets",
    "rerank",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dml_fast.eval' has no attribute {name!r}")
    return getattr(import_module(f"dml_fast.ranking.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
