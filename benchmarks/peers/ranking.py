"""What others do with a matrix of distances, and re-ranking on dense matrices: to compare with.

Each takes (dist, q_pids, g_pids, q_cams, g_cams) and returns the mAP. Packages are imported when a
function is called; `installed` says whether that would work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

Peer = Callable[..., float]


def numpy_argsort(dist: Any, q_pids: Any, g_pids: Any, q_cams: Any, g_cams: Any) -> float:
    """As the peers' Python code: sort each row, drop what is not valid, walk the hits."""
    aps = []
    for row, pid, cam in zip(dist, q_pids, q_cams, strict=True):
        order = np.argsort(row, kind="stable")
        keep = (g_pids[order] != pid) | (g_cams[order] != cam)
        hits = np.flatnonzero(g_pids[order][keep] == pid) + 1
        if len(hits):
            aps.append(np.mean(np.arange(1, len(hits) + 1) / hits))
    return float(np.mean(aps))


def torchmetrics_map(dist: Any, q_pids: Any, g_pids: Any, q_cams: Any, g_cams: Any) -> float:
    """By its function for one query."""
    torch = importlib.import_module("torch")
    retrieval = importlib.import_module("torchmetrics.functional.retrieval")
    aps = []
    for row, pid, cam in zip(dist, q_pids, q_cams, strict=True):
        keep = (g_pids != pid) | (g_cams != cam)
        match = torch.from_numpy(g_pids[keep] == pid)
        if match.any():
            scores = torch.from_numpy(2 - row[keep])  # it drops scores of 0 and less
            aps.append(retrieval.retrieval_average_precision(scores, match))
    return float(torch.stack(aps).mean())


def torchreid_python(dist: Any, *labels: Any) -> float:
    """Its function without Cython."""
    return float(_module("torchreid_python").eval_market1501(dist, *labels, 50)[1])


def torchreid_cython(dist: Any, *labels: Any) -> float:
    """Its function with Cython, which PyPI's package lacks."""
    return float(_module("torchreid_cython").evaluate_cy(dist, *labels, 50)[1])


def fastreid_cython(dist: Any, *labels: Any) -> float:
    """Torchreid's, changed in fast-reid; it returns each query's AP."""
    return float(np.mean(_module("fastreid_cython").evaluate_cy(dist, *labels, 50)[1]))


PEERS: list[Peer] = [
    numpy_argsort,
    torchmetrics_map,
    torchreid_python,
    torchreid_cython,
    fastreid_cython,
]
# Where a peer may be found: torchreid's modules are elsewhere in PyPI's package.
MODULES = {
    "numpy_argsort": ["numpy"],
    "torchmetrics_map": ["torchmetrics.functional.retrieval"],
    "torchreid_python": ["torchreid.metrics.rank", "torchreid.reid.metrics.rank"],
    "torchreid_cython": [
        "torchreid.metrics.rank_cylib.rank_cy",
        "torchreid.reid.metrics.rank_cylib.rank_cy",
    ],
    "fastreid_cython": ["fastreid.evaluation.rank_cylib.rank_cy"],
    "torchreid_rerank": ["torchreid.utils.rerank", "torchreid.reid.utils.rerank"],
}


def _module(peer: str) -> Any:
    for name in MODULES[peer]:
        try:
            return importlib.import_module(name)
        except ImportError:
            pass
    raise ImportError(f"none of {', '.join(MODULES[peer])} is installed")


def installed(peer: Peer) -> bool:
    """Whether it can be called here."""
    try:
        _module(peer.__name__)
    except ImportError:
        return False
    return True


def torchreid_rerank(q: Any, g: Any) -> Any:
    """Its re-ranked distances (Q, G), from cosine distances; float32.

    It squares what it is given, hence the root: the paper's distances are squared ones of features
    of length 1.
    """
    q, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g))
    between, among_q, among_g = (
        np.sqrt(np.maximum(0, 2 - 2 * (a @ b.T))) for a, b in ((q, g), (q, q), (g, g))
    )
    return _module("torchreid_rerank").re_ranking(between, among_q, among_g)


def dense_rerank(q: Any, g: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Any:
    """Re-ranked cosine distances (Q, G) by N x N matrices of float32, as the paper describes it.

    Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
    """
    x = np.concatenate([q, g])
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    d = 2 - 2 * (x @ x.T)
    d /= d.max(1, keepdims=True)
    order = np.argsort(d, axis=1).astype(np.int32)

    def mutual(i: int, k: int) -> Any:
        near = order[i, : k + 1]
        return near[(order[near, : k + 1] == i).any(1)]

    v = np.zeros_like(d)
    for i in range(len(x)):
        own = mutual(i, k1)
        parts = [own]
        for j in own:
            theirs = mutual(j, int(np.around(k1 / 2)))
            if len(np.intersect1d(theirs, own)) > 2 / 3 * len(theirs):
                parts.append(theirs)
        members = np.unique(np.concatenate(parts))
        weights = np.exp(-d[i, members])
        v[i, members] = weights / weights.sum()
    v = np.stack([v[order[i, :k2]].mean(0) for i in range(len(x))])
    holders = [np.flatnonzero(column) for column in v.T]
    final = np.empty((len(q), len(g)), np.float32)
    for i in range(len(q)):
        shared = np.zeros(len(x), np.float32)
        for j in np.flatnonzero(v[i]):
            shared[holders[j]] += np.minimum(v[i, j], v[holders[j], j])
        jaccard = 1 - shared / (2 - shared)
        final[i] = ((1 - lambda_value) * jaccard + lambda_value * d[i])[len(q) :]
    return final
