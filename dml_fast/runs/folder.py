"""The folder of a run: the names of its files, who may write to it, what is read from it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dml_fast.config import TrainConfig
from dml_fast.config.files import from_mapping
from dml_fast.errors import UserError
from dml_fast.foreign import Unfit, content, json_value, reading, shown, typed
from dml_fast.machine import locked
from dml_fast.runs.description import Change, Description, StudentJson, checked_changes
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import atomic_write, writing
from dml_fast.runs.history import EpochLine, History, checked
from dml_fast.version import __version__

if TYPE_CHECKING:
    from dml_fast.data.features import Features


_PARTS = "checkpoint_"  # how the names of folders of checkpoints begin
_LONG_NAME = "." + 80 * "x"  # as long as that of any file of a run, TensorBoard's included
_SMALL_FILES = 2**22  # bytes: all that a run writes besides weights


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def config_file(self) -> Path:
        """JSON: the configuration, the data's facts, each student's architecture and size."""
        return self.folder / "config.json"

    @property
    def metrics_file(self) -> Path:
        """One line of JSON for each epoch."""
        return self.folder / "metrics.jsonl"

    @property
    def labels_file(self) -> Path:
        """A copy of the file of ``--labels``, as it was at the start: the user's may grow."""
        return self.folder / "labels.tsv"

    @property
    def offsets_file(self) -> Path:
        """A copy of the file of ``--offsets``, as it was at the start."""
        return self.folder / "offsets.tsv"

    @property
    def class_weights_file(self) -> Path:
        """A copy of the file of ``--class-weights``, as it was at the start."""
        return self.folder / "class_weights.tsv"

    def checkpoint(self, which: str = "last") -> Path:
        """Return the path of ``last``, ``previous`` or ``best``.

        It is a file or, where several processes wrote the checkpoint, a link to a folder.
        """
        return self.folder / f"{which}.pt"

    def weights(self, student: int, *, averaged: bool = False) -> Path:
        """Return the path of one student's final weights, or of their average."""
        return self.folder / f"student_{student}{'-ema' if averaged else ''}.safetensors"

    def new_parts(self, step: int) -> Path:
        """Make a folder for a checkpoint of several processes, with a new name.

        A run may reach a step twice: after a crash it continues from an older checkpoint.
        """
        folder = _unused(self.folder / f"{_PARTS}{step:08d}")
        folder.mkdir()
        return folder

    def remove_unused_parts(self) -> None:
        """Remove each such folder to which neither ``last`` nor ``previous`` nor ``best`` links."""
        links = [self.checkpoint(which) for which in ("last", "previous", "best")]
        used = {link.resolve() for link in links if link.is_symlink()}
        for folder in self.folder.glob(f"{_PARTS}*"):
            if folder.resolve() not in used:
                shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Find the run of a folder or of a file in it.

        Raises:
            UserError: there is none.
        """
        folder = Path(path)
        # unlike Path.is_file, os.path.isfile is False for a name that is too long
        run = cls(folder.parent if os.path.isfile(folder) or folder.suffix == ".pt" else folder)
        if not os.path.isfile(run.config_file):
            known = sorted(p.parent.name for p in Path("runs").glob("*/config.json"))[-3:]
            hint = f"; the newest under runs/ are {', '.join(known)}" if known else ""
            raise UserError(f"{path} is not a run folder, it has no config.json: check it{hint}")
        return run

    def to_continue(self, resume: Path) -> Path | None:
        """Return the checkpoint from which ``--resume`` continues.

        Args:
            resume: the run's folder, or a checkpoint in it.

        Returns:
            Its path; None for a run that was killed before its first. That run continues from its
            start, which gives the same.
        """
        if resume == self.folder and not any(self.folder.glob("*.pt")):
            return None
        return self.checkpoint("last") if resume.suffix != ".pt" and resume.is_dir() else resume

    @cached_property
    def description(self) -> Description:
        """What ``config.json`` holds."""
        found = json_value(content(self.config_file), self.config_file)
        with reading(self.config_file):
            description: Description = typed(found, Description, "it")
            return description

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration with which the run was started."""
        where, students = str(self.config_file), self.description["students"]
        config = from_mapping(self.description["config"], where)
        with reading(where):
            if config.cohort not in (0, len(students)):  # before it is a list of that many
                raise Unfit(f"it has {len(students)} students and --cohort {config.cohort}")
            if tuple(student["arch"] for student in students) != config.architectures:
                raise Unfit(f"its students are not of --arch {config.arch}")
        try:
            config.check_numbers()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return config

    @cached_property
    def changes(self) -> list[Change]:
        """What ``--resume`` has changed of the configuration, the oldest first."""
        with reading(self.config_file):
            return checked_changes(self.description.get("changes", []), "its changes")

    @cached_property
    def facts(self) -> DataFacts:
        """What the run records about its data."""
        with reading(self.config_file):
            return DataFacts.from_json(self.description["data"], "its data")

    @cached_property
    def features(self) -> Features | None:
        """What makes vectors of the rows of its data; None if its students read images.

        Raises:
            UserError: a file is missing, damaged, or of another run.
        """
        if not self.facts.features:
            return None
        from dml_fast.data.features import load_features  # loads numpy, which --help does without

        found = load_features(self.folder)
        if found.digest != self.facts.features:
            raise UserError(
                f"{self.folder} holds other features ({', '.join(found.files())}) than those that "
                "its students were trained with: restore them"
            )
        return found

    def write_features(self, files: Mapping[str, bytes]) -> None:
        """Write the files of `dml_fast.data.features.Features`, before ``config.json``."""
        with self._writing():
            for name, data in files.items():
                with atomic_write(self.folder / name) as file:
                    file.write(data)

    def copy_given_files(self, config: TrainConfig) -> None:
        """Copy the files that ``--labels``, ``--offsets`` and ``--class-weights`` name."""
        for given, own, option in (
            (config.labels, self.labels_file, "--labels"),
            (config.offsets, self.offsets_file, "--offsets"),
            (config.class_weights_file, self.class_weights_file, "--class-weights"),
        ):
            if given:
                found = content(Path(given).expanduser(), f"give another file with {option}")
                with self._writing(), atomic_write(own) as file:
                    file.write(found)

    def with_own_files(self, config: TrainConfig) -> TrainConfig:
        """Return the run's configuration with the copies of files that it names."""
        return replace(
            config,
            labels=str(self.labels_file) if config.labels else "",
            offsets=str(self.offsets_file) if config.offsets else "",
            class_weights=(
                str(self.class_weights_file) if config.class_weights_file else config.class_weights
            ),
        )

    def describe(
        self,
        config: TrainConfig,
        facts: DataFacts,
        students: list[StudentJson],
        changes: Sequence[Change] = (),
    ) -> None:
        """Write ``config.json``."""
        description = {
            "dml_fast": __version__,
            "config": config.to_dict(),
            **({"changes": changes} if changes else {}),
            "data": facts.to_json(),
            "students": students,
        }
        with atomic_write(self.config_file) as file:
            file.write((json.dumps(description, indent=2) + "\n").encode())

    def metrics(self) -> list[EpochLine]:
        """Read ``metrics.jsonl``: one line for each epoch, the oldest first.

        Raises:
            UserError: it is damaged, or of a run of other students.
        """
        if not os.path.lexists(self.metrics_file):
            return []
        text = content(self.metrics_file)
        lines = [json_value(line, self.metrics_file) for line in text.splitlines()]
        with reading(self.metrics_file):
            return checked(lines, self.config.architectures)

    def write_metrics(self, lines: History) -> None:
        """Rewrite ``metrics.jsonl``, so that after a crash each line is complete and there once."""
        with atomic_write(self.metrics_file) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_corrupt(self, reasons: Mapping[str, str]) -> None:
        """Write ``corrupt_files.tsv``, the files that were skipped and why, if there are any."""
        if reasons:
            with atomic_write(self.folder / "corrupt_files.tsv") as file:
                lines = [f"{shown(name)}\t{shown(why)}\n" for name, why in sorted(reasons.items())]
                file.write("".join(lines).encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder, and keep other processes from training in it.

        The lock ends with this context or, however it ends, with the process.

        Raises:
            UserError: it cannot be made, or another process is training in it.
        """
        with ExitStack() as stack:
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(self.folder, "is training in"))
            yield

    @contextmanager
    def taken(self, *, new: bool) -> Iterator[None]:
        """Lock the folder, and remove it if an error occurs before any file is in it.

        Args:
            new: whether it is for a new run, so that it must not hold one yet.

        Raises:
            UserError: as `lock` and `prepare`.
        """
        with self.lock():
            try:
                if new:
                    self.prepare(_SMALL_FILES)
                yield
            except BaseException:
                with suppress(OSError):  # it is not empty
                    self.folder.rmdir()
                raise

    def prepare(self, needed_bytes: int) -> None:
        """Make the folder, and check before any training that a new run fits into it.

        Raises:
            UserError: it holds a run already, cannot be written to, or the disk is too full.
        """
        if self.config_file.exists():
            raise UserError(
                f"--out {self.folder} holds a run already: give another folder, "
                f"or continue that one with --resume {self.folder}"
            )
        self.check_writable(needed_bytes)

    def check_writable(self, needed_bytes: int) -> None:
        """Check that ``needed_bytes`` can be written, and remove stale temporary files.

        The run's present checkpoints count as free space, since new ones replace them.

        Raises:
            UserError: the folder cannot be written to, or the disk is too full.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(".*.tmp"):
                stale.unlink()
            with tempfile.NamedTemporaryFile(
                prefix=_LONG_NAME, suffix=".tmp", dir=self.folder
            ) as probe:
                probe.write(b"\0" * 4096)
                probe.flush()
        # by inode, as best.pt and previous.pt may be other names of last.pt
        files = (path for pattern in ("*.pt", f"{_PARTS}*/*") for path in self.folder.glob(pattern))
        found = [os.stat(path) for path in files if os.path.isfile(path)]
        sizes = {file.st_ino: file.st_size for file in found}
        free = shutil.disk_usage(self.folder).free + sum(sizes.values())
        if free < needed_bytes:
            raise UserError(
                f"the run needs about {needed_bytes / 2**20:.0f} MiB and the disk of {self.folder} "
                f"has {free / 2**20:.0f} MiB free: make room, or give another folder with --out"
            )

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"the run folder {self.folder}", "give another one with --out")


