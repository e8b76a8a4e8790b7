"""What a run and the files of its students record about the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from dml_fast.foreign import Unfit, typed

if TYPE_CHECKING:
    from dml_fast.data import DataSet


_LARGEST_SIDE = 100_000  # pixels, as for --image-size


class _Task(TypedDict, total=False):
    task: Literal["retrieval"]


class FactsJson(_Task):
    """The facts as they are in files."""

    name: str
    num_classes: int
    classes: list[str]
    in_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str


@dataclass(frozen=True)
class DataFacts:
    """What must be known of the data to build a student, to feed it, and to read its output.

    Attributes:
        name: of the data set.
        classes: their names, in the order of the logits.
        in_channels: of each image.
        image_size: (height, width) in pixels.
        mean, std: of each channel, for pixels in 0..1.
        fingerprint: a hash of all images and labels.
        retrieval: whether students give embeddings, to find identities, and not logits of classes.
    """

    name: str
    classes: tuple[str, ...]
    in_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    retrieval: bool = False

    @classmethod
    def of(cls, data: DataSet) -> DataFacts:
        """Collect the facts of an open data set."""
        from dml_fast.data import RetrievalSet  # loads numpy, which --help does without

        channels, height, width = data.train.images.shape[1:]
        return cls(
            name=data.name,
            classes=tuple(data.classes),
            in_channels=channels,
            image_size=(height, width),
            mean=tuple(data.mean),
            std=tuple(data.std),
            fingerprint=data.fingerprint,
            retrieval=isinstance(data.val, RetrievalSet),
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any], where: str) -> DataFacts:
        """Take the facts from what `to_json` returned; other keys are left out.

        Raises:
            Unfit: one is missing, of another type, or contradicts another.
        """
        facts: FactsJson = typed(dict(found), FactsJson, where)
        sizes = (facts["in_channels"], *facts["image_size"])
        if not all(0 < size < _LARGEST_SIDE for size in sizes):
            raise Unfit(f"{where} has images of {' x '.join(map(str, sizes))}")
        if len(facts["classes"]) != facts["num_classes"] or not facts["classes"]:
            raise Unfit(
                f"{where} has {len(facts['classes'])} classes and not {facts['num_classes']}"
            )
        if not len(facts["mean"]) == len(facts["std"]) == facts["in_channels"]:
            raise Unfit(f"{where} has {facts['in_channels']} channels, not as many mean and std")
        if not all(std > 0 for std in facts["std"]):
            raise Unfit(f"{where}.std is not above 0")
        return cls(
            name=facts["name"],
            classes=tuple(facts["classes"]),
            in_channels=facts["in_channels"],
            image_size=facts["image_size"],
            mean=facts["mean"],
            std=facts["std"],
            fingerprint=facts["fingerprint"],
            retrieval=facts.get("task") == "retrieval",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the facts as they are in ``config.json`` and in the header of a student's file."""
        facts = {
            "name": self.name,
            "num_classes": len(self.classes),
            "classes": list(self.classes),
            "in_channels": self.in_channels,
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "fingerprint": self.fingerprint,
        }
        return {**facts, "task": "retrieval"} if self.retrieval else facts
