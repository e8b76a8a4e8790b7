"""The C++ extension (csrc/). An array of another type or layout raises TypeError.

Arguments from ``query_identity`` to ``junk`` are the fields of `dml_fast.ranking.labels.Labels`.
The scores' columns are named in `dml_fast.ranking.result`. Ctrl-C interrupts every function.
"""

import collections.abc
from typing import SupportsFloat, SupportsIndex, SupportsInt

import numpy as np
from numpy.typing import NDArray

def average_precision(ranks: NDArray[np.int64]) -> tuple[float, float, float]:
    """Score one query from the ranks of its positives.

    Args:
        ranks: (P,) int64, C-contiguous: the ranks of the query's P positives among its valid
            gallery items, counted from 1 and strictly rising.

    Returns:
        ``(ap, ap_trapezoid, inp)``, each in (0, 1]. ``ap`` is the mean of the precision at each
        positive. ``ap_trapezoid`` is the area under the precision-recall curve by the trapezoid
        rule, as in the official Market-1501 code (Zheng et al., ICCV 2015). ``inp`` is
        P / rank of the last positive (Ye et al., TPAMI 2021).

    Raises:
        TypeError: ``ranks`` is not int64 or not C-contiguous (it is never copied silently).
        ValueError: ``ranks`` is empty, not 1-D, not strictly rising, or below 1.
    """

def augment(
    images: NDArray[np.uint8],
    rows: NDArray[np.int64],
    crops: NDArray[np.int64],
    erased: NDArray[np.int64],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    pad: SupportsInt | SupportsIndex,
    threads: SupportsInt | SupportsIndex,
) -> NDArray[np.float32]:
    """Crop, mirror, normalise and erase: (B, H, W, C), the same bits as `loaders.augment.augment`.

    Args:
        images: (N, H, W, C).
        rows: (B,) which of them.
        crops: (3, B): top and left in the padded image, 0..2 pad, and 1 where mirrored.
        erased: (4, B): top, left, height and width of what is blanked; (4, 0) for nothing.
        scale: (C,), then ``shift`` (C,): a pixel becomes ``pixel * scale + shift``.
        shift: (C,).
        pad: pixels on each side, which become 0.
        threads: at most that many.

    Raises:
        ValueError: shapes do not fit together, or a number points outside the images.
    """

def resize_parts(
    images: list[NDArray[np.uint8]],
    boxes: NDArray[np.int64],
    height: SupportsInt | SupportsIndex,
    width: SupportsInt | SupportsIndex,
    threads: SupportsInt | SupportsIndex,
) -> NDArray[np.uint8]:
    """Resize boxes (V, 4, B) of B RGB images (h, w, 3), bilinear and antialiased: (V, B, H, W, 3).

    A box is top, left, height and width, not empty and inside its image (or ValueError).
    """

def instruction_set() -> str:
    """Name the instruction set in use: ``baseline``, ``avx2`` or ``avx512``.

    It is the highest that this machine supports, or what the environment variable
    ``DML_FAST_ISA`` asks for; ValueError if that is not supported here.
    """

