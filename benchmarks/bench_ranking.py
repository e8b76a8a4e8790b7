"""Ranking at Market-1501's size, and with 500,000 distractors, against peers and against limits.

    pytest benchmarks/bench_ranking.py                       # a tenth of the queries
    python benchmarks/bench_ranking.py                       # all, contestants in turns
    python benchmarks/bench_ranking.py --gallery 500000      # ours alone
    python benchmarks/bench_ranking.py --only rerank

The features are synthetic: 751 identities, a fifth of the gallery distractors, at about 85 % mAP.
The limit for a given matrix is reading it once, for features one `torch.mm` of the same size.
Peers that are not installed are left out: torchmetrics, and torchreid's function with and without
its Cython (`torchreid.reid.metrics.rank`). Slow ones rank a tenth of the queries and are scaled up.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dml_fast.eval import rank_distances, rank_features, rank_hamming, rerank
from dml_fast.eval.tiles import Tiling

QUERIES, GALLERY, DIMS, PEOPLE = 3_368, 15_913, 512, 751
Contestant = Callable[["Data"], Any]


class Data:
    """Features, codes and distances of an evaluation of Market-1501's size."""

    def __init__(self, queries: int, gallery: int, matrix: bool = True) -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((PEOPLE, DIMS), np.float32)
        shift = 0.7 * rng.standard_normal(DIMS, np.float32)
        self.q_pids = rng.integers(1, PEOPLE, queries)
        self.g_pids = np.zeros(gallery, np.int64)  # the distractors' identity is 0
        people = rng.permutation(min(gallery, GALLERY))[: int(0.8 * min(gallery, GALLERY))]
        self.g_pids[people] = rng.integers(1, PEOPLE, len(people))
        self.q_cams, self.g_cams = rng.integers(0, 6, queries), rng.integers(0, 6, gallery)

        def features(pids: Any) -> Any:
            x = rng.standard_normal((len(pids), DIMS), np.float32)
            x *= np.where(pids == 0, 1.9, 1.6)[:, None]
            x += shift + np.where((pids == 0)[:, None], 0, centres[pids])
            return np.maximum(x, 0, out=x)  # after a ReLU, as most features are

        self.q, self.g = features(self.q_pids), features(self.g_pids)
        self.q_codes, self.g_codes = (
            np.packbits(x[:, :64] > 0.7, axis=1) for x in (self.q, self.g)
        )
        unit = [torch.nn.functional.normalize(torch.from_numpy(x)) for x in (self.q, self.g)]
        if matrix:
            self.dist = (1 - unit[0] @ unit[1].T).numpy()
        self.halves = [x.bfloat16() for x in unit]
        self.out = torch.empty(queries, gallery if matrix else 0)

    @property
    def labels(self) -> tuple[Any, Any, Any, Any]:
        return self.q_pids, self.g_pids, self.q_cams, self.g_cams


def read_once(data: Data) -> None:
    """The limit for a given matrix."""
    torch.from_numpy(data.dist).amax()


def ours_distances(data: Data) -> float:
    return rank_distances(data.dist, *data.labels).mAP


def numpy_argsort(data: Data) -> float:
    """As the peers' Python code: sort each row, drop what is not valid, walk the hits."""
    aps = []
    for row, pid, cam in zip(data.dist, data.q_pids, data.q_cams, strict=True):
        order = np.argsort(row, kind="stable")
        keep = (data.g_pids[order] != pid) | (data.g_cams[order] != cam)
        hits = np.flatnonzero(data.g_pids[order][keep] == pid) + 1
        if len(hits):
            aps.append(np.mean(np.arange(1, len(hits) + 1) / hits))
    return float(np.mean(aps))


def torchmetrics_map(data: Data) -> float:
    module = importlib.import_module("torchmetrics.functional.retrieval")
    aps = []
    for row, pid, cam in zip(data.dist, data.q_pids, data.q_cams, strict=True):
        keep = (data.g_pids != pid) | (data.g_cams != cam)
        match = torch.from_numpy(data.g_pids[keep] == pid)
        if match.any():
            scores = torch.from_numpy(2 - row[keep])  # it drops scores of 0 and less
            aps.append(module.retrieval_average_precision(scores, match))
    return float(torch.stack(aps).mean())


def torchreid_python(data: Data) -> float:
    rank = importlib.import_module("torchreid.reid.metrics.rank")
    return float(rank.eval_market1501(data.dist, *data.labels, 50)[1])


def torchreid_cython(data: Data) -> float:
    rank = importlib.import_module("torchreid.reid.metrics.rank_cylib.rank_cy")
    ids = [x.astype(np.int64) for x in data.labels]
    return float(rank.evaluate_cy(data.dist, *ids, 50)[1])


