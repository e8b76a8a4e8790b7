"""Stratified splits of label arrays, label noise and hidden labels; all functions are pure.

A label of -1 means that a row has none. What is drawn among rows that have one does not depend on
the others.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dml_fast.data.sampling import place_among_equals
from dml_fast.errors import UserError
from dml_fast.rng import numpy_generator

# The validation split does not depend on the run's seed; otherwise runs could not be compared.
_SPLIT_SEED = 20180618

Ids = npt.NDArray[np.int64]


def stratified_sample(labels: Ids, count: int, rng: np.random.Generator) -> Ids:
    """Draw ``count`` of N samples, from each class in proportion to its size.

    The share of a class is rounded down or up (the largest remainders first). At least one sample
    of each class is never drawn, so with very small classes fewer than ``count`` are drawn. With
    the same generator, a smaller sample of a class is a subset of a larger one.

    Args:
        labels: (N,) int64.
        count: how many to draw, 0..N.
        rng: the random generator.

    Returns:
        (<= count,) int64, increasing indices.
    """
    _, sizes = np.unique(labels, return_counts=True)
    shares, remainders = np.divmod(sizes * count, len(labels))
    shares = np.minimum(shares, sizes - 1)
    by_remainder = np.argsort(-remainders, kind="stable")
    roomy = by_remainder[(remainders > 0)[by_remainder] & (shares < sizes - 1)[by_remainder]]
    shares[roomy[: count - int(shares.sum())]] += 1

    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # shuffled within each class
    first_of_class = np.cumsum(sizes) - sizes
    place_in_class = np.arange(len(labels)) - np.repeat(first_of_class, sizes)
    return np.sort(order[place_in_class < np.repeat(shares, sizes)]).astype(np.int64)


def rarest_label(labels: Ids) -> Ids:
    """Return the class by which a row that may have several labels is stratified.

    It is the row's label that fewest rows have, of equals the first: a simple form of iterative
    stratification (Sechidis et al., ECML PKDD 2011), which begins with the rarest label.

    Args:
        labels: (N, C) int64, 0 or 1.

    Returns:
        (N,) int64, C for a row without labels.
    """
    counts = np.append(labels.sum(0), len(labels) + 1)
    whole = np.concatenate([labels, np.ones((len(labels), 1), np.int64)], axis=1)
    found: Ids = np.where(whole == 1, counts, len(labels) + 2).argmin(1).astype(np.int64)
    return found


def kinds_of_rows(labels: Ids) -> Ids:
    """Return (N,) int64, equal where rows have equal labels; (N,) labels as they are."""
    if labels.ndim == 1:
        return labels
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def remaining(total: int, taken: Ids) -> Ids:
    """Return the indices 0..total-1 that are not in ``taken``, increasing."""
    keep = np.ones(total, dtype=bool)
    keep[taken] = False
    return np.flatnonzero(keep).astype(np.int64)


def split_validation(labels: Ids, fraction: float) -> tuple[Ids, Ids]:
    """Split N samples into training and validation samples, always in the same way.

    Args:
        labels: (N,) int64; samples without a label are for training.
        fraction: the fraction of the labelled samples that goes to validation, in (0, 1).

    Returns:
        Indices for training and for validation, both increasing.

    Raises:
        UserError: no sample would go to validation.
    """
    known = np.flatnonzero(labels >= 0)
    count = round(fraction * len(known))
    val = known[stratified_sample(labels[known], count, numpy_generator(_SPLIT_SEED))]
    if len(val) == 0:
        what = "rows" if len(known) == len(labels) else "rows with a label"
        raise UserError(
            f"--val-fraction {fraction} of {len(known)} training {what} leaves none for "
            "validation: raise it, or add rows, or some for validation (val)"
        )
    return remaining(len(labels), val), val


def take_fraction(labels: Ids, fraction: float, seed: int) -> Ids:
    """Draw a stratified fraction of N samples, at least one of each class.

    With the same seed, smaller fractions are subsets of larger ones, up to one sample per class.
    Samples without a label are a class of their own.

    Args:
        labels: (N,) int64.
        fraction: in (0, 1].
        seed: the run's seed.

    Returns:
        (<= N,) int64, increasing indices.
    """
    dropped = []
    for part, stream in ((labels >= 0, ()), (labels < 0, ("unlabelled",))):
        rows = np.flatnonzero(part)
        count = len(rows) - round(fraction * len(rows))
        generator = numpy_generator(seed, "train_fraction", *stream)
        dropped.append(rows[stratified_sample(labels[rows], count, generator)])
    return remaining(len(labels), np.concatenate(dropped))


def hide_labels(labels: Ids, keep: int, seed: int) -> Ids:
    """Return a copy of labels in which each class keeps ``keep`` of them and the others are -1.

    Those of a class that has fewer are all kept. With the same seed, fewer kept labels are some of
    more.

    Args:
        labels: (N,) int64, not changed.
        keep: at least 1.
        seed: the run's seed.
    """
    known = np.flatnonzero(labels >= 0)
    order = known[numpy_generator(seed, "labels_per_class").permutation(len(known))]
    kept = order[place_among_equals(labels[order]) < keep]
    out = np.full_like(labels, -1)
    out[kept] = labels[kept]
    return out


def add_label_noise(labels: Ids, num_classes: int, fraction: float, seed: int) -> Ids:
    """Return a copy of N labels in which exactly ``round(fraction * N)`` are wrong.

    The wrong ones are drawn without replacement. Each becomes one of the other classes, all of them
    equally likely (symmetric noise).

    Args:
        labels: int64, not changed; N of them are not -1.
        num_classes: C.
        fraction: in [0, 1).
        seed: the run's seed.

    Raises:
        UserError: there is only one class.
    """
    if num_classes < 2:
        raise UserError(
            f"--label-noise {fraction} needs at least 2 classes and the data has {num_classes}: "
            "leave it out"
        )
    rng = numpy_generator(seed, "label_noise")
    known = np.flatnonzero(labels >= 0)
    count = round(fraction * len(known))
    wrong = known[rng.choice(len(known), count, replace=False)]
    noisy = labels.copy()
    noisy[wrong] = (noisy[wrong] + rng.integers(1, num_classes, count)) % num_classes
    return noisy


def split_identities(pids: Ids, cams: Ids | None, fraction: float) -> tuple[Ids, Ids, Ids]:
    """Choose identities for validation, always the same ones, and their queries.

    As in the test set of Market-1501, the first image that a camera took of an identity is a query
    if an image by another camera is in the gallery. Without cameras, the first image of an identity
    is a query if it has others. All other images are the gallery.

    Args:
        pids: (N,) identities.
        cams: (N,) cameras; None if they do not matter.
        fraction: the fraction of the identities that is for validation, in [0, 1).

    Returns:
        Increasing indices of the images to learn from, of the queries and of the gallery.

    Raises:
        UserError: no or all identities would be for validation, or none of them has a query.
    """
    known, identity = np.unique(pids, return_inverse=True)
    count = round(fraction * len(known))
    if fraction == 0.0:
        everything = np.arange(len(pids))
        return everything, everything[:0], everything[:0]
    advice = "another --val-fraction, or 0 to validate on the test images"
    if not 0 < count < len(known):
        share = f"{count} of {len(known)} identities"
        raise UserError(f"--val-fraction {fraction} sets {share} aside: give {advice}")
    held_out = numpy_generator(_SPLIT_SEED, "identities").permutation(len(known))[:count]
    aside = np.flatnonzero(np.isin(identity, held_out))
    chosen = _first_images(pids[aside]) if cams is None else _first_views(pids[aside], cams[aside])
    if len(chosen) == 0:
        lack, remedy = "images by two cameras", "--val-protocol all, "
        if cams is None:
            lack, remedy = "two images", ""
        raise UserError(
            f"none of the {count} identities that --val-fraction {fraction} sets aside has "
            f"{lack}, so nothing can be searched for: give {remedy}{advice}"
        )
    queries = aside[chosen]
    learned = np.flatnonzero(~np.isin(identity, held_out))
    return learned, queries, aside[~np.isin(aside, queries)]


def _first_images(pids: Ids) -> Ids:
    """Return the first image of each identity that has others, rising."""
    _, first, counts = np.unique(pids, return_index=True, return_counts=True)
    return np.sort(first[counts > 1])


def _first_views(pids: Ids, cams: Ids) -> Ids:
    """Return the first image by each camera of those identities that others saw, rising."""
    _, first, view = np.unique(
        np.stack([pids, cams]), axis=1, return_index=True, return_inverse=True
    )
    _, views = np.unique(pids[first], return_counts=True)  # cameras of each identity
    spare = np.bincount(view.ravel()) > 1  # whether images of this camera stay in the gallery
    spares = np.add.reduceat(spare.astype(np.int64), np.cumsum(views) - views)
    return np.sort(first[np.repeat(spares, views) > spare])
