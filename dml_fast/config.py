"""The configuration of a training run: a frozen dataclass, from which the command line is made.

Nothing here imports torch, so that ``--help`` and messages about arguments appear at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
)

from dml_fast.errors import UserError, brief, check_choice, check_number
from dml_fast.machine import MOST_THREADS

Method = Literal["dml", "dml_e", "independent", "distill"]


class Bounds(NamedTuple):
    """Which values a number may take, as metadata of a field's type.

    Attributes:
        words: what an error message asks for.
        allow: whether a value is within the bounds; false for NaN.
    """

    words: str
    allow: Callable[[float], bool]


Count: TypeAlias = Annotated[int, Bounds("a whole number of at least 1", lambda x: x >= 1)]
ThreadsOrZero: TypeAlias = Annotated[
    int, Bounds(f"a whole number from 0 to {MOST_THREADS}", lambda x: 0 <= x <= MOST_THREADS)
]
Seed: TypeAlias = Annotated[
    int, Bounds("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)
]
Positive: TypeAlias = Annotated[float, Bounds("a number above 0", lambda x: 0 < x < inf)]
NonNegative: TypeAlias = Annotated[
    float, Bounds("a finite number, 0 or more", lambda x: 0 <= x < inf)
]
Share: TypeAlias = Annotated[float, Bounds("a number from 0 to 1", lambda x: 0 <= x <= 1)]
ShareBelowOne: TypeAlias = Annotated[
    float, Bounds("a number from 0 to below 1", lambda x: 0 <= x < 1)
]
ShareAboveZero: TypeAlias = Annotated[
    float, Bounds("a number above 0, at most 1", lambda x: 0 < x <= 1)
]


@dataclass(frozen=True)
class TrainConfig:
    """Train a cohort of networks that teach each other (Deep Mutual Learning, CVPR 2018)."""

    cohort: int = 0
    """Number of students K (0: one for each name in --arch, at least 2)."""
    arch: str = ""
    """One architecture, or one per student (resnet32,mobilenet_v1); docs/engine.md lists all. (Default: resnet32; mlp_64 for text and vectors.)"""
    pretrained: str = ""
    """Initial weights: timm (those published for timm:NAME), a run, or a file of weights. The classifier is always new."""
    method: Method = "dml"
    """dml: students teach each other. dml_e: their mean teaches (same gradient, different loss shown). independent: no teaching. distill: the first is trained alone, then teaches the others."""
    update: Literal["simultaneous", "alternating"] = "simultaneous"
    """simultaneous: all students learn from one snapshot of predictions. alternating: one after the other, each learning from new predictions (Algorithm 1 of the paper); slower."""
    kl_weight: NonNegative = 1.0
    """Weight of the mutual (KL) term."""
    kl_warmup: NonNegative = 0.0
    """Epochs over which the weight grows linearly from 0 to --kl-weight."""
    temperature: Positive = 1.0
    """Softmax temperature T of the mutual term, which is scaled by T squared."""
    peer_reduction: Literal["mean", "sum"] = "mean"
    """mean: average the KL over the peers (the paper). sum: add it up (the authors' code)."""
    label_smoothing: ShareBelowOne = 0.0
    """Label smoothing of the cross-entropy, below 1."""
    triplet_weight: NonNegative = 0.0
    """Weight of the batch-hard triplet loss on the embeddings (market1501)."""
    triplet_margin: NonNegative = 0.3
    """Margin of the triplet loss, in units of the embeddings' Euclidean distance."""

    data: str = "digits"
    """digits (embedded), cifar10:DIR, cifar100:DIR, folder:DIR with train/CLASS/*.jpg|png and optionally val/ and test/, shards:DIR or shards:URL (WebDataset: train-{000..009}.tar, also val and test), or market1501:DIR (re-identification)."""
    download: bool = False
    """Download CIFAR to its DIR if it is not there."""
    image_size: str = ""
    """Size of the images of folder, shards and market1501. 0: unchanged. 64: shorter side resized, centre cropped. 128x64: resized to this height and width. (Default: 0; market1501: 128x64.)"""
    val_fraction: float = 0.1
    """Share of the training images (market1501: identities) set aside for validation, where there is no val. With market1501, 0 validates on the test images."""
    val_protocol: Literal["market1501", "cuhk03", "all"] = "market1501"
    """Whose rules validation of market1501 follows. cuhk03: one gallery image per identity. all: cameras do not matter."""
    train_fraction: ShareAboveZero = 1.0
    """Share of the remaining training images to train on."""
    label_noise: ShareBelowOne = 0.0
    """Share of the training labels to replace by wrong ones."""
    augment: bool = True
    """Crop images at random; flip them where the data allows it."""
    random_erasing: Share = 0.0
    """Probability that a rectangle of an image is erased (Zhong et al. 2020)."""
    color_jitter: Share = 0.0
    """Largest relative change of brightness, contrast and saturation, such as 0.4."""
    mixup: NonNegative = 0.0
    """Alpha of mixup (Zhang et al. 2018): pairs of images and their labels are blended."""
    cutmix: NonNegative = 0.0
    """Alpha of CutMix (Yun et al. 2019). With --mixup, each batch gets one of them."""
    crop: Literal["auto", "pad", "resized"] = "auto"
    """pad: shift the image. resized: resize a random part of it to --image-size, as usual on ImageNet. auto: resized for folder and shards with --image-size 128 or more."""
    views: Literal["shared", "per-student"] = "shared"
    """per-student: each student sees its own augmentation of the same images."""
    num_instances: int = 4
    """Images of each identity in a batch (market1501; 0: any images, shuffled)."""
    skip_corrupt: bool = False
    """Skip, count and list images that cannot be decoded, instead of stopping."""
    loader: Literal["auto", "resident", "dali", "fallback"] = "auto"
    """How folder, shards and market1501 are read. resident: all into memory. dali: decoded as needed by NVIDIA DALI, on the GPU if there is one. fallback: decoded as needed by threads. auto: resident if they fit."""
    data_threads: ThreadsOrZero = 0
    """Threads that decode images (0: one per core)."""

    epochs: Count = 15
    """Passes over the training images (distill: for the teacher, and again for the others)."""
    batch_size: Count = 64
    """Images per step, of all processes together."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """sgd has Nesterov momentum. auto: sgd; adamw for market1501."""
    lr: NonNegative = 0.0
    """Peak learning rate (0: 0.1 for sgd, 0.001 for adamw)."""
    momentum: ShareBelowOne = 0.9
    """Momentum of sgd."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of all parameters."""
    schedule: Literal["cosine", "paper", "constant"] = "cosine"
    """cosine: falls to 0. paper: divided by 10 after 30, 60 and 90 % of the epochs."""
    warmup: NonNegative = 1.0
    """Epochs over which the learning rate grows linearly to its peak."""

    amp: bool = False
    """Mixed precision: bf16, or fp16 with a loss scaler per student where a GPU lacks bf16."""
    amp_dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """Type that --amp uses. fp16 needs a GPU."""
    channels_last: bool = True
    """Keep images and convolutions in channels-last memory order."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""
    executor: Literal["auto", "sequential", "threads", "streams", "graph"] = "auto"
    """How the students are run. sequential: one after the other. threads: side by side on a CPU. streams, graph: side by side on a GPU, launched by the host or as one CUDA graph per step. auto: the fastest in a short trial, recorded in config.json."""
    mesh: str = ""
    """COHORTxDATA processes under torchrun: COHORT rows divide the students, DATA columns divide each batch (default: as many rows as divide the students equally)."""
    shares: str = ""
    """Number of students in each row of the mesh (3,1), or measured: by the time that a step of each takes (default: equal)."""
    fsdp: bool = False
    """Shard each student's weights, gradients and optimizer over its row of the mesh (FSDP2); otherwise each rank has a copy (DDP)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Backend of torch.distributed. auto: nccl on GPUs, else gloo."""
    compile: bool = False
    """Compile each student with torch.compile, which takes about a minute at the start; students of one architecture share the result."""
    seed: Seed = 0
    """All random numbers follow from it."""

    out: str = ""
    """Folder of the run (default: runs/ and a name made from data, method, seed and time)."""
    save_every: str = ""
    """Also save within epochs, after this many steps (200) or seconds (60s)."""
    log_every: Count = 20
    """Steps between two readings of the metrics from the device."""
    max_skipped: Count = 25
    """Stop when a student has skipped this many updates in a row because of non-finite gradients."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """The architecture of each student, length K."""
        from dml_fast.models.registry import DEFAULTS

        arch = self.arch or DEFAULTS[self.input_kind]
        names = tuple(name.strip() for name in arch.split(","))
        if len(names) > 1:
            return names
        return names * (self.cohort or 2)

    @property
    def input_kind(self) -> Literal["image", "vector"]:
        """What the students read."""
        return "vector" if self.data.startswith(("text:", "vectors:")) else "image"

    @property
    def peak_lr(self) -> float:
        """The learning rate at the top of the schedule."""
        return self.lr or {"sgd": 0.1, "adamw": 1e-3}[self.algorithm]

    @property
    def algorithm(self) -> str:
        """The optimizer with ``auto`` resolved: sgd or adamw."""
        if self.optimizer == "auto":
            return "adamw" if self.retrieval else "sgd"
        return self.optimizer

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run: distillation trains the teacher first and then the others."""
        return self.epochs * (2 if self.method == "distill" else 1)

    @property
    def save_interval(self) -> tuple[int, float]:
        """``save_every`` as (steps, seconds); 0 means never."""
        if not self.save_every:
            return 0, 0.0
        match = re.fullmatch(r"(\d+(?:\.\d+)?)s|(\d+)", self.save_every)
        if not match or float(match[1] or match[2]) <= 0:
            raise UserError(
                f"--save-every is {self.save_every!r}: give steps (200) or seconds (60s)"
            )
        return (0, float(match[1])) if match[1] else (int(match[2]), 0.0)

    @property
    def retrieval(self) -> bool:
        """Whether the students learn to find images of one identity, and not to classify."""
        return self.data.partition(":")[0] == "market1501"

    @property
    def camera_rule(self) -> bool:
        """Whether validation counts matches by other cameras only."""
        return self.val_protocol != "all"

    @property
    def data_options(self) -> dict[str, Any]:
        """Arguments of `dml_fast.data.open_dataset`, without ``data`` and ``download``."""
        return {
            "val_fraction": self.val_fraction,
            "camera_rule": self.camera_rule,
            "train_fraction": self.train_fraction,
            "label_noise": self.label_noise,
            "seed": self.seed,
            "skip_corrupt": self.skip_corrupt,
            "loader": self.loader,
            "image_size": self._image_size,
            "resized": self.resized_crop,
            "threads": self.data_threads,
        }

    @property
    def resized_crop(self) -> bool:
        """Whether images are cropped as usual on ImageNet: see ``crop``."""
        if self.crop != "auto":
            return self.crop == "resized"
        size = self._image_size
        return (
            self.data.startswith(("folder:", "shards:")) and isinstance(size, int) and size >= 128
        )

    @property
    def _image_size(self) -> int | tuple[int, int]:
        size = self.image_size or ("128x64" if self.retrieval else "0")
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size)
        if not match or (match[2] and not int(match[1]) * int(match[2])):
            raise UserError(
                f"--image-size is {self.image_size!r}: give pixels (64), or height x width (128x64)"
            )
        return (int(match[1]), int(match[2])) if match[2] else int(match[1])

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: it names the option, its value and what to do.
        """
        from dml_fast.data import check_data_spec, check_searches
        from dml_fast.models import check_model_name
        from dml_fast.models.pretrained import check_pretrained

        self.check_numbers()
        if not 0 <= self.cohort < 10_000:
            raise UserError(f"--cohort is {self.cohort}: give a number of students, such as 2")
        names = self.architectures
        if self.cohort not in (0, len(names)):
            raise UserError(
                f"--cohort is {self.cohort} but --arch names {len(names)} ({self.arch}): "
                "give one name, or one per student"
            )
        if len(names) < 2 and self.method != "independent":
            raise UserError(
                f"--cohort is {len(names)} but --method {self.method} needs at least 2 students: "
                "give --cohort 2, or --method independent"
            )
        for name in names:
            check_model_name(name, self.input_kind)
        if self.pretrained:
            check_pretrained(self.pretrained, names)
        self._check_retrieval()
        if self.update == "alternating" and self.method not in ("dml", "dml_e"):
            raise UserError(
                f"--update alternating means nothing with --method {self.method}: leave it out"
            )
        if self.tensorboard:
            _require("tensorboard", "--tensorboard", "log")
        check_data_spec(self.data, download=self.download)
        if self.retrieval:
            check_searches(self.data, val_fraction=self.val_fraction, camera_rule=self.camera_rule)

    def check_numbers(self) -> None:
        """Refuse values of another type, numbers out of bounds, and names that do not exist.

        Raises:
            UserError: it names the option, its value and what may be given.
        """
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                check_choice(flag(name), value, get_args(hint))
                continue
            for bounds in getattr(hint, "__metadata__", ()):
                check_number(flag(name), value, bounds.words, bounds.allow)
            kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            fits = isinstance(value, int | float) if kind is float else type(value) is kind
            if not fits:
                raise UserError(
                    f"{flag(name)} is {brief(value)}: give a value of type {kind.__name__}"
                )
        validates_on_test = self.retrieval and self.val_fraction == 0
        if not (0 < self.val_fraction < 1 or validates_on_test):
            raise UserError(f"--val-fraction is {self.val_fraction}: give a number between 0 and 1")
        _ = self.save_interval, self._image_size  # these raise too

    def _check_retrieval(self) -> None:
        if not self.retrieval:
            for name in ("triplet_weight", "triplet_margin", "num_instances", "val_protocol"):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise UserError(
                        f"{flag(name)} means nothing with --data {self.data}, which has no "
                        "identities: leave it out, or give market1501:DIR"
                    )
        elif self.num_instances < 0 or (
            self.num_instances and self.batch_size % self.num_instances
        ):
            raise UserError(
                f"--num-instances is {self.num_instances} and --batch-size {self.batch_size}: a "
                "batch holds that many images of each of its identities, so give a divisor of it, or 0"
            )
        elif self.triplet_weight and self.num_instances in (0, 1):
            raise UserError(
                f"--triplet-weight {self.triplet_weight} needs several images of an identity in a "
                f"batch and --num-instances is {self.num_instances}: give 2 or more"
            )
        elif self.triplet_weight and (self.mixup or self.cutmix):
            raise UserError(
                f"--triplet-weight {self.triplet_weight} compares identities, and --mixup and "
                "--cutmix blend them: leave out one or the other"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, in types that JSON has."""
        return asdict(self)


def flag(name: str) -> str:
    """Return the command line's name of a field: ``kl_weight`` is ``--kl-weight``."""
    return "--" + name.replace("_", "-")


def _require(module: str, option: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise UserError(f"{option} needs {module}: pip install 'dml_fast[{extra}]'")
