"""The configuration of a training run: one frozen dataclass, from which the command line is made.

Nothing here imports torch, so ``--help`` and argument errors answer at once.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dml_fast.errors import UserError

Method = Literal["dml", "dml_e", "independent", "distill"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a cohort of networks that teach each other (Deep Mutual Learning, CVPR 2018)."""

    cohort: int = 0
    """Number of students K (0: one for each name in --arch, and at least 2)."""
    arch: str = "resnet32"
    """One architecture, or one a student (resnet32,mobilenet_v1); see docs/engine.md for all."""
    pretrained: str = ""
    """Weights to start from: timm (those published for timm:NAME), or a .safetensors, .pth or .pt file. The classifier always starts anew."""
    method: Method = "dml"
    """dml: students teach each other. dml_e: their mean teaches (same gradient, other loss shown). independent: no teaching. distill: the first is trained alone, then teaches the others."""
    update: Literal["simultaneous", "alternating"] = "simultaneous"
    """simultaneous: all students learn from one snapshot of predictions. alternating: one after the other, each against refreshed predictions (Algorithm 1 of the paper), slower."""
    kl_weight: float = 1.0
    """Weight of the mutual (KL) term."""
    kl_warmup: float = 0.0
    """Epochs over which the mutual term grows linearly from 0 to --kl-weight."""
    temperature: float = 1.0
    """Softmax temperature T of the mutual term, which is scaled by T squared."""
    peer_reduction: Literal["mean", "sum"] = "mean"
    """mean: average the KL over the peers (the paper). sum: add it up (the authors' code)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, in 0..1."""
    triplet_weight: float = 0.0
    """Weight of the batch-hard triplet loss on the embeddings (market1501)."""
    triplet_margin: float = 0.3
    """Margin of the triplet loss, in units of the embeddings' Euclidean distance."""

    data: str = "digits"
    """digits (embedded), cifar10:DIR, cifar100:DIR, folder:DIR with train/CLASS/*.jpg|png and optionally val/ and test/, shards:DIR or shards:URL (WebDataset: train-{000..009}.tar, also val and test), or market1501:DIR (re-identification)."""
    download: bool = False
    """Fetch CIFAR into its DIR if it is not there."""
    image_size: str = ""
    """Of folder, shards and market1501. 0: as they are. 64: shorter side resized, centre cropped. 128x64: resized to that height and width. (Default: 0; market1501: 128x64.)"""
    val_fraction: float = 0.1
    """Share of the training images set aside to validate (cifar, folders and shards without val), or of the identities (market1501, where 0 validates on the test images)."""
    train_fraction: float = 1.0
    """Share of the remaining training images that is used."""
    label_noise: float = 0.0
    """Share of the training labels that is made wrong on purpose."""
    augment: bool = True
    """Random crops, and flips where the data allows them."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image is erased (Zhong et al. 2020)."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation, such as 0.4."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018): pairs of images and their labels are blended."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019); beside --mixup each batch has one of them."""
    crop: Literal["auto", "pad", "resized"] = "auto"
    """pad: the image, shifted. resized: a random part of it, resized to --image-size as usual on ImageNet. auto: resized for folder and shards with --image-size 128 or more."""
    views: Literal["shared", "per-student"] = "shared"
    """per-student: each student sees its own augmentation of the same images."""
    num_instances: int = 4
    """Images of each identity in a batch (market1501; 0: any images, shuffled)."""
    skip_corrupt: bool = False
    """Leave out or replace, count and list images that cannot be decoded, instead of stopping."""
    loader: Literal["auto", "resident", "dali", "fallback"] = "auto"
    """Of folder, shards and market1501: resident: all images in memory. dali: decoded as needed by NVIDIA DALI, on the GPU if there is one. fallback: as needed by threads. auto: resident if they fit."""
    data_threads: int = 0
    """Threads that decode images (0: one a core)."""

    epochs: int = 15
    """Passes over the training images (distill: for the teacher, and again for the others)."""
    batch_size: int = 64
    """Images a step, of all processes together."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """sgd has Nesterov momentum. auto: sgd; adamw for market1501."""
    lr: float = 0.0
    """Peak learning rate (0: 0.1 for sgd, 0.001 for adamw)."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """Weight decay, on all parameters."""
    schedule: Literal["cosine", "paper", "constant"] = "cosine"
    """cosine: to zero. paper: divided by 10 after 30, 60 and 90 % of the epochs."""
    warmup: float = 1.0
    """Epochs over which the learning rate grows linearly to its peak."""

    amp: bool = False
    """Mixed precision: bf16, or fp16 with a loss scaler a student where a GPU lacks bf16."""
    amp_dtype: Literal["auto", "bf16", "fp16"] = "auto"
    """Overrides the choice of --amp. fp16 needs a GPU."""
    channels_last: bool = True
    """Keep images and convolutions in channels-last memory order."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    executor: Literal["auto", "sequential", "threads", "streams", "graph"] = "auto"
    """How the students are run. sequential: one after the other. threads: side by side on a CPU. streams, graph: side by side on a GPU, from the host or as one CUDA graph a step. auto: the fastest in a short trial, written into the run's configuration."""
    mesh: str = ""
    """COHORTxDATA processes under torchrun: students are shared out over COHORT rows, and each batch over DATA columns (default: as many rows as share the students out equally)."""
    shares: str = ""
    """How many students each row of the mesh holds (3,1), or measured: by the time that a step of each takes (default: equal shares)."""
    fsdp: bool = False
    """Share each student's weights, gradients and optimizer out over its row of the mesh (FSDP2), instead of a copy on each rank (DDP)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Of torch.distributed. auto: nccl on GPUs, gloo on CPUs."""
    compile: bool = False
    """Compile each student with torch.compile, which takes a minute or so at the start; those of one architecture share the result."""
    seed: int = 0
    """Everything random follows from it."""

    out: str = ""
    """Folder of the run (default: runs/ and a name made from data, method, seed and time)."""
    save_every: str = ""
    """Save a checkpoint also within epochs: every so many steps (200) or seconds (60s)."""
    log_every: int = 20
    """Steps between two readings of the metrics from the device."""
    max_skipped: int = 25
    """Stop when a student has skipped this many updates in a row for non-finite gradients."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """One architecture name a student, length K."""
        names = tuple(name.strip() for name in self.arch.split(","))
        return names * max(self.cohort, 2 if self.cohort == 0 else 1) if len(names) == 1 else names

    @property
    def peak_lr(self) -> float:
        """The learning rate at the top of the schedule."""
        return self.lr or {"sgd": 0.1, "adamw": 1e-3}[self.algorithm]

    @property
    def algorithm(self) -> str:
        """The optimizer that ``optimizer`` comes to: sgd or adamw."""
        if self.optimizer == "auto":
            return "adamw" if self.retrieval else "sgd"
        return self.optimizer

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run: distillation trains first the teacher, then the others."""
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
        """Whether the run learns to find identities, and not to tell classes apart."""
        return self.data.partition(":")[0] == "market1501"

    @property
    def data_options(self) -> dict[str, Any]:
        """What `dml_fast.data.open_dataset` is told beside ``data`` and ``download``."""
        names = "val_fraction train_fraction label_noise seed skip_corrupt loader"
        options = {name: getattr(self, name) for name in names.split()}
        return {
            **options,
            "image_size": self._image_size,
            "resized": self.resized_crop,
            "threads": self.data_threads,
        }

    @property
    def resized_crop(self) -> bool:
        """Whether training shows random parts of the images, and evaluation their middle."""
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
            UserError: naming the option, its value and what to do.
        """
        from dml_fast.data import check_data_spec
        from dml_fast.models import check_model_name
        from dml_fast.models.pretrained import check_pretrained

        names = self.architectures
        if self.cohort < 0:
            raise UserError(f"--cohort is {self.cohort}: give a number of students, such as 2")
        if self.cohort not in (0, len(names)):
            raise UserError(
                f"--cohort is {self.cohort} but --arch names {len(names)} ({self.arch}): "
                "give one name, or one a student"
            )
        if len(names) < 2 and self.method != "independent":
            raise UserError(
                f"--cohort is {len(names)} but --method {self.method} needs at least 2 students: "
                "give --cohort 2, or --method independent"
            )
        for name in names:
            check_model_name(name)
        if self.pretrained:
            check_pretrained(self.pretrained, names)
        self._check_numbers()
        self._check_retrieval()
        if self.update == "alternating" and self.method not in ("dml", "dml_e"):
            raise UserError(
                f"--update alternating means nothing with --method {self.method}: leave it out"
            )
        if self.tensorboard:
            _require("tensorboard", "--tensorboard", "log")
        check_data_spec(self.data, download=self.download)

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "max_skipped"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{_flag(name)} is {value}: give a whole number of at least 1")
        for name in (
            "kl_weight",
            "kl_warmup",
            "lr",
            "weight_decay",
            "warmup",
            "triplet_weight",
            "triplet_margin",
            "mixup",
            "cutmix",
        ):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise UserError(f"--{_flag(name)} is {value}: give a finite number, 0 or more")
        for name in ("momentum", "label_noise", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError(f"--{_flag(name)} is {value}: give a number from 0 to below 1")
        for name in ("random_erasing", "color_jitter"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"--{_flag(name)} is {value}: give a number from 0 to 1")
        none_set_aside = self.retrieval and self.val_fraction == 0
        if not (0 < self.val_fraction < 1 or none_set_aside):
            raise UserError(f"--val-fraction is {self.val_fraction}: give a number between 0 and 1")
        if not 0 < self.train_fraction <= 1:
            raise UserError(
                f"--train-fraction is {self.train_fraction}: give a number above 0, at most 1"
            )
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}: give a number above 0")
        if self.data_threads < 0:
            raise UserError(f"--data-threads is {self.data_threads}: give a number, or 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}: give a whole number from 0 to 2^63 - 1")
        _ = self.save_interval, self._image_size

    def _check_retrieval(self) -> None:
        if not self.retrieval:
            for name in ("triplet_weight", "triplet_margin", "num_instances"):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise UserError(
                        f"--{_flag(name)} means nothing with --data {self.data}, which has no "
                        "identities: leave it out, or give market1501:DIR"
                    )
        elif self.num_instances < 0 or (
            self.num_instances and self.batch_size % self.num_instances
        ):
            raise UserError(
                f"--num-instances is {self.num_instances} and --batch-size {self.batch_size}: a "
                "batch holds so many images of each of its identities, so give a divisor of it, or 0"
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
        """The fields by name, as JSON and TOML know them."""
        return asdict(self)


def from_mapping(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Build a configuration from names and values, as TOML and JSON give them.

    Args:
        values: field name (dashes or underscores) to value.
        where: what to call the source in an error.

    Raises:
        UserError: unknown name, or a value of the wrong type.
    """
    hints = get_type_hints(TrainConfig)
    names = [field.name for field in fields(TrainConfig)]
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see --help for the names"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
        kwargs[name] = _typed(value, hints[name], f"{where}: {key}")
    return TrainConfig(**kwargs)


def load_toml(path: str) -> TrainConfig:
    """Read a configuration file; its keys are the long flags without the dashes in front."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): check it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid TOML: {error}") from None
    return from_mapping(values, path)


def _typed(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where} is {value!r}: give one of {', '.join(get_args(hint))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and type(value) is int:  # image_size = 64
        return str(value)
    if type(value) is not hint:
        raise UserError(f"{where} is {value!r}: give a value of type {hint.__name__}")
    return value


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _require(module: str, flag: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise UserError(f"{flag} needs {module}: pip install 'dml_fast[{extra}]'")
