"""What of a run is exported: one student, or all together as one network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

from dml_fast.models.embedding import EmbeddingNet
from dml_fast.models.hashing import CodedNet, HashNet
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.weights import (
    ensemble_header,
    ensemble_of,
    header_of,
    load_ensemble,
    load_student,
    save_ensemble,
    save_student,
    view_of,
)

Apply: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]
"""Inputs, (N, ...) each, to outputs."""


class Exported(Protocol):
    """A network to export, in evaluation mode on the CPU."""

    @property
    def name(self) -> str:
        """What it is called in a message."""

    @property
    def network(self) -> nn.Module:
        """The network."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the network gets."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the network returns."""

    @property
    def header(self) -> str:
        """The JSON that each format carries beside the network."""

    @property
    def tolerance(self) -> float:
        """How far outputs may be off, in units of the largest one and at least of 1."""

    def save(self, path: Path) -> None:
        """Write the weights, in the safetensors format."""

    def load(self, path: Path) -> Apply:
        """Read what `save` wrote, as a network like `network`."""


class TrainedStudent(NamedTuple):
    """A student to export.

    Attributes:
        model: in evaluation mode, on the CPU.
        arch: its name for ``create_model``.
        facts: of the data that it was trained on.
        view: which of the data's views it reads.
    """

    model: nn.Module
    arch: str
    facts: DataFacts
    view: int = 0

    @property
    def name(self) -> str:
        """Its architecture."""
        return self.arch

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the network gets: images, vectors or pairs."""
        return (f"{self.facts.inputs[self.view].kind}s",)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the network returns: logits, and codes of a hash head; of identities embeddings."""
        if self.facts.answer == "codes":
            return "logits", "codes"
        return ("embeddings" if self.facts.answer == "embeddings" else "logits",)

    @property
    def network(self) -> nn.Module:
        """The network that is exported: one that finds identities goes without its classifier."""
        if isinstance(self.model, HashNet):
            return CodedNet(self.model).eval()
        return _embedder(self.model) if self.facts.retrieval else self.model

    @property
    def header(self) -> str:
        """The JSON that each format carries beside the network."""
        return header_of(self.arch, self.facts, self.view)

    @property
    def tolerance(self) -> float:
        """How far outputs may be off, in units of the largest one and at least of 1."""
        return 1e-4

    def save(self, path: Path) -> None:
        """Write the weights, for `dml_fast.runs.weights.load_student`."""
        save_student(path, self.model.state_dict(), self.arch, self.facts, self.view)

    def load(self, path: Path) -> Apply:
        """Read what `save` wrote, as a network like `network`."""
        model, header = load_student(path, allow_code=[self.arch])
        facts = DataFacts.from_json(header, "its header")
        return TrainedStudent(model, header["arch"], facts, view_of(header, facts)).network


class TrainedEnsemble(NamedTuple):
    """All students of a run, to export as one network.

    Attributes:
        models: K networks in evaluation mode, on the CPU.
        archs: the name of each for ``create_model``.
        facts: of the data that they were trained on.
    """

    models: tuple[nn.Module, ...]
    archs: tuple[str, ...]
    facts: DataFacts

    @property
    def name(self) -> str:
        """The architectures."""
        return f"the ensemble of {', '.join(self.archs)}"

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the network gets: images, vectors or pairs; of V views ``vectors_0`` and so on."""
        kinds = [f"{spec.kind}s" for spec in self.facts.inputs]
        if len(kinds) == 1:
            return tuple(kinds)
        return tuple(f"{kind}_{view}" for view, kind in enumerate(kinds))

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the network returns: probabilities, and codes of a hash head; or embeddings."""
        answer = self.facts.answer
        if answer == "embeddings":
            return ("embeddings",)
        return ("probabilities", "codes") if answer == "codes" else ("probabilities",)

    @property
    def network(self) -> nn.Module:
        """The network that is exported: those that find identities go without their classifiers."""
        embeds = self.facts.answer == "embeddings"
        return ensemble_of([_embedder(m) if embeds else m for m in self.models], self.facts)

    @property
    def header(self) -> str:
        """The JSON that each format carries beside the network."""
        return ensemble_header(self.archs, self.facts)

    @property
    def tolerance(self) -> float:
        """How far outputs may be off: probabilities and embeddings are at most 1."""
        return 1e-4 if self.facts.answer == "codes" else 1e-5  # a bit is off by its u, of any size

    def save(self, path: Path) -> None:
        """Write all weights, for `dml_fast.runs.weights.load_ensemble`."""
        save_ensemble(path, [m.state_dict() for m in self.models], self.archs, self.facts)

    def load(self, path: Path) -> Apply:
        """Read what `save` wrote, as a network like `network`."""
        return load_ensemble(path, allow_code=self.archs)[0]


def _embedder(model: nn.Module) -> nn.Module:
    """Return the part of a network that embeds, all of one that has no classifier of its own."""
    if not isinstance(model, EmbeddingNet):
        return model
    return nn.Sequential(model.backbone, model.neck).eval()
