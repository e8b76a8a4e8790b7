"""Compare ranking at Market-1501's size, and with 500,000 distractors, with peers and limits.

    pytest benchmarks/bench_ranking.py                       # a tenth of the queries
    python -m benchmarks.bench_ranking [--only GROUP]        # contestants in turns
    python -m benchmarks.bench_ranking --gallery 500000
    ... --json benchmarks/results/ranking_cpu.json           # adds to what the file holds

The features are synthetic: 751 identities, a fifth of the gallery distractors, at about 88 % mAP;
"random" distances are of random features. The limit for a given matrix is to read it once;
for features it is a bare `torch.mm` of the same size, in blocks where the matrix would not fit.
Peers (peers/ranking.py) that are not installed are left out; they rank a tenth of the queries
(a hundredth of a gallery of 500,000), and time and memory are scaled up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads leave us the cores

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common.machine import provenance
from benchmarks.peers.ranking import PEERS, Peer, dense_rerank, installed, torchreid_rerank
from dml_fast.eval import rank_distances, rank_features, rank_hamming, rerank
from dml_fast.ranking.tiles import Tiling

QUERIES, GALLERY, DIMS, PEOPLE = 3_368, 15_913, 512, 751
BLOCK = 16_384  # gallery images that the bare products multiply at a time
Contestant = Callable[["Data"], Any]


class Data:
    """Features, codes and distances of an evaluation: of Market-1501's size, or of a larger one.

    Args:
        queries: how many.
        gallery: how many; those beyond Market-1501's are distractors.
        rows: queries whose distances are computed.
        few: of these, those that slow contestants rank.
    """

    def __init__(self, queries: int, gallery: int, rows: int, few: int) -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((PEOPLE, DIMS), np.float32)
        shift = 0.7 * rng.standard_normal(DIMS, np.float32)
        self.queries, self.rows, self.few = queries, rows, few
        self.q_pids = rng.integers(1, PEOPLE, queries)
        self.g_pids = np.zeros(gallery, np.int64)  # the distractors' identity is 0
        people = rng.permutation(min(gallery, GALLERY))[: int(0.8 * min(gallery, GALLERY))]
        self.g_pids[people] = rng.integers(1, PEOPLE, len(people))
        self.q_cams, self.g_cams = rng.integers(0, 6, queries), rng.integers(0, 6, gallery)

        def features(pids: Any) -> Any:
            x = rng.standard_normal((len(pids), DIMS), np.float32)
            x *= np.where(pids == 0, 1.9, 1.6).astype(np.float32)[:, None]
            x += shift
            known = np.flatnonzero(pids)
            x[known] += centres[pids[known]]
            return np.maximum(x, 0, out=x)  # after a ReLU, as most features are

        self.q, self.g = features(self.q_pids), features(self.g_pids)
        self.q_codes, self.g_codes = (
            np.packbits(x[:, :64] > 0.7, axis=1) for x in (self.q, self.g)
        )
        # What the bare products multiply; the time that these take is not counted.
        self.operands = torch.from_numpy(self.q), torch.from_numpy(self.g)
        self.halves = self.operands[0].bfloat16(), self.operands[1].bfloat16()
        norms = [x.norm(dim=1) for x in self.operands]
        products = self.operands[0][:rows] @ self.operands[1].T
        self.dist = (1 - products.div_(norms[0][:rows, None]).div_(norms[1])).numpy()
        self.random = rng.standard_normal(self.dist.shape, np.float32)

    def labels(self, queries: int) -> tuple[Any, Any, Any, Any]:
        """Of the first queries and the gallery."""
        return self.q_pids[:queries], self.g_pids, self.q_cams[:queries], self.g_cams


def read_once(data: Data) -> None:
    """The limit for a given matrix."""
    torch.from_numpy(data.dist).amax()


def ours_distances(data: Data) -> float:
    return rank_distances(data.dist, *data.labels(data.rows)).mAP


def ours_distances_random(data: Data) -> float:
    """Rank matches that lie anywhere in the gallery: nothing can be skipped."""
    return rank_distances(data.random, *data.labels(data.rows)).mAP


def multiply(q: Tensor, g: Tensor) -> None:
    out = q.new_empty(len(q), min(BLOCK, len(g)))
    for part in g.split(BLOCK):
        torch.mm(q, part.T, out=out if len(part) == out.shape[1] else None)


def mm_float32(data: Data) -> None:
    """The limit for features."""
    multiply(*data.operands)


def mm_bfloat16(data: Data) -> None:
    multiply(*data.halves)


def ours_features(data: Data) -> float:
    return rank_features(data.q, data.g, *data.labels(data.queries)).mAP


def ours_features_float32(data: Data) -> float:
    tiling = Tiling(bf16=False)
    return rank_features(data.q, data.g, *data.labels(data.queries), tiling=tiling).mAP


def ours_hamming(data: Data) -> float:
    return rank_hamming(data.q_codes, data.g_codes, *data.labels(data.queries)).mAP


def ours_rerank(data: Data) -> float:
    return rerank(data.q, data.g, *data.labels(data.queries)).mAP


def rerank_dense(data: Data) -> float:
    return rank_distances(dense_rerank(data.q, data.g), *data.labels(data.queries)).mAP


def rerank_torchreid(data: Data) -> float:
    dist = torchreid_rerank(data.q, data.g)
    return rank_distances(dist, *data.labels(data.queries)).mAP


def of_few(peer: Peer) -> Contestant:
    """The peer on the first rows."""

    def contestant(data: Data) -> float:
        return peer(data.dist[: data.few], *data.labels(data.few))

    contestant.__name__ = peer.__name__
    return contestant


SLOW = {of_few(peer): peer for peer in PEERS}
GROUPS: dict[str, list[Contestant]] = {
    "distances": [read_once, ours_distances, ours_distances_random, *SLOW],
    "features": [mm_float32, mm_bfloat16, ours_features, ours_features_float32],
    "hamming": [ours_hamming],
    "rerank": [ours_rerank, rerank_dense, rerank_torchreid],
}
MINUTES = (rerank_dense, rerank_torchreid)
ONCE = (*SLOW, *MINUTES)
NEEDS = {**SLOW, rerank_torchreid: torchreid_rerank}


@pytest.fixture(scope="module")
def tenth() -> Data:
    return Data(QUERIES // 10, GALLERY, QUERIES // 10, QUERIES // 100)


@pytest.mark.parametrize(
    "contestant", [c for group in GROUPS.values() for c in group], ids=lambda c: c.__name__
)
def bench_ranking(benchmark: Any, tenth: Data, contestant: Contestant) -> None:
    """A tenth of Market-1501's queries against its whole gallery; slow ones a hundredth."""
    if contestant in MINUTES:
        pytest.skip("minutes: tests/ranking/test_reranking.py compares on fewer images")
    if contestant in SLOW and not installed(SLOW[contestant]):
        pytest.skip(f"{contestant.__name__} is not installed")
    benchmark.group = next(name for name, group in GROUPS.items() if contestant in group)
    if contestant in (read_once, ours_distances):
        benchmark.extra_info["bytes"] = tenth.dist.nbytes  # each distance read once
    if contestant in SLOW:
        ours = rank_distances(tenth.dist[: tenth.few], *tenth.labels(tenth.few))
        assert contestant(tenth) == pytest.approx(ours.mAP, abs=1e-6)
    benchmark.pedantic(contestant, (tenth,), rounds=1 if contestant in ONCE else 5)


