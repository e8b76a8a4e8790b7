"""Options that mean nothing together, or with some kind of data. Nothing here imports torch."""

from __future__ import annotations

import logging

from dml_fast.config.checks_steps import check_steps
from dml_fast.config.fields import Options, flag, names_in
from dml_fast.errors import UserError
from dml_fast.models.inputs import Kind

_IMAGES = ("image_size", "augment_policy", "random_erasing", "color_jitter", "mixup", "cutmix",
           "crop")  # fmt: skip
_FILES = ("loader", "skip_corrupt")
_LABELS = ("labels", "labels_per_class", "prior", "class_weights", "balance")
_SEARCHES = ("triplet_weight", "triplet_margin", "num_instances", "val_protocol")
_PAIRS = ("patch", "search", "dither", "symmetrise", "offsets")
_HASH = ("bits", "mihash_weight", "mihash_bins", "mihash_scale")

_log = logging.getLogger("dml_fast")


def check_combinations(config: Options, *, retrieval: bool, kind: Kind) -> None:
    """Refuse options that mean nothing for this kind of data, or together.

    Args:
        config: the options, each within its bounds.
        retrieval: whether the students learn identities.
        kind: of what they read.

    Raises:
        UserError: it names the option, its value and what to do.
    """
    _check_retrieval(config, retrieval)
    _check_head(config, retrieval, kind)
    _check_small_loss(config)
    check_steps(config)
    _check_averages(config)
    _check_frequencies(config)
    _check_teachers(config)
    _check_labels(config, retrieval, kind)
    _check_kind(config, kind)


def _check_retrieval(config: Options, retrieval: bool) -> None:
    if not retrieval:
        for name in _SEARCHES:
            if getattr(config, name) != getattr(Options, name):
                raise UserError(
                    f"{flag(name)} means nothing with --data {config.data}, which has no "
                    "identities: leave it out, or give market1501:DIR"
                )
    elif config.num_instances < 0 or (
        config.num_instances and config.batch_size % config.num_instances
    ):
        raise UserError(
            f"--num-instances is {config.num_instances} and --batch-size {config.batch_size}: a "
            "batch holds that many images of each of its identities, so give a divisor of it, "
            "or 0"
        )
    elif config.triplet_weight and config.num_instances in (0, 1):
        raise UserError(
            f"--triplet-weight {config.triplet_weight} needs several images of an identity in a "
            f"batch and --num-instances is {config.num_instances}: give 2 or more"
        )
    elif config.triplet_weight and (config.mixup or config.cutmix):
        raise UserError(
            f"--triplet-weight {config.triplet_weight} compares identities, and --mixup and "
            "--cutmix blend them: leave out one or the other"
        )


def _check_head(config: Options, retrieval: bool, kind: Kind) -> None:
    if config.head == "linear" and retrieval:
        raise UserError(
            f"--head linear gives no embeddings, by which --data {config.data} is ranked: give "
            "bnneck or hash, or leave it out"
        )
    if config.head not in ("auto", "linear") and kind == "pair":
        raise UserError(
            f"--head {config.head} means nothing with --data {config.data}, whose classes are "
            "displacements: leave it out"
        )
    if config.head == "bnneck" and kind == "vector":
        raise UserError(
            f"--head bnneck means nothing with --data {config.data}, which has no images: leave it "
            "out, or give --head hash"
        )
    if config.head != "hash":
        _refuse(config, _HASH, f"without --head hash (--head is {config.head})")
        return
    from dml_fast.models.heads import check_bits

    check_bits(config.bits, "--bits")
    if not config.mihash_weight:
        return
    if config.mihash_bins > config.bits:
        raise UserError(
            f"--mihash-bins is {config.mihash_bins} and --bits {config.bits}: there are no more "
            "distances than bits, so give at most that many bins"
        )
    if config.mihash_bins <= 8 and config.bits >= 32:
        _log.warning(
            "--mihash-bins %d is few for %d bits: runs differ much with 8 bins, give 16",
            config.mihash_bins,
            config.bits,
        )
    for name, why in (
        ("mixup", "blends them"),
        ("cutmix", "blends them"),
        ("triplet_weight", "does so too"),
    ):
        if value := getattr(config, name):
            raise UserError(
                f"--mihash-weight {config.mihash_weight:g} compares rows by their classes, and "
                f"{flag(name)} {value:g} {why}: leave out one or the other"
            )


def _check_labels(config: Options, retrieval: bool, kind: Kind) -> None:
    where = f"with --data {config.data}"
    if retrieval or kind == "pair":
        what = "identities are not classes" if retrieval else "classes are displacements"
        names = _LABELS if retrieval else (*_LABELS, "label_noise", "small_loss")
        # auto becomes 0 in config.json, which --resume reads
        share = ("unlabelled_share",) if config.unlabelled_share else ()
        _refuse(config, (*names, *share), f"{where}, whose {what}")


