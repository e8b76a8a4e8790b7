"""What one row of a data set is to the student that reads it: an image, a vector, or a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from dml_fast.errors import UserError, brief, check_choice, check_whole
from dml_fast.foreign import Unfit, typed

Kind = Literal["image", "vector", "pair"]

_LARGEST = {"image": 100_000, "vector": 10_000_000, "pair": 100_000}
"""A damaged file must not ask for more memory than there is; pixels are as for --image-size."""


class InputJson(TypedDict):
    """An `InputSpec` as it is in files."""

    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class InputSpec:
    """What a student gets for one row.

    Attributes:
        kind: image, vector or pair.
        shape: of one row: (C, H, W) of an image, (D,) of a vector.

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
        wanted = {"image": (3, "(channels, height, width)"), "vector": (1, "(size,)")}
        dimensions, words = wanted.get(self.kind, (len(self.shape), ""))
        if len(self.shape) != dimensions or not self.shape:
            raise UserError(
                f"the shape of an input ({self.kind}) has {len(self.shape)} numbers: give "
                f"{words or 'at least one'}"
            )
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))

    @property
    def words(self) -> str:
        """What it is called in a message: ``images of 1 x 8 x 8``, ``vectors of 200``."""
        return f"{self.kind}s of {' x '.join(map(str, self.shape))}"

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
            raise Unfit(f"{where} has {entry['kind']}s of {' x '.join(map(str, entry['shape']))}")
        try:
            return cls(entry["kind"], entry["shape"])
        except UserError as error:
            raise Unfit(f"{where}: {error}") from None
