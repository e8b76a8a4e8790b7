"""Open the loader of a data set: its order, its plan, and the loader that executes them."""

from __future__ import annotations

import torch

from dml_fast.data.files import ImageFiles
from dml_fast.data.loaders.assemble import Assembler, Loader
from dml_fast.data.loaders.resident import ResidentLoader
from dml_fast.data.loaders.stream import StreamLoader
from dml_fast.data.loaders.vectors import VectorLoader
from dml_fast.data.plan import Augmentation, Plan
from dml_fast.data.sampling import WINDOW, IdentityOrder, Order, ShardOrder, ShuffledOrder
from dml_fast.data.sets import DataSet, ImageSet
from dml_fast.data.vectors import VectorSet
from dml_fast.errors import check_whole


def train_loader(
    data: DataSet,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    channels_last: bool = True,
    num_instances: int = 0,
    views: int = 1,
    students: int = 1,
    threads: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Loader:
    """Open the training rows as shuffled batches, images augmented.

    Every epoch has an order of its own, cut into whole batches (see `dml_fast.data.sampling`).

    Args:
        data: a data set with N training rows.
        augmentation: what is done to images; unused for vectors.
        batch_size: B, the rows in a batch of this process, 1..N.
        seed: the run's seed, which order and augmentation depend on.
        device: where batches are made.
        channels_last: whether images are channels-last in memory, otherwise contiguous.
        num_instances: 0, or K: each batch has K images of each of B / K labels.
        views: V, the number of versions of each image.
        students: K, the number of students that read vectors, each its own view.
        threads: how many threads augment a batch on a CPU; 0 for one per core.
        rank: the rank of this process, 0..ranks-1.
        ranks: how many processes share a step.

    Returns:
        The loader; see `TrainBatch` for what it yields.

    Raises:
        UserError: ``batch_size`` or ``num_instances`` does not fit the images, or a number is
            out of range.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("num_instances", num_instances, 0)
    check_whole("views", views, 1)
    check_whole("students", students, 1)
    check_whole("threads", threads, 0)
    train, together = data.train, batch_size * ranks
    order: Order
    if num_instances:
        order = IdentityOrder(train.labels, together, num_instances, seed)
    elif isinstance(train, ImageSet) and train.shard is not None:
        order = ShardOrder(train.shard, together, seed, WINDOW)
    else:
        order = ShuffledOrder(len(train), together, seed)
    if isinstance(train, VectorSet):
        return VectorLoader(train, order, device=device, students=students, rank=rank, ranks=ranks)
    height, width = train.images.shape[2:]
    plan = Plan(
        order,
        augmentation,
        size=(height, width),
        seed=seed,
        views=views,
        rank=rank,
        ranks=ranks,
    )
    assemble = Assembler(
        train.labels,
        len(data.classes),
        augmentation,
        mean=data.mean,
        std=data.std,
        device=device,
        channels_last=channels_last,
        threads=threads,
    )
    if isinstance(train.images, ImageFiles):
        return StreamLoader(train.images, train.labels, plan, assemble, batch_size)
    return ResidentLoader(train.images, plan, assemble)