def extra_mib(call: Callable[[], object]) -> float | None:
    """How far memory rises above what was in use before; None where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kib(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    try:
        reset.write_text("5")  # the high water mark starts anew
    except OSError:
        call()
        return None
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024


def compare(group: str, data: Data, rounds: int) -> dict[str, dict[str, float | None]]:
    """Medians of contestants that take turns, printed and returned."""
    times: dict[str, list[float]] = {}
    memory: dict[str, float | None] = {}
    queries: dict[str, int] = {}
    for round_ in range(rounds):
        for contestant in GROUPS[group]:
            once = contestant in ONCE
            missing = contestant in NEEDS and not installed(NEEDS[contestant])
            if (once and round_) or missing:
                continue
            name = contestant.__name__
            if not round_ and not once:  # warm up, and see how much memory it takes
                memory[name] = extra_mib(lambda c=contestant: c(data))  # type: ignore[misc]
            taken: list[float] = []

            def timed(c: Contestant = contestant, taken: list[float] = taken) -> None:
                start = time.perf_counter()
                c(data)
                taken.append(time.perf_counter() - start)

            time.sleep(0.05)  # threads of the one before may still spin
            if once:
                memory[name] = extra_mib(timed)
            else:
                timed()
            of_rows = data.rows if group == "distances" else data.queries
            queries[name] = data.few if contestant in SLOW else of_rows
            times.setdefault(name, []).append(taken[0] * data.queries / queries[name])
    medians = {name: statistics.median(values) for name, values in times.items()}
    limit = medians[next(iter(medians))]
    fastest = min(times[next(iter(medians))])
    print(f"\n{group}, {len(data.g)} items")
    report: dict[str, dict[str, float | None]] = {}
    for name, seconds in medians.items():
        report[name] = {
            "median_ms": 1e3 * seconds,
            "fastest_ms": 1e3 * min(times[name]),
            "runs": len(times[name]),
            "of_first_median": seconds / limit,
            "of_first_fastest": min(times[name]) / fastest,
            "extra_mib": memory[name],
            "queries_ranked": queries[name],
        }
        extra = "" if memory[name] is None else f"{memory[name]:9.0f} MiB"
        scaled = "" if queries[name] == data.queries else f" ({queries[name]} queries, scaled)"
        print(
            f"  {name:24}{1e3 * seconds:11.1f} ms (fastest {1e3 * min(times[name]):9.1f}), "
            f"{seconds / limit:8.2f} times the first {extra}{scaled}",
            flush=True,
        )
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gallery", type=int, default=GALLERY)
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="add the report to that file")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {QUERIES} queries")
    large = args.gallery > GALLERY
    rows, few = (QUERIES // 10, QUERIES // 100) if large else (QUERIES, QUERIES // 10)
    data = Data(QUERIES, args.gallery, rows, few)
    for group in [args.only] if args.only else ["distances", "features", "hamming"]:
        report = {"group": group, "gallery": args.gallery, "queries": QUERIES, "dims": DIMS}
        results = compare(group, data, args.rounds)
        if args.json:  # each time: a run that is stopped keeps what it has
            held = json.loads(args.json.read_text()) if args.json.exists() else {}
            where = provenance(torch.device("cpu"))
            held[f"{group}-{args.gallery}"] = {**where, **report, "results": results}
            args.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
