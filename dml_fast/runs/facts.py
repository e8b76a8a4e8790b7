"""What a run and the files of its students record about the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from dml_fast.errors import UserError
from dml_fast.foreign import Unfit, typed
from dml_fast.models.heads import LINEAR, Head, HeadKind
from dml_fast.models.inputs import InputSpec

if TYPE_CHECKING:
    from dml_fast.data import DataSet


class _Added(TypedDict, total=False):
    task: Literal["retrieval", "labels"]
    inputs: list[dict[str, Any]]  # our oldest runs have none
    in_channels: int  # these two only where the inputs are images
    image_size: tuple[int, int]
    features: str  # only where rows are no images
    head: HeadKind  # our oldest runs have none
    bits: int  # only of a hash head


class FactsJson(_Added):
    """The facts as they are in files."""

    name: str
    num_classes: int
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str


@dataclass(frozen=True)
class DataFacts:
    """What must be known of the data to build a student, to feed it, and to read its output.

    Attributes:
        name: of the data set.
        classes: their names, in the order of the logits.
        inputs: what a student gets for a row, one entry for each of V views of the data.
        mean, std: of each channel, for pixels in 0..1; none where the inputs are vectors.
        fingerprint: a hash of all images and labels.
        retrieval: whether students learn identities, to find them, and not classes.
        several_labels: whether a row may have several classes, or none.
        features: the SHA-256 of the features in the run folder; "" for images, which have none.
        head: what stands on the backbone of each student.
    """

    name: str
    classes: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    retrieval: bool = False
    several_labels: bool = False
    features: str = ""
    head: Head = LINEAR

    def view_of(self, student: int) -> int:
        """Return which of the V views a student reads, by its number."""
        return student % len(self.inputs)

    def input_of(self, student: int) -> InputSpec:
        """Return what a student gets, by its number."""
        return self.inputs[self.view_of(student)]

    @property
    def answer(self) -> Literal["probabilities", "labels", "embeddings", "codes"]:
        """What students give together: see `dml_fast.models.ensemble.EnsembleNet`."""
        if self.head.kind == "hash":
            return "codes"
        if self.several_labels:
            return "labels"
        return "embeddings" if self.retrieval else "probabilities"

    @property
    def learned(self) -> str:
        """What the students learn, in words."""
        if self.several_labels:
            return "several labels for a row"
        return "identities" if self.retrieval else "classes"

    @property
    def in_channels(self) -> int:
        """Of each image; the inputs must be images."""
        return self._image[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels; the inputs must be images."""
        _, height, width = self._image
        return height, width

    @property
    def of_images(self) -> bool:
        """Whether the inputs are images."""
        return self.inputs[0].kind == "image"

    @property
    def of_pairs(self) -> bool:
        """Whether the inputs are pairs of images, and the classes displacements."""
        return self.inputs[0].kind == "pair"

    @property
    def _image(self) -> tuple[int, ...]:
        assert self.of_images
        return self.inputs[0].shape

    @classmethod
    def of(cls, data: DataSet, head: Head) -> DataFacts:
        """Collect the facts of an open data set, for students with such a head."""
        from dml_fast.data import RetrievalSet  # loads numpy, which --help does without

        return cls(
            name=data.name,
            classes=tuple(data.classes),
            inputs=data.inputs,
            mean=tuple(data.mean),
            std=tuple(data.std),
            fingerprint=data.fingerprint,
            retrieval=isinstance(data.val, RetrievalSet),
            several_labels=data.several_labels,
            features="" if data.features is None else data.features.digest,
            head=head,
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str) -> DataFacts:
        """Take the facts from what `to_json` returned; other keys are left out.

        Raises:
            Unfit: one is missing, of another type, or contradicts another.
        """
        facts: FactsJson = typed(dict(found), FactsJson, where)
        inputs = _inputs_of(facts, where)
        if len(facts["classes"]) != facts["num_classes"] or not facts["classes"]:
            raise Unfit(
                f"{where} has {len(facts['classes'])} classes and not {facts['num_classes']}"
            )
        channels = inputs[0].shape[0] if inputs[0].kind == "image" else 0
        if not len(facts["mean"]) == len(facts["std"]) == channels:
            raise Unfit(f"{where} has {channels} channels, not as many mean and std")
        if not all(std > 0 for std in facts["std"]):
            raise Unfit(f"{where}.std is not above 0")
        return cls(
            name=facts["name"],
            classes=tuple(facts["classes"]),
            inputs=inputs,
            mean=facts["mean"],
            std=facts["std"],
            fingerprint=facts["fingerprint"],
            retrieval=facts.get("task") == "retrieval",
            several_labels=facts.get("task") == "labels",
            features=facts.get("features", ""),
            head=_head_of(facts, where),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the facts as they are in ``config.json`` and in the header of a student's file."""
        image = (
            {"in_channels": self.in_channels, "image_size": list(self.image_size)}
            if self.of_images
            else {}
        )
        facts = {
            "name": self.name,
            "num_classes": len(self.classes),
            "classes": list(self.classes),
            "inputs": [one.to_json() for one in self.inputs],
            **image,
            "mean": list(self.mean),
            "std": list(self.std),
            "fingerprint": self.fingerprint,
            **({"features": self.features} if self.features else {}),
            "head": self.head.kind,
            **({"bits": self.head.bits} if self.head.bits else {}),
        }
        if self.several_labels:
            return {**facts, "task": "labels"}
        return {**facts, "task": "retrieval"} if self.retrieval else facts


def _inputs_of(facts: FactsJson, where: str) -> tuple[InputSpec, ...]:
    """Return what students get: ``inputs`` or, of our oldest runs, one image."""
    found = [
        InputSpec.from_json(entry, f"{where}.inputs[{i}]")
        for i, entry in enumerate(facts.get("inputs", []))
    ]
    if "inputs" in facts and not found:
        raise Unfit(f"{where} has no inputs")
    if found and found[0].kind != "image":
        return tuple(found)
    for key in ("in_channels", "image_size"):
        if key not in facts:
            raise Unfit(f"{where} has no {key}")
    shape = [facts["in_channels"], *facts["image_size"]]
    image = InputSpec.from_json({"kind": "image", "shape": shape}, where)
    if found and found != [image]:
        raise Unfit(f"{where} has {image.words}, and inputs of {found[0].words}")
    return (image,)


def _head_of(facts: FactsJson, where: str) -> Head:
    """Return the head; our oldest runs had the one of their task."""
    retrieval = facts.get("task") == "retrieval"
    usual: HeadKind = "bnneck" if retrieval else "linear"
    kind = facts.get("head", usual)
    if retrieval and kind == "linear":
        raise Unfit(f"{where} has identities and a head of kind {kind}")
    try:
        return Head(kind, facts.get("bits", 0))
    except UserError as error:
        raise Unfit(f"{where}: {error}") from None