def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 faster than float32."""

# fmt: off
def mutual_loss(
    logits: collections.abc.Sequence[SupportsInt | SupportsIndex],
    rows: SupportsInt | SupportsIndex, classes: SupportsInt | SupportsIndex, bf16: bool,
    students: SupportsInt | SupportsIndex, index: SupportsInt | SupportsIndex,
    ignored: SupportsInt | SupportsIndex | None, soft: SupportsInt | SupportsIndex,
    best: SupportsInt | SupportsIndex, class_weight: SupportsInt | SupportsIndex,
    row_weight: SupportsInt | SupportsIndex, smoothing: SupportsFloat | SupportsIndex,
    temperature: SupportsFloat | SupportsIndex, peer_mean: bool,
    kl_weight: SupportsFloat | SupportsIndex,
    factors: collections.abc.Sequence[SupportsFloat | SupportsIndex],
    grad_scale: collections.abc.Sequence[SupportsFloat | SupportsIndex],
    grads: collections.abc.Sequence[SupportsInt | SupportsIndex], float_grads: bool,
    means: collections.abc.Sequence[SupportsInt | SupportsIndex],
    correct: SupportsInt | SupportsIndex, finite: SupportsInt | SupportsIndex,
    each_row: SupportsInt | SupportsIndex, threads: SupportsInt | SupportsIndex, labels: bool,
    divergence: SupportsInt | SupportsIndex, beta: SupportsFloat | SupportsIndex,
    labelled_rows: bool,
) -> None:
# fmt: on
    """Compute the mutual loss; the arguments are those of `dml_fast.loss.native`.

    K students, L >= K distributions (then teachers), N rows, C classes. Arrays are the addresses of
    their first items and C-contiguous, 0 is none; the caller answers for shapes and dtypes.
    ``logits`` are L of (N, C), float32 or all bfloat16. ``index`` is (N,) int64, none with ``soft``
    (N, C) and ``best`` (N,) int64, the most probable class of each row; with ``labels``, ``soft``
    has labels that do not exclude each other, and ``best`` is none. These and the weights (C,) and
    (N,) are float32. ``factors`` multiply cross-entropy and divergence: two in losses and
    gradients, such as 1 / N, and two in the means. Below two ``threads`` the calling thread works.

    It overwrites ``grads``, K of (N, C), float32 or like the logits, or an empty list; ``means``,
    three of (K,) float32: losses, cross-entropies and divergences; ``correct`` (K,) int64 rows;
    ``finite`` (K,) bool, whether all were usable; and ``each_row``, (2, K, N) float32 terms. A
    ValueError says that numbers do not fit together, or that a class is out of range.
    """

def rank_rows_f32(
    dist: NDArray[np.float32],
    query_identity: NDArray[np.int64],
    item_identity: NDArray[np.int64],
    query_camera: NDArray[np.int64],
    item_camera: NDArray[np.int64],
    member_offsets: NDArray[np.int64],
    members: NDArray[np.int64],
    junk: NDArray[np.int64],
    ties: SupportsInt | SupportsIndex,
    max_rank: SupportsInt | SupportsIndex,
    topk: SupportsInt | SupportsIndex,
    repeats: SupportsInt | SupportsIndex,
    seed: SupportsInt | SupportsIndex,
    threads: SupportsInt | SupportsIndex,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], int]:
    """Score queries from their rows of distances (Q, G).

    ``ties`` is 0..3 as in `dml_fast.ranking.protocol.TIES`; ``repeats`` the draws of the
    single-gallery-shot CMC, 0 for the mean over all, -1 for the plain CMC.

    Returns:
        ``scores`` (Q, 8), NaN without a valid positive; ``first_at`` and ``hits_at``
        (chunks of 16 queries, max_rank), how many first positives and positives have each rank;
        ``topk`` (Q, topk); the number of NaNs in the rows of the scored queries.
    """

def rank_rows_f64(
    dist: NDArray[np.float64],
    query_identity: NDArray[np.int64],
    item_identity: NDArray[np.int64],
    query_camera: NDArray[np.int64],
    item_camera: NDArray[np.int64],
    member_offsets: NDArray[np.int64],
    members: NDArray[np.int64],
    junk: NDArray[np.int64],
    ties: SupportsInt | SupportsIndex,
    max_rank: SupportsInt | SupportsIndex,
    topk: SupportsInt | SupportsIndex,
    repeats: SupportsInt | SupportsIndex,
    seed: SupportsInt | SupportsIndex,
    threads: SupportsInt | SupportsIndex,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], int]:
    """As rank_rows_f32, compared in float64."""

def rank_codes(
    queries: NDArray[np.uint64],
    gallery: NDArray[np.uint64],
    query_identity: NDArray[np.int64],
    item_identity: NDArray[np.int64],
    query_camera: NDArray[np.int64],
    item_camera: NDArray[np.int64],
    member_offsets: NDArray[np.int64],
    members: NDArray[np.int64],
    junk: NDArray[np.int64],
    ties: SupportsInt | SupportsIndex,
    max_rank: SupportsInt | SupportsIndex,
    topk: SupportsInt | SupportsIndex,
    repeats: SupportsInt | SupportsIndex,
    seed: SupportsInt | SupportsIndex,
    threads: SupportsInt | SupportsIndex,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], int]:
    """As rank_rows_f32, by the bits in which codes (Q, words) and (G, words) differ; no junk."""

def reduce_rows(
    dist: NDArray[np.float64],
    query_identity: NDArray[np.int64],
    item_identity: NDArray[np.int64],
    query_camera: NDArray[np.int64],
    item_camera: NDArray[np.int64],
    member_offsets: NDArray[np.int64],
    members: NDArray[np.int64],
    junk: NDArray[np.int64],
    query_offsets: NDArray[np.int64],
    query_members: NDArray[np.int64],
    item_offsets: NDArray[np.int64],
    item_members: NDArray[np.int64],
    reduction: SupportsInt | SupportsIndex,
    temperature: SupportsFloat | SupportsIndex,
    threads: SupportsInt | SupportsIndex,
) -> NDArray[np.float64]:
    """Reduce distances of images to distances of sets, (query sets, gallery sets).

    A set's images are ``members[offsets[s]:offsets[s + 1]]``. ``reduction`` is 0..2 as in
    `dml_fast.ranking.sets.REDUCTIONS`. Pairs of images that the labels exclude do not count; the
    result is NaN where no pair is left.
    """

class FeaturesF32:
    """Rank Q queries and G items with D features each: csrc/features.hpp says how.

    ``query_norms`` and ``item_norms`` are squared. ``start`` chooses queries. Then
    ``query_operands_*`` and, for each part of the gallery in turn, ``panel_operands_*`` write what
    is to be multiplied to ``out``, (rows, D), with bfloat16 as the bits of int16. ``loose`` says
    that products of float32 may round it to bfloat16. ``count_*`` takes a tile of these
    products, whose first row is query number ``query`` and whose first column is item ``item``, and
    returns how many pairs it had to decide exactly; threads may call it at the same time for
    different queries. ``finish`` returns what rank_rows_f32 does, for the started queries.
    ``neighbours`` returns the topk nearest of these and the largest number of each instead.
    ``exact_rows`` returns float64 numbers that grow with the distance, for queries begin..end-1.
    """

    def __init__(
        self,
        queries: NDArray[np.float32],
        gallery: NDArray[np.float32],
        cosine: bool,
        query_identity: NDArray[np.int64],
        item_identity: NDArray[np.int64],
        query_camera: NDArray[np.int64],
        item_camera: NDArray[np.int64],
        member_offsets: NDArray[np.int64],
        members: NDArray[np.int64],
        junk: NDArray[np.int64],
        topk: SupportsInt | SupportsIndex,
        farthest: bool,
        threads: SupportsInt | SupportsIndex,
    ) -> None: ...
    def query_norms(self) -> NDArray[np.float64]: ...
    def item_norms(self) -> NDArray[np.float64]: ...
    def start(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
    ) -> None: ...
    def query_operands_f32(self, out: NDArray[np.float32], loose: bool) -> None: ...
    def query_operands_bf16(self, out: NDArray[np.int16], loose: bool) -> None: ...
    def panel_operands_f32(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
        out: NDArray[np.float32],
        loose: bool,
    ) -> None: ...
    def panel_operands_bf16(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
        out: NDArray[np.int16],
        loose: bool,
    ) -> None: ...
    def count_f32(
        self,
        tile: NDArray[np.float32],
        query: SupportsInt | SupportsIndex,
        item: SupportsInt | SupportsIndex,
    ) -> int: ...
    def count_bf16(
        self,
        tile: NDArray[np.int16],
        query: SupportsInt | SupportsIndex,
        item: SupportsInt | SupportsIndex,
    ) -> int: ...
    def finish(
        self,
        ties: SupportsInt | SupportsIndex,
        max_rank: SupportsInt | SupportsIndex,
    ) -> tuple[
        NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], int
    ]: ...
    def neighbours(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
    def exact_rows(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
    ) -> NDArray[np.float64]: ...

class FeaturesF64:
    """As FeaturesF32, for float64 features."""

    def __init__(
        self,
        queries: NDArray[np.float64],
        gallery: NDArray[np.float64],
        cosine: bool,
        query_identity: NDArray[np.int64],
        item_identity: NDArray[np.int64],
        query_camera: NDArray[np.int64],
        item_camera: NDArray[np.int64],
        member_offsets: NDArray[np.int64],
        members: NDArray[np.int64],
        junk: NDArray[np.int64],
        topk: SupportsInt | SupportsIndex,
        farthest: bool,
        threads: SupportsInt | SupportsIndex,
    ) -> None: ...
    def query_norms(self) -> NDArray[np.float64]: ...
    def item_norms(self) -> NDArray[np.float64]: ...
    def start(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
    ) -> None: ...
    def query_operands_f32(self, out: NDArray[np.float32], loose: bool) -> None: ...
    def query_operands_bf16(self, out: NDArray[np.int16], loose: bool) -> None: ...
    def panel_operands_f32(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
        out: NDArray[np.float32],
        loose: bool,
    ) -> None: ...
    def panel_operands_bf16(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
        out: NDArray[np.int16],
        loose: bool,
    ) -> None: ...
    def count_f32(
        self,
        tile: NDArray[np.float32],
        query: SupportsInt | SupportsIndex,
        item: SupportsInt | SupportsIndex,
    ) -> int: ...
    def count_bf16(
        self,
        tile: NDArray[np.int16],
        query: SupportsInt | SupportsIndex,
        item: SupportsInt | SupportsIndex,
    ) -> int: ...
    def finish(
        self,
        ties: SupportsInt | SupportsIndex,
        max_rank: SupportsInt | SupportsIndex,
    ) -> tuple[
        NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], int
    ]: ...
    def neighbours(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
    def exact_rows(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
    ) -> NDArray[np.float64]: ...

class RerankF32:
    """New distances by k-reciprocal neighbours (csrc/rerank.hpp) of N images, queries first.

    ``nearest`` (N, k1 + 1) and ``farthest`` (N,) are what FeaturesF32.neighbours returns for all
    images as queries and as gallery. ``rows`` returns the distances of the queries begin..end-1
    to all other images than the queries.
    """

    def __init__(
        self,
        images: NDArray[np.float32],
        queries: SupportsInt | SupportsIndex,
        cosine: bool,
        nearest: NDArray[np.int64],
        farthest: NDArray[np.float64],
        k1: SupportsInt | SupportsIndex,
        k2: SupportsInt | SupportsIndex,
        lambda_value: SupportsFloat | SupportsIndex,
        threads: SupportsInt | SupportsIndex,
    ) -> None: ...
    def rows(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
    ) -> NDArray[np.float64]: ...

class RerankF64:
    """As RerankF32, for float64 features."""

    def __init__(
        self,
        images: NDArray[np.float64],
        queries: SupportsInt | SupportsIndex,
        cosine: bool,
        nearest: NDArray[np.int64],
        farthest: NDArray[np.float64],
        k1: SupportsInt | SupportsIndex,
        k2: SupportsInt | SupportsIndex,
        lambda_value: SupportsFloat | SupportsIndex,
        threads: SupportsInt | SupportsIndex,
    ) -> None: ...
    def rows(
        self,
        begin: SupportsInt | SupportsIndex,
        end: SupportsInt | SupportsIndex,
    ) -> NDArray[np.float64]: ...

def smallest_and_largest(
    address: SupportsInt | SupportsIndex, size: SupportsInt | SupportsIndex
) -> tuple[int, int]:
    """Return the bounds of that many int64 at an address, at least one (or ValueError)."""
