"""The configuration of a training run: its options, what follows from them, and their checks.

Nothing here imports torch, so that ``--help`` and messages about arguments appear at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar, get_type_hints

from dml_fast.config.checks import check_combinations
from dml_fast.config.checks_labels import check_several_labels
from dml_fast.config.checks_logs import check_logs
from dml_fast.config.checks_longer import check_init_from, check_patience
from dml_fast.config.fields import Options, flag, names_in
from dml_fast.config.types import check_field, numbers_in
from dml_fast.errors import UserError, check_choice
from dml_fast.models.inputs import Kind

T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig(Options):
    """Train a cohort of networks that teach each other (Deep Mutual Learning, CVPR 2018)."""

    @property
    def architectures(self) -> tuple[str, ...]:
        """The architecture of each student, length K."""
        names = tuple(name.strip() for name in (self.arch or self._default_arch).split(","))
        if len(names) > 1:
            return names
        return names * (self.cohort or 2)

    @property
    def peak_lrs(self) -> tuple[float, ...]:
        """The learning rate of each student at the top of the schedule, length K."""
        usual = {"sgd": 0.1, "adamw": 1e-3}
        pairs = zip(self.each("lr"), self.algorithms, strict=True)
        return tuple(lr or usual[algorithm] for lr, algorithm in pairs)

    def each(self, name: str) -> tuple[float, ...]:
        """Return a number per student, length K.

        Args:
            name: of a field that holds a number, or one per student.

        Raises:
            UserError: there are more or fewer numbers than students.
        """
        return self._for_each(name, numbers_in(flag(name), getattr(self, name)))

    def _for_each(self, name: str, found: tuple[T, ...]) -> tuple[T, ...]:
        count = len(self.architectures)
        if len(found) not in (1, count):
            raise UserError(
                f"{flag(name)} {getattr(self, name)} gives {len(found)} values and the cohort has "
                f"{count} students: give one value, or one per student"
            )
        return found if len(found) > 1 else found * count

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The optimizer of each student with ``auto`` resolved: sgd or adamw, length K."""
        usual = "adamw" if self.retrieval else "sgd"
        found = tuple(usual if name == "auto" else name for name in names_in(self.optimizer))
        for name in found or ("",):
            check_choice("--optimizer", name, ("auto", "sgd", "adamw"))
        return self._for_each("optimizer", found)

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run: distillation trains the teacher first and then the others."""
        return self.epochs * (2 if self.method == "distill" else 1)

    def small_loss_warmup(self, steps_per_epoch: int) -> float:
        """Return the epochs over which the share of ``small_loss`` grows from 0.

        JoCoR's 10 epochs were about 4,000 steps; fewer would leave out classes that the students
        have not begun to learn.
        """
        return min(float(self.epochs), max(10.0, 4000 / steps_per_epoch))

    def rows_of_pass(self, columns: int = 1) -> int:
        """Return the rows of a forward pass: of a batch over so many columns, a part of it."""
        return self.batch_size // columns // self.accumulate

    @property
    def class_weights_file(self) -> str:
        """The file of class weights, or none."""
        return "" if self.class_weights == "auto" else self.class_weights

    @property
    def shows_f1(self) -> bool:
        """Whether the table at the end has macro-F1 too, which a balanced run is about."""
        balanced = self.prior != "none" or self.balance or self.class_weights != ""
        return balanced or self.data.startswith("text:")

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
    def time_limit(self) -> float:
        """``max_time`` in seconds; infinite where there is none."""
        if not self.max_time:
            return math.inf
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([hms])", self.max_time)
        if not match or float(match[1]) <= 0:
            raise UserError(
                f"--max-time is {self.max_time!r}: give hours, minutes or seconds (90m)"
            )
        return float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2]]

    @property
    def retrieval(self) -> bool:
        """Whether the students learn to find images of one identity, and not to classify."""
        return self.data.partition(":")[0] == "market1501"

    @property
    def head_kind(self) -> Literal["linear", "bnneck", "hash"]:
        """The head with ``auto`` resolved."""
        if self.head == "auto":
            return "bnneck" if self.retrieval else "linear"
        return self.head

    @property
    def input_kind(self) -> Kind:
        """What the students read."""
        if self.data.startswith(("text:", "vectors:")):
            return "vector"
        return "pair" if self.data.startswith("pairs:") else "image"

    @property
    def row_name(self) -> Literal["images", "pairs"]:
        """What rows are called where a speed is told."""
        return "pairs" if self.input_kind == "pair" else "images"

    @property
    def _default_arch(self) -> str:
        from dml_fast.models.registry import DEFAULTS

        return DEFAULTS[self.input_kind]

    def settled(self, unlabelled: bool) -> TrainConfig:
        """Return the configuration as ``config.json`` has it: with what the data decides.

        Args:
            unlabelled: whether training rows have no label.
        """
        share, ramp = self.unlabelled_share, self.kl_warmup
        return replace(
            self,
            arch=self.arch or self._default_arch,
            unlabelled_share=0.67 * unlabelled if share == "auto" else share,
            kl_warmup=3 * self.epochs / 10 * unlabelled if ramp == "auto" else ramp,
        )

    def with_epochs(self, epochs: int) -> TrainConfig:
        """Return a run's settled configuration with other ``epochs``, and what auto makes of them.

        Args:
            epochs: with which the run goes on.
        """
        auto = replace(self, kl_warmup="auto")
        follows = self.kl_warmup == auto.settled(unlabelled=True).kl_warmup
        longer = replace(auto, epochs=epochs).settled(unlabelled=True).kl_warmup
        return replace(self, epochs=epochs, kl_warmup=longer if follows else self.kl_warmup)

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
            "labels": self.labels,
            "labels_per_class": self.labels_per_class,
            "unlabelled_share": self.unlabelled_share,
            "classes": names_in(self.classes),
            "levels": names_in(self.levels) if self.views == "levels" else None,
            "dim": self.dim,
            "patch": self.patch,
            "search": self.search,
            "offsets": self.offsets,
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
        from dml_fast.data import check_data_spec, check_searches, has_several_labels
        from dml_fast.models import check_model_name
        from dml_fast.models.pretrained import check_pretrained

        self.check_numbers()
        if not 0 <= self.cohort < 10_000:
            raise UserError(f"--cohort is {self.cohort}: give a number of students, such as 2")
        check_combinations(self, retrieval=self.retrieval, kind=self.input_kind)
        names = self.architectures
        if self.cohort not in (0, len(names)):
            raise UserError(
                f"--cohort is {self.cohort} but --arch names {len(names)} ({self.arch}): "
                "give one name, or one per student"
            )
        if len(names) < 2 and self.method != "independent" and not self.teachers:
            raise UserError(
                f"--cohort is {len(names)} but --method {self.method} needs at least 2 students: "
                "give --cohort 2, --method independent, or --teachers RUN"
            )
        for name in names:
            check_model_name(name, self.input_kind)
        check_init_from(self)
        if self.pretrained:
            check_pretrained(self.pretrained, names)
        check_patience(self, retrieval=self.retrieval, kind=self.input_kind)
        if self.update == "alternating" and self.method not in ("dml", "dml_e"):
            raise UserError(
                f"--update alternating means nothing with --method {self.method}: leave it out"
            )
        check_logs(self.log)
        check_data_spec(self.data, download=self.download)
        if has_several_labels(self.data):
            check_several_labels(self)
        if self.retrieval:
            check_searches(self.data, val_fraction=self.val_fraction, camera_rule=self.camera_rule)

    def check_numbers(self) -> None:
        """Refuse values of another type, numbers out of bounds, and names that do not exist.

        Raises:
            UserError: it names the option, its value and what may be given.
        """
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            check_field(flag(name), getattr(self, name), hint)
        validates_on_test = self.retrieval and self.val_fraction == 0
        if not (0 < self.val_fraction < 1 or validates_on_test):
            raise UserError(f"--val-fraction is {self.val_fraction}: give a number between 0 and 1")
        # these raise too
        _ = self.save_interval, self.time_limit, self._image_size, self.algorithms
        _ = self.each("lr"), self.each("momentum"), self.each("weight_decay")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, in types that JSON has."""
        return asdict(self)
