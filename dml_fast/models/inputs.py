"""What one row of a data set is to the student that reads it: an image, a vector, or a pair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from dml_fast.errors import UserError, brief, check_choice, check_whole, times
from dml_fast.foreign import Unfit, typed

Kind = Literal["image", "vector", "pair"]

_LARGEST = {"image": 100_000, "vector": 10_000_000, "pair": 10_000}
"""A damaged file must not ask for more memory than there is; pixels are as for --image-size."""


_FORMS: dict[Kind, tuple[str, ...]] = {
    "image": ("channels", "height", "width"),
    "vector": ("size",),
    "pair": ("channels of a", "channels of b", "patch", "search"),
}


class InputJson(TypedDict):
    """An `InputSpec` as it is in files."""

    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class InputSpec:
    """What a student gets for one row.

    Attributes:
        kind: image, vector or pair.
        shape: of one row: (C, H, W) of an image, (D,) of a vector, (channels of a, channels of b,
            patch, search) of a pair: two square crops, b's wider by ``search`` pixels on each side.

    Raises:
        UserError: the kind is unknown, or the shape is not one of its.
    """

    kind: Kind
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_choice("the kind of an input", self.kind, get_args(Kind))
        if not isinstance(self.shape, tuple | list):
            raise UserError(f"the shape of an input is {brief(self.shape)}: give a tuple of sizes")
        for size in self.shape:
            check_whole(f"a size of an input ({self.kind})", size, 1)
        names = _FORMS[self.kind]
        if len(self.shape) != len(names):
            form = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
            raise UserError(
                f"the shape of an input ({self.kind}) has {len(self.shape)} numbers: give {form}"
            )
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the one tensor that a row is; `shape` itself except for a pair.

        A pair is (channels of a + channels of b, S, S) with S = patch + 2 search. The channels of a
        are zero outside their central patch x patch square.
        """
        if self.kind != "pair":
            return self.shape
        channels_a, channels_b, patch, search = self.shape
        side = patch + 2 * search
        return (channels_a + channels_b, side, side)

    @property
    def words(self) -> str:
        """What it is called in a message: ``images of 1 x 8 x 8``, ``vectors of 200``."""
        if self.kind == "pair":
            _, _, patch, search = self.shape
            return f"pairs of {patch} x {patch} pixels with a search of {search}"
        return f"{self.kind}s of {times(self.shape)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as it is in files."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, found: Any, where: str) -> InputSpec:
        """Take what `to_json` returned; other keys are left out.

        Raises:
            Unfit: it is no such thing, or its sizes are none.
        """
        entry: InputJson = typed(found, InputJson, where)
        if not all(0 < size < _LARGEST[entry["kind"]] for size in entry["shape"]):
            raise Unfit(f"{where} has {entry['kind']}s of {times(entry['shape'])}")
        try:
            return cls(entry["kind"], entry["shape"])
        except UserError as error:
            raise Unfit(f"{where}: {error}") from None


def views_in_words(views: Iterable[InputSpec]) -> str:
    """Return what a row gives for a message, ``images of 1 x 8 x 8``; several views with "and"."""
    return " and ".join(spec.words for spec in views)
