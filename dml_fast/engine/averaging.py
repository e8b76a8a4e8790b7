"""The exponential moving average of a student's weights, kept beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dml_fast.engine.norms import norms_of
from dml_fast.errors import UserError, check_number, reason

Place = tuple[nn.Module, str]


class Average:
    """The average of a network's weights over its updates, as a network of its own.

    After each update of the network, a = d a + (1 - d) w for each parameter and buffer of a
    floating type, with d the decay; other buffers are copied. It starts as the network itself. In
    an update that is skipped the weights stay, and the average comes closer to them.

    This is `torch.optim.swa_utils.AveragedModel` with ``use_buffers=True``, bit for bit, but for
    whole numbers, such as BatchNorm's count of batches, which have no mean.

    Args:
        model: the network, before anything wraps or shares it out; it is copied.
        decay: d, above 0 and below 1: about 1 / (1 - d) updates count.

    Attributes:
        model: the averaged network, in evaluation mode; nothing trains it.
        decay: d.
        norms: its layers of batch normalisation that keep statistics.

    Raises:
        UserError: the decay is out of range, or the network cannot be copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check_number("ema", decay, "a number above 0 and below 1", lambda d: 0 < d < 1)
        try:
            found = copy.deepcopy(model)
        except Exception as error:  # a network of a user's own may raise anything
            raise UserError(
                f"a student ({type(model).__name__}) has no average, as its network cannot be "
                f"copied ({reason(error)}): leave out ema"
            ) from error
        self.model = found.requires_grad_(False).eval()
        self.decay = decay
        self.norms = norms_of(found)
        self._of: nn.Module | None = None
        self._pairs: dict[torch.dtype, tuple[list[Place], list[Place]]] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the network's weights, with one launch for all of one type.

        Args:
            model: the network, after an update.
        """
        if self._of is not model:
            self._pair(model)
        for kind, (mine, theirs) in self._pairs.items():
            if kind.is_floating_point or kind.is_complex:
                torch._foreach_lerp_(_tensors(mine), _tensors(theirs), 1 - self.decay)
            else:
                torch._foreach_copy_(_tensors(mine), _tensors(theirs))

    def _pair(self, model: nn.Module) -> None:
        """Find what belongs together: by place, as a student's statistics move in memory."""
        self._of, self._pairs = model, {}
        for mine, theirs in zip(_places(self.model), _places(model), strict=True):
            pair = self._pairs.setdefault(getattr(*mine).dtype, ([], []))
            pair[0].append(mine)
            pair[1].append(theirs)


def check_state(average: Average | None, state: Mapping[str, Any], arch: str) -> None:
    """Refuse a student's state that has an average where the student has none, or the reverse.

    Args:
        average: of the student.
        state: to be put back.
        arch: the student's, for the message.

    Raises:
        UserError: which of the two has one.
    """
    if (average is None) == ("average" in state):
        which = (
            "keeps no average, and its state has one"
            if average is None
            else ("keeps an average, and its state has none")
        )
        raise UserError(f"a student ({arch}) {which}: keep one in both, or in neither")


def _places(model: nn.Module) -> Iterator[Place]:
    """Yield where a network has its parameters and buffers, each of them once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield module, name


def _tensors(places: list[Place]) -> list[Tensor]:
    """Return the tensors there: of those that are shared out, this rank's part."""
    found = [getattr(module, name) for module, name in places]
    return [t.to_local() if hasattr(t, "to_local") else t for t in found]
