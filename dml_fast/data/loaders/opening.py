"""Open the loader of a data set: its order, its plan, and the loader that executes them."""

from __future__ import annotations

import logging
import math

import torch

from dml_fast.data.balanced import order_of_rows
from dml_fast.data.files import ImageFiles
from dml_fast.data.labelled import LabelledOrder, check_share
from dml_fast.data.loaders.assemble import Assembler, Loader
from dml_fast.data.loaders.pairs import PairLoader
from dml_fast.data.loaders.resident import ResidentLoader
from dml_fast.data.loaders.stream import StreamLoader
from dml_fast.data.loaders.vectors import VectorLoader
from dml_fast.data.pairs import PairSet
from dml_fast.data.plan import Augmentation, Plan
from dml_fast.data.sampling import IdentityOrder, Order, Regrouped
from dml_fast.data.sets import DataSet, ImageSet
from dml_fast.data.splits import kinds_of_rows
from dml_fast.data.vectors import VectorSet
from dml_fast.errors import UserError, check_number, check_whole

logger = logging.getLogger(__name__)


def train_loader(
    data: DataSet,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    channels_last: bool = True,
    num_instances: int = 0,
    unlabelled_share: float = 0.67,
    epoch_steps: int = 0,
    balance: bool = False,
    dither: float = 0.0,
    symmetrise: bool = True,
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
        augmentation: what is done to images; unused for vectors and pairs.
        batch_size: B, the rows in a batch of this process, 1..N.
        seed: the run's seed, which order and augmentation depend on.
        device: where batches are made.
        channels_last: whether images are channels-last in memory, otherwise contiguous.
        num_instances: 0, or K: each batch has K images of each of B / K labels.
        unlabelled_share: the share of a batch that has no label, in [0, 1), where some rows have
            none (`dml_fast.data.labelled.LabelledOrder`).
        epoch_steps: the number of batches per epoch, for which rows come round as often as needed;
            0 for one pass.
        balance: whether all classes are equally frequent (`dml_fast.data.balanced.BalancedOrder`).
        dither: the deviation of the targets of pairs, in pixels; 0 for one class.
        symmetrise: whether the crops of pairs are flipped at random.
        views: V, the number of versions of each image.
        students: K, the number of students that read vectors, each its own view.
        threads: how many threads augment a batch on a CPU; 0 for one per core.
        rank: the rank of this process, 0..ranks-1.
        ranks: how many processes share a step.

    Returns:
        The loader; see `TrainBatch` for what it yields.

    Raises:
        UserError: ``batch_size``, ``num_instances`` or ``unlabelled_share`` does not fit the rows,
            mixing meets rows without a label, ``balance`` rows of identities or pairs, a policy
            images that are neither gray nor RGB, or a number is out of range.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("num_instances", num_instances, 0)
    check_whole("epoch_steps", epoch_steps, 0)
    check_share(unlabelled_share)
    check_whole("views", views, 1)
    check_whole("students", students, 1)
    check_whole("threads", threads, 0)
    check_number("dither", dither, "a finite number, 0 or more", lambda x: 0 <= x < math.inf)
    train, together = data.train, batch_size * ranks
    shards = train.shard if isinstance(train, ImageSet) else None
    unlabelled = int((train.labels < 0).sum())
    if balance and (num_instances or isinstance(train, PairSet)):
        what = "pairs have no classes" if not num_instances else "identities are equally frequent"
        raise UserError(f"balance is on and {what}: leave it out")
    if data.several_labels and (balance or num_instances):
        name = "balance" if balance else "num_instances"
        raise UserError(
            f"{name} makes batches by class, and rows may have several labels: leave it out"
        )
    order: Order
    if num_instances:
        if unlabelled:
            raise UserError(
                f"num_instances is {num_instances} and {unlabelled} training rows "
                "have no label: give num_instances=0, or a label to each row"
            )
        order = IdentityOrder(train.labels, together, num_instances, seed)
        order = Regrouped(order, epoch_steps) if epoch_steps else order
    elif unlabelled:
        if augmentation.mixup or augmentation.cutmix:
            raise UserError(
                f"mixup and cutmix blend labels and {unlabelled} training rows have "
                "none: leave out --mixup and --cutmix, or give --unlabelled-share 0"
            )
        order = LabelledOrder(
            train.labels,
            together,
            unlabelled_share,
            seed,
            epoch_steps,
            ranks,
            shards=shards,
            balance=balance,
        )
    else:
        order = order_of_rows(
            train.labels, together, seed, steps=epoch_steps, shards=shards, balance=balance
        )
    if isinstance(train, VectorSet):
        return VectorLoader(train, order, device=device, students=students, rank=rank, ranks=ranks)
    if isinstance(train, PairSet):
        return PairLoader(
            train,
            order,
            seed=seed,
            device=device,
            dither=dither,
            symmetrise=symmetrise,
            rank=rank,
            ranks=ranks,
        )
    channels, height, width = train.images.shape[1:]
    if augmentation.policy != "none" and channels not in (1, 3):
        raise UserError(
            f"policy is {augmentation.policy} and images have {channels} channels, where it knows "
            "gray and RGB: give none"
        )
    if augmentation.policy != "none" and min(height, width) < 32:
        logger.info(
            "policy: moves are of up to 32 pixels, which leaves nothing of many images of %dx%d",
            height,
            width,
        )
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
        size=(height, width),
        mean=data.mean,
        std=data.std,
        device=device,
        channels_last=channels_last,
        threads=threads,
    )
    if isinstance(train.images, ImageFiles):
        return StreamLoader(train.images, kinds_of_rows(train.labels), plan, assemble, batch_size)
    return ResidentLoader(train.images, plan, assemble)