def _check_kind(config: Options, kind: Kind) -> None:
    where = f"with --data {config.data}"
    if kind != "image":
        has = "no images" if kind == "vector" else "pairs of images"
        _refuse(config, (*_IMAGES, *_FILES), f"{where}, which has {has}")
        if config.views == "per-student":
            raise UserError(
                f"--views per-student means nothing {where}, which is not augmented: leave it out"
                + (", or give --views levels" if kind == "vector" else "")
            )
    if kind == "pair":
        _refuse(config, ("augment",), f"{where}, whose crops are what there is to learn")
    else:
        _refuse(config, _PAIRS, f"{where}, but only with pairs:FILE.npz")
    if kind != "vector":
        _refuse(
            config,
            ("classes", "levels"),
            f"{where}, but only with text:FILE.tsv and vectors:FILE.npz",
        )
        if config.views == "levels":
            raise UserError(
                f"--views levels means nothing {where}: give text:FILE.tsv or "
                "vectors:FILE.npz, or --views per-student"
            )
    if config.data.partition(":")[0] != "text":
        _refuse(config, ("dim",), f"{where}, but only with text:FILE.tsv")
    if config.levels and config.views != "levels":
        raise UserError(f"--levels is {config.levels!r} without --views levels: add that")
    for name in ("classes", "levels"):
        if len(set(found := names_in(getattr(config, name)))) < len(found) or "" in found:
            raise UserError(
                f"{flag(name)} is {getattr(config, name)!r}: give different names, as in a,b,c"
            )


def _check_averages(config: Options) -> None:
    if config.ema == "off":
        for name in ("weights", "teach_with"):
            if getattr(config, name) == "ema":
                raise UserError(f"{flag(name)} is ema without averages: give --ema 0.999")
    if config.teach_with == "ema":
        for name, needed in (("method", "dml"), ("update", "simultaneous"), ("teachers", "")):
            if (value := getattr(config, name)) != needed:
                remedy = f"give {needed}" if needed else "leave it out"
                raise UserError(
                    f"--teach-with ema means nothing with {flag(name)} {value}: {remedy}, or leave "
                    "out --teach-with"
                )


def _check_teachers(config: Options) -> None:
    if config.teachers and config.method in ("independent", "distill"):
        why = "does not teach" if config.method == "independent" else "has a teacher of its own"
        raise UserError(
            f"--teachers means nothing with --method {config.method}, which {why}: give dml, or "
            "leave it out"
        )
    if "" in names_in(config.teachers):
        raise UserError(f"--teachers is {config.teachers!r}: give runs, as in RUN,RUN:0")


def _check_frequencies(config: Options) -> None:
    """Refuse to make up twice for classes that are rare."""
    for option, on, what in (
        ("--prior balance", config.prior == "balance", "corrects shares of classes"),
        ("--class-weights auto", config.class_weights == "auto", "makes rare classes count more"),
    ):
        if config.balance and on:
            raise UserError(
                f"{option} {what}, and with --balance no class is rare: leave out one or the other"
            )
    if config.prior == "balance" and config.class_weights == "auto":
        raise UserError(
            "--prior balance and --class-weights auto both make up for rare classes: leave out one"
        )


def _check_small_loss(config: Options) -> None:
    if not config.small_loss:
        return
    if config.class_weights:
        raise UserError(
            f"--small-loss is {config.small_loss} and compares losses, which --class-weights "
            f"{config.class_weights} multiplies: leave out one or the other"
        )
    for name, wrong, why, remedy in (
        (
            "method",
            "independent",
            "whose students decide nothing together",
            "dml, with --kl-weight 0",
        ),
        ("method", "dml_e", "which differs from dml in the loss that is shown", "dml"),
        ("update", "alternating", "where students see different predictions", "simultaneous"),
    ):
        if getattr(config, name) == wrong:
            raise UserError(
                f"--small-loss means nothing with {flag(name)} {wrong}, {why}: give {remedy}"
            )
    compares = "would still compare the rows that are left out"
    weights = {
        "--mixup": (config.mixup, "blends labels"),
        "--cutmix": (config.cutmix, "blends labels"),
        "--triplet-weight": (config.triplet_weight, compares),
        "--mihash-weight": (config.mihash_weight if config.head == "hash" else 0.0, compares),
    }
    for option, (value, why) in weights.items():
        if value:
            raise UserError(
                f"--small-loss is {config.small_loss} and {option} {value} {why}: leave out "
                "one or the other"
            )


def _refuse(config: Options, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(config, name) != getattr(Options, name):
            raise UserError(f"{flag(name)} means nothing {why}: leave it out")