def held(folder: Path, work: str) -> AbstractContextManager[None]:
    """Make a folder of several runs, and keep other processes from working in it.

    Args:
        folder: that ``--out`` gives.
        work: what is done in it, for a message about another process.

    Raises:
        UserError: it cannot be made, is that of one run, or another process works in it.
    """
    with writing(f"--out {folder}", "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(Run(folder).config_file):
        raise UserError(f"--out {folder} holds a run: give another folder")
    return _locked(folder, work)


def _locked(folder: Path, work: str) -> AbstractContextManager[None]:
    def refuse() -> None:
        raise UserError(
            f"another process {work} {folder}: wait for it or stop it, or give another folder "
            "with --out"
        )

    return locked(folder, refuse)


def is_name_of_parts(name: str) -> bool:
    """Return whether a name is that of a folder which `Run.new_parts` makes."""
    return name.startswith(_PARTS) and Path(name).name == name


def new_folder(config: TrainConfig) -> Path:
    """Return ``--out``, or an unused name under ``runs/``."""
    if config.out:
        return Path(config.out)
    kind = config.data.split(":", 1)[0]
    stem = f"{kind}-{config.method}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    return _unused(Path("runs") / stem)


def _unused(folder: Path) -> Path:
    """Return the folder, with a number after its name if it exists."""
    found, number = folder, 1
    while found.exists():
        found, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return found