def mm_float32(data: Data) -> None:
    """The limit for features."""
    torch.mm(torch.from_numpy(data.q), torch.from_numpy(data.g).T, out=data.out)


def mm_bfloat16(data: Data) -> None:
    torch.mm(data.halves[0], data.halves[1].T)


def ours_features(data: Data) -> float:
    return rank_features(data.q, data.g, *data.labels).mAP


def ours_features_float32(data: Data) -> float:
    return rank_features(data.q, data.g, *data.labels, tiling=Tiling(bf16=False)).mAP


def ours_hamming(data: Data) -> float:
    return rank_hamming(data.q_codes, data.g_codes, *data.labels).mAP


def ours_rerank(data: Data) -> float:
    return rerank(data.q, data.g, *data.labels).mAP


GROUPS: dict[str, list[Contestant]] = {
    "distances": [
        read_once,
        ours_distances,
        numpy_argsort,
        torchmetrics_map,
        torchreid_python,
        torchreid_cython,
    ],
    "features": [mm_float32, mm_bfloat16, ours_features, ours_features_float32],
    "hamming": [ours_hamming],
    "rerank": [ours_rerank],
}
SLOW = [numpy_argsort, torchmetrics_map, torchreid_python, torchreid_cython]
NEEDS = {
    torchmetrics_map: "torchmetrics",
    torchreid_python: "torchreid.reid.metrics.rank",
    torchreid_cython: "torchreid.reid.metrics.rank_cylib.rank_cy",
}


def installed(contestant: Contestant) -> bool:
    try:
        importlib.import_module(NEEDS.get(contestant, "numpy"))
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def tenth() -> Data:
    return Data(QUERIES // 10, GALLERY)


@pytest.mark.parametrize(
    "contestant", [c for group in GROUPS.values() for c in group], ids=lambda c: c.__name__
)
def bench_ranking(benchmark: Any, tenth: Data, contestant: Contestant) -> None:
    """A tenth of Market-1501's queries against its whole gallery."""
    if not installed(contestant):
        pytest.skip(f"{NEEDS[contestant]} is not installed")
    benchmark.group = next(name for name, group in GROUPS.items() if contestant in group)
    if contestant in (read_once, ours_distances):
        benchmark.extra_info["bytes"] = tenth.dist.nbytes  # each distance read once
    if contestant in SLOW:
        assert contestant(tenth) == pytest.approx(ours_distances(tenth), abs=1e-6)
    rounds = 1 if contestant in (*SLOW, ours_rerank) else 5
    benchmark.pedantic(contestant, (tenth,), rounds=rounds)


def extra_mib(call: Callable[[], object]) -> float:
    """How far memory rises above what was in use before; NaN where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kib(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    try:
        reset.write_text("5")  # the high water mark starts anew
    except OSError:
        return float("nan")
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024


def compare(group: str, data: Data, few: Data | None, rounds: int) -> None:
    """Print medians of contestants that take turns."""
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for round_ in range(rounds):
        for contestant in GROUPS[group]:
            slow = contestant in SLOW
            if (slow and (round_ or few is None)) or not installed(contestant):
                continue
            subject = few if slow and few is not None else data
            name = contestant.__name__
            if not round_ and not slow:  # warm up, and see how much memory it takes
                memory[name] = extra_mib(lambda c=contestant: c(data))  # type: ignore[misc]
            start = time.perf_counter()
            contestant(subject)
            scale = len(data.q_pids) / len(subject.q_pids)
            times.setdefault(name, []).append(scale * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    limit = medians[next(iter(medians))]
    print(f"\n{group}")
    for name, seconds in medians.items():
        fastest = 1e3 * min(times[name])
        extra = f"{memory[name]:9.0f} MiB" if name in memory else ""
        print(
            f"  {name:24}{1e3 * seconds:11.1f} ms (fastest {fastest:9.1f}), "
            f"{seconds / limit:8.2f} times the first {extra}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gallery", type=int, default=GALLERY)
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {QUERIES} queries")
    if args.gallery > GALLERY:
        data = Data(QUERIES, args.gallery, matrix=False)
        for name, call in {"bfloat16": ours_features, "float32": ours_features_float32}.items():
            start = time.perf_counter()
            extra = extra_mib(lambda call=call: call(data))  # type: ignore[misc]
            seconds = time.perf_counter() - start
            print(f"  {args.gallery} items, {name}: {seconds:.2f} s, {extra:.0f} MiB")
        return
    data, few = Data(QUERIES, GALLERY), Data(QUERIES // 10, GALLERY)
    for group in [args.only] if args.only else ["distances", "features", "hamming"]:
        compare(group, data, few, args.rounds)


if __name__ == "__main__":
    main()
