"""The options of a training run, in the groups of ``--help``: names, types, defaults and texts.

Nothing here imports torch, so that ``--help`` and messages about arguments appear at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dml_fast.cli import Alone
from dml_fast.config.types import (
    BelowOneEach,
    Count,
    CountOrZero,
    DecayOrOff,
    NonNegative,
    NonNegativeOrAuto,
    NumberEach,
    Positive,
    PositiveOrOff,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    ShareBelowOneOrAuto,
    ThreadsOrZero,
)

Method = Literal["dml", "dml_e", "independent", "distill"]


@dataclass(frozen=True)
class Usual:
    """What most runs need."""

    cohort: int = 0
    """Number of students K (0: one for each name in --arch, at least 2)."""
    arch: str = ""
    """One architecture, or one per student (resnet32,mobilenet_v1); docs/training.md lists all. (Default: resnet32; text and vectors: mlp_64; pairs: displacement_16.)"""
    pretrained: str = ""
    """Initial weights: timm (those published for timm:NAME), a run, or a file of weights. The classifier is always new."""
    init_from: str = ""
    """Start from the students of a run (their best epoch), RUN, or all from its student k, RUN:k. The classifier is kept if the classes are the same."""
    data: str = "digits"
    """digits (embedded), cifar10:DIR, cifar100:DIR, folder:DIR with train/CLASS/*.jpg|png and optionally val/ and test/ (with labels.csv: images with several labels), shards:DIR or shards:URL (WebDataset: train-{000..009}.tar, also val and test), market1501:DIR (re-identification), text:FILE.tsv, vectors:FILE.npz, or pairs:FILE.npz (registration)."""
    download: bool = False
    """Download CIFAR to its DIR if it is not there."""
    image_size: str = ""
    """Size of the images of folder, shards and market1501. 0: unchanged. 64: shorter side resized, centre cropped. 128x64: resized to this height and width. (Default: 0; market1501: 128x64.)"""
    method: Method = "dml"
    """dml: students teach each other. dml_e: their mean teaches (same gradient, different loss shown). independent: no teaching. distill: the first is trained alone, then teaches the others."""
    kl_weight: NonNegative = 1.0
    """Weight of the mutual (KL) term."""
    epochs: Count = 15
    """Passes over the training images (distill: for the teacher, and again for the others)."""
    batch_size: Count = 64
    """Images per step, of all processes together."""
    optimizer: str = "auto"
    """sgd (with Nesterov momentum), adamw, or one per student (sgd,adamw). auto: sgd; adamw for market1501."""
    lr: NumberEach = 0.0
    """Peak learning rate (0: 0.1 for sgd, 0.001 for adamw), or one per student (0.1,0.05)."""
    weight_decay: NumberEach = 5e-4
    """Weight decay of all parameters (but see --no-decay), or one per student."""
    augment: bool = True
    """Crop images at random; flip them where the data allows it."""
    amp: bool = False
    """Mixed precision: bf16, or fp16 with a loss scaler per student where a GPU lacks bf16."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    seed: Seed = 0
    """All random numbers follow from it."""
    out: str = ""
    """Folder of the run (default: runs/ and a name made from data, method, seed and time)."""


@dataclass(frozen=True)
class Teaching:
    """How students teach one another."""

    update: Literal["simultaneous", "alternating"] = "simultaneous"
    """simultaneous: all students learn from one snapshot of predictions. alternating: one after the other, each learning from new predictions (Algorithm 1 of the paper); slower."""
    kl_warmup: NonNegativeOrAuto = "auto"
    """Epochs over which the weight grows linearly from 0 to --kl-weight. auto: 0; 30 % of the epochs where rows have no label."""
    temperature: Positive = 1.0
    """Softmax temperature T of the mutual term, which is scaled by T squared."""
    peer_reduction: Literal["mean", "sum"] = "mean"
    """mean: average the KL over the peers (the paper). sum: add it up (the authors' code)."""
    teachers: str = ""
    """Finished runs whose students teach beside the peers and do not learn: RUN or RUN:k, several with commas. --cohort 1 distils them into one student."""
    ema: DecayOrOff = "off"
    """Keep a moving average of each student's weights with this decay, such as 0.999 (--weights ema: validation measures it)."""
    teach_with: Literal["student", "ema"] = "student"
    """ema: students hear their peers' averages (--ema) in place of the peers themselves (Ge et al. 2020)."""
    label_smoothing: ShareBelowOne = 0.0
    """Label smoothing of the cross-entropy, below 1."""
    small_loss: ShareBelowOne = 0.0
    """Share of the labelled rows of each batch that are left out: those with the largest joint loss, which wrong labels have (JoCoR, Wei et al. 2020)."""
    prior: Literal["none", "balance"] = "none"
    """balance: the logarithm of each class's share of the training labels is added to the logits in training, so that rare classes count as much (logit adjustment)."""


@dataclass(frozen=True)
class Heads:
    """What follows a student's features, and losses on features."""

    head: Literal["auto", "linear", "bnneck", "hash"] = "auto"
    """What follows a student's features. linear: a classifier. bnneck: batch normalisation and a classifier. hash: codes of --bits and a classifier of them. auto: linear; bnneck for market1501."""
    bits: Count = 32
    """Bits of each student's codes (--head hash), at most 65472."""
    mihash_weight: NonNegative = 1.0
    """Weight of the mutual information between distance and class (MIHash; --head hash; 0: off)."""
    mihash_bins: Count = 16
    """Bins of MIHash's histograms of distances, at most --bits."""
    mihash_scale: Positive = 1.0
    """Steepness of the tanh by which MIHash relaxes a bit."""
    triplet_weight: NonNegative = 0.0
    """Weight of the batch-hard triplet loss on the embeddings (market1501)."""
    triplet_margin: NonNegative = 0.3
    """Margin of the triplet loss, in units of the embeddings' Euclidean distance."""


@dataclass(frozen=True)
class Data:
    """Which rows are read, which have labels, and how batches are made."""

    val_fraction: float = 0.1
    """Share of the training images (market1501: identities) set aside for validation, where there is no val. With market1501, 0 validates on the test images."""
    val_protocol: Literal["market1501", "cuhk03", "all"] = "market1501"
    """Whose rules validation of market1501 follows. cuhk03: one gallery image per identity. all: cameras do not matter."""
    train_fraction: ShareAboveZero = 1.0
    """Share of the remaining training images to train on."""
    label_noise: ShareBelowOne = 0.0
    """Share of the training labels to replace by wrong ones."""
    labels: str = ""
    """File of training labels, name<TAB>class in each line; all other training rows lose their label."""
    labels_per_class: CountOrZero = 0
    """Labels of each class that are kept; all others are hidden (0: keep all)."""
    unlabelled_share: ShareBelowOneOrAuto = "auto"
    """Share of each batch that has no label and teaches by the mutual term alone (0: such rows are left out). auto: 0.67 where rows have no label."""
    class_weights: str = ""
    """Weights of the classes in the cross-entropy: auto (inverse to their number of labels), or a file, class<TAB>weight in each line."""
    balance: bool = False
    """Draw labelled rows so that all classes come equally often."""
    classes: str = ""
    """Names of all classes of text and vectors, a,b,c (default: those of the labels)."""
    levels: str = ""
    """Views of text (args,pairs,edges or words,chars) or of vectors (names of its arrays x_NAME) for --views levels (default: all)."""
    dim: Count = 200
    """Most dimensions of each view's features of text."""
    patch: Count = 24
    """Height and width of the crops of pairs, in pixels."""
    search: Count = 8
    """Largest displacement of pairs that students tell, in pixels, in each direction."""
    dither: NonNegative = 0.0
    """Deviation, in pixels, of the random displacement over which the targets of pairs are averaged: about the bias of the pairs' errors (0: off)."""
    symmetrise: bool = True
    """Flip both images of a pair at random, so that errors of the pairs' alignment average out."""
    offsets: str = ""
    """File of known displacements of pairs, name<TAB>rows<TAB>columns in each line, as dml_fast.register writes it; other pairs are left out."""
    num_instances: int = 4
    """Images of each identity in a batch (market1501; 0: any images, shuffled)."""
    skip_corrupt: bool = False
    """Skip, count and list images that cannot be decoded, instead of stopping."""
    loader: Literal["auto", "resident", "dali", "fallback"] = "auto"
    """How folder, shards and market1501 are read. resident: all into memory. dali: decoded as needed by NVIDIA DALI, on the GPU if there is one. fallback: decoded as needed by threads. auto: resident if they fit."""
    data_threads: ThreadsOrZero = 0
    """Threads that decode images (0: one per core)."""


@dataclass(frozen=True)
class Augmentation:
    """How images are changed at random."""

    crop: Literal["auto", "pad", "resized"] = "auto"
    """pad: shift the image. resized: resize a random part of it to --image-size, as usual on ImageNet. auto: resized for folder and shards with --image-size 128 or more."""
    augment_policy: Literal["none", "trivial"] = "none"
    """trivial: one random operation of random strength on each image (TrivialAugment, Müller & Hutter 2021)."""
    random_erasing: Share = 0.0
    """Probability that a rectangle of an image is erased (Zhong et al. 2020)."""
    color_jitter: Share = 0.0
    """Largest relative change of brightness, contrast and saturation, such as 0.4."""
    mixup: NonNegative = 0.0
    """Alpha of mixup (Zhang et al. 2018): pairs of images and their labels are blended."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix (Yun et al. 2019). With --mixup, each batch gets one of them."""
    views: Literal["shared", "per-student", "levels"] = "shared"
    """per-student: each student sees its own augmentation of the same images. levels: each student reads its own view of text or vectors, see --levels."""


@dataclass(frozen=True)
class Optimization:
    """Steps and updates."""

    schedule: Literal["cosine", "paper", "constant"] = "cosine"
    """cosine: falls to 0. paper: divided by 10 after 30, 60 and 90 % of the epochs."""
    warmup: NonNegative = 1.0
    """Epochs over which the learning rate grows linearly to its peak."""
    momentum: BelowOneEach = 0.9
    """Momentum of sgd, or one per student."""
    no_decay: str = ""
    """Parameters without weight decay: norm (those of normalisation layers), bias, or norm,bias."""
    clip_norm: PositiveOrOff = "off"
    """Largest norm of each student's gradient; longer ones are shortened to it."""
    accumulate: Count = 1
    """Parts into which each batch is divided to save memory: gradients add up over them, and the update is that of the whole batch. BatchNorm sees each part alone."""
    epoch_steps: CountOrZero = 0
    """Steps of an epoch, for which images come round as often as needed (0: one pass over them)."""
    patience: CountOrZero = 0
    """End the run after this many epochs without a better validation score (0: never)."""
    max_steps: CountOrZero = 0
    """Stop after this many steps of the run, with exit code 0; --resume continues (0: no limit). The schedule stays that of --epochs."""
    max_time: str = ""
    """Stop this command after this time (90m, 2h, 45s), with exit code 0; --resume continues."""


@dataclass(frozen=True)
class Devices:
    """Where and how fast the students are run."""

    amp_dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """Type that --amp uses. fp16 needs a GPU."""
    channels_last: bool = True
    """Keep images and convolutions in channels-last memory order."""
    executor: Literal["auto", "sequential", "threads", "streams", "graph"] = "auto"
    """How the students are run. sequential: one after the other. threads: side by side on a CPU. streams, graph: side by side on a GPU, launched by the host or as one CUDA graph per step. auto: the fastest in a short trial, recorded in config.json."""
    compile: Annotated[Literal["off", "student", "cohort"], Alone("student")] = "off"
    """Compile with torch.compile, which takes about a minute at the start. student (or --compile alone): each; those of one architecture share the result. cohort: all as one function."""
    mesh: str = ""
    """COHORTxDATA processes under torchrun: COHORT rows divide the students, DATA columns divide each batch (default: as many rows as divide the students equally)."""
    shares: str = ""
    """Number of students in each row of the mesh (3,1), or measured: by the time that a step of each takes (default: equal)."""
    fsdp: bool = False
    """Shard each student's weights, gradients and optimizer over its row of the mesh (FSDP2); otherwise each rank has a copy (DDP)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend of torch.distributed. auto: nccl on GPUs, else gloo."""


@dataclass(frozen=True)
class Records:
    """What is saved and shown."""

    weights: Literal["student", "ema"] = "student"
    """Weights that validation measures, and by which best.pt is chosen. ema: the averages of --ema."""
    save_every: str = ""
    """Also save within epochs, after this many steps (200) or seconds (60s)."""
    log_every: Count = 20
    """Steps between two readings of the metrics from the device."""
    log: str = ""
    """Log each epoch to tensorboard, wandb, mlflow or csv as well; several with commas."""
    max_skipped: Count = 25
    """Stop when a student has skipped this many updates in a row because of non-finite gradients."""


@dataclass(frozen=True)
class Options(Records, Devices, Optimization, Augmentation, Data, Heads, Teaching, Usual):
    """All options, without what follows from them."""


GROUPS = (Usual, Teaching, Heads, Data, Augmentation, Optimization, Devices, Records)
"""The groups in the order of ``--help``."""


def flag(name: str) -> str:
    """Return the command line's name of a field: ``kl_weight`` is ``--kl-weight``."""
    return "--" + name.replace("_", "-")


def names_in(text: str) -> tuple[str, ...]:
    """Return the names of a list with commas; none of an empty text."""
    return tuple(name.strip() for name in text.split(",")) if text else ()
