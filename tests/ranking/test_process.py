"""What only whole processes show: Ctrl-C, memory, and no torch where none is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dml_fast.eval import rank_distances, rank_features, rank_hamming

pytestmark = pytest.mark.slow

WORK = """
import sys
import numpy as np
from dml_fast.eval import SingleShot, rank_distances, rank_features, rank_hamming, rerank
rng = np.random.default_rng(0)

def labels(queries, items, people=50):
    zeros, ones = np.zeros(queries, int), np.ones(items, int)
    return np.arange(queries) % people, np.arange(items) % people, zeros, ones

def distances():
    rank_distances(rng.random((2_000, 5_000)), *labels(2_000, 5_000), protocol=SingleShot(50_000))

def draws():  # each query takes hours
    rank_distances(rng.random((2, 4_000)), *labels(2, 4_000, 4_000), protocol=SingleShot(10**9))

def all_draws():  # each of a query's thousand matches takes seconds
    pids, ones = np.minimum(np.arange(6_000), 5_000), np.ones(6_000, int)
    rank_distances(np.ones((2, 6_000)), [5_000] * 2, pids, [0] * 2, ones, protocol="cuhk03",
                   ties="expected", max_rank=5_000)

def features():
    q, g = (rng.standard_normal((n, 256)).astype(np.float32) for n in (20_000, 40_000))
    rank_features(q, g, *labels(20_000, 40_000))

def hamming():
    q, g = (rng.integers(0, 256, (n, 4096), np.uint8) for n in (20_000, 20_000))
    rank_hamming(q, g, *labels(20_000, 20_000))

def reranking():
    q, g = (rng.standard_normal((n, 64)).astype(np.float32) for n in (2_000, 60_000))
    rerank(q, g, *labels(2_000, 60_000))
"""

INTERRUPTED = (
    WORK
    + """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
threading.Timer(0.1, lambda: print("begun", flush=True)).start()
try:
    while True:
        globals()[sys.argv[1]]()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize(
    "work", ["distances", "draws", "all_draws", "features", "hamming", "reranking"]
)
def test_ctrl_c_ends_the_work_at_once(work: str) -> None:
    """It would last minutes. The limit is generous, since the machine may be busy."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, work],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert output == "interrupted\n" and process.returncode == 0


PEAK = (
    WORK
    + """
def high_water():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

def used():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024

def extra(call):
    before = used()
    open("/proc/self/clear_refs", "w").write("5")  # high water from here on
    call()
    return high_water() - before

Q, G = 1_000, 16_000
who = labels(Q, G, 750)
if sys.argv[1] == "distances":
    dist = rng.random((Q, G), dtype=np.float32)
    rank_distances(dist[:16, :500], *[x[:16] if len(x) == Q else x[:500] for x in who])
    print(extra(lambda: rank_distances(dist, *who)))
else:
    q, g = (rng.standard_normal((n, 512)).astype(np.float32) for n in (Q, G))
    small = [x[:64] if len(x) == Q else x[:3000] for x in who]
    rank_features(q[:64], g[:3000], *small)  # what torch needs anyway
    print(extra(lambda: rank_features(q, g, *who)))
"""
)


@pytest.mark.parametrize(("work", "most_mib"), [("distances", 8), ("features", 64)])
def test_extra_memory_is_bounded(work: str, most_mib: float) -> None:
    """The matrix of distances alone would have 61 MiB in one case and is 61 MiB in the other."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs to measure a peak with")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, work],
        capture_output=True,
        text=True,
        env={**environment(), "DML_FAST_THREADS": "2"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= most_mib


def test_ranking_distances_does_not_import_torch() -> None:
    code = (
        "import sys; from dml_fast.eval import rank_distances, rank_hamming\n"
        "rank_distances([[1.0]], [1], [1], [0], [1])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


GIL = (
    WORK
    + """
import threading, time
worker = threading.Thread(target=globals()[sys.argv[1]], daemon=True)
worker.start()
time.sleep(0.3)  # until it is in C++ for good: this thread would wait for as long
turns = 0
while worker.is_alive() and turns < 20:
    time.sleep(0.01)
    turns += 1
print(turns, flush=True)
import os
os._exit(0)
"""
)


@pytest.mark.parametrize("work", ["distances", "features", "hamming", "reranking"])
def test_other_threads_run_meanwhile(work: str) -> None:
    """Each of these takes seconds, most of them in one call of C++."""
    run = subprocess.run(
        [sys.executable, "-c", GIL, work],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=True,
    )
    assert int(run.stdout) == 20


def test_more_pairs_than_32_bits_count() -> None:
    """2.2e9 distances in memory that is never written to, except for the last row."""
    queries, items = 70_000, 31_000
    dist = np.zeros((queries, items), np.float32)
    dist[-1] = 1
    dist[-1, 5] = 0.5
    pids = np.full(queries, 7)
    pids[-1] = 1
    labels = (pids, np.arange(items) == 5, np.zeros(queries, int), np.ones(items, int))
    result = rank_distances(dist, labels[0], labels[1].astype(int), *labels[2:], topk=0)
    assert (result.n_valid, result.first_rank[-1], result.n_tied) == (1, 1, 0)
    codes = np.zeros((items, 1), np.uint8)
    codes[5] = 255
    few = np.zeros((queries, 1), np.uint8)
    few[-1] = 254
    result = rank_hamming(few, codes, labels[0], labels[1].astype(int), *labels[2:])
    assert (result.n_valid, result.first_rank[-1]) == (1, 1)


def test_more_pairs_of_features_than_32_bits_count() -> None:
    queries, items = 70_000, 31_000
    q, g = np.ones((queries, 1), np.float32), np.zeros((items, 1), np.float32)
    g[[3, 9]] = [[1.5], [2]]
    q[-1] = 2
    pids = np.full(queries, 7)
    pids[-1] = 1
    g_pids = (np.arange(items) == 9).astype(int)
    result = rank_features(q, g, pids, g_pids, metric="euclidean", protocol="all")
    assert (result.n_valid, result.first_rank[-1]) == (1, 1)
