"""The plan: which images make up a batch and what is done to each, whoever then makes it.

Everything random is drawn here, on the CPU, from (seed; sample, epoch, view, draw). Loaders only
execute the plan, so they give the same batches, need no state, and can take a run over from one
another in mid-epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.boxes import WORDS, Boxes, erased_boxes, resized_boxes
from dml_fast.data.philox import Draws, Words, below, uniform
from dml_fast.data.sampling import Ids, Order, rank_among_equals

# where each kind of draw begins, in blocks of four words
_CROP, _JITTER, _ERASE, _RESIZED = 0, 1, 2, 8
_TURN = 1 << 16  # an image that comes twice in a batch is another view of it
_DRAWN_AT_ONCE = 4096  # samples: numpy takes as long for one as for a hundred


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        pad: pixels by which a crop is shifted at most, in each direction; what is shifted in is the
            mean colour. Unused with ``resized``.
        flip: whether half of the images are mirrored.
        resized: whether a random part of the image is resized to its size in place of the shift.
        erasing: probability that a rectangle is blanked.
        jitter: largest relative change of brightness, contrast and saturation, 0..1.
        mixup: parameter of the Beta distribution of mixup's weight (Zhang et al. 2018); 0 for none.
        cutmix: likewise for CutMix (Yun et al. 2019). With both, each batch has one of them.
    """

    pad: int = 0
    flip: bool = False
    resized: bool = False
    erasing: float = 0.0
    jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


class Mix(NamedTuple):
    """How each image of a batch is mixed with the one that mirrors its place in the batch.

    Attributes:
        weight: of the image itself, 0..1.
        box: None for mixup; else what CutMix pastes: top, left, bottom and right.
    """

    weight: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class BatchPlan:
    """A batch of B images in V views.

    Attributes:
        ids: (B,) indices of images.
        crops: (V, 3, B) int64: the crop's top and left in the padded image, each 0..2*pad, and 1
            where the crop is mirrored, else 0.
        erased: (V, 4, B) int64 of `erased_boxes`, or None.
        jitter: (V, 3, B) float32 factors of brightness, contrast and saturation, or None.
        resized: (V, WORDS, B) for `boxes`, or None where images keep their size.
        mix: None if images stay apart.
    """

    ids: Ids
    crops: Boxes
    erased: Boxes | None
    jitter: npt.NDArray[np.float32] | None
    resized: Words | None
    mix: Mix | None

    def boxes(self, heights: Boxes, widths: Boxes) -> Boxes:
        """Returns the part that each view shows of each image: (V, 4, B) of `resized_boxes`.

        Args:
            heights: (B,) in pixels.
            widths: (B,) in pixels.
        """
        assert self.resized is not None
        return resized_boxes(self.resized.swapaxes(0, 1), heights, widths).swapaxes(0, 1)


class Plan:
    """The batches of one rank.

    Args:
        order: of the images in all ranks' batches.
        augmentation: what is done to them.
        size: height and width of the network's input in pixels.
        seed: of the run.
        views: V, in how many versions each image comes.
        rank: 0..ranks-1: which rows of a batch are this process's.
        ranks: R, a divisor of the order's batch size.
    """

    def __init__(
        self,
        order: Order,
        augmentation: Augmentation,
        *,
        size: tuple[int, int],
        seed: int,
        views: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.steps_per_epoch = order.steps
        self.augmentation, self.views = augmentation, views
        self._order, self._size = order, size
        self._rank, self._ranks = rank, ranks
        self._draws, self._mixing = Draws(seed, "augment"), Draws(seed, "mix")
        # kept only to save time: both can be computed again at any moment
        self._batches: tuple[int, Ids] | None = None
        self._drawn: tuple[tuple[int, int], BatchPlan] | None = None

    def __call__(self, epoch: int, step: int) -> BatchPlan:
        """Returns the plan of batch ``step`` (0..steps_per_epoch-1) of ``epoch``.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is outside 0..{self.steps_per_epoch - 1}")
        ids = self._ids(epoch)
        together = max(1, _DRAWN_AT_ONCE // ids.shape[1])
        chunk, row = divmod(step, together)
        if self._drawn is None or self._drawn[0] != (epoch, chunk):
            batches = ids[chunk * together : (chunk + 1) * together]
            self._drawn = (epoch, chunk), self._draw(batches, epoch)
        drawn = self._drawn[1]
        return BatchPlan(
            ids=drawn.ids[row],
            crops=drawn.crops[:, :, row],
            erased=None if drawn.erased is None else drawn.erased[:, :, row],
            jitter=None if drawn.jitter is None else drawn.jitter[:, :, row],
            resized=None if drawn.resized is None else drawn.resized[:, :, row],
            mix=self._mix(epoch, step),
        )

    def _ids(self, epoch: int) -> Ids:
        if self._batches is None or self._batches[0] != epoch:
            self._batches = epoch, self._order(epoch)
        return self._batches[1]

    def _draw(self, batches: Ids, epoch: int) -> BatchPlan:
        """The plans of several batches at once: as a BatchPlan with (steps, B) in place of B."""
        steps, size = batches.shape
        mine = slice(self._rank * size // self._ranks, (self._rank + 1) * size // self._ranks)
        _, image = np.unique(batches, return_inverse=True)
        row = np.arange(steps)[:, None] * (batches.size + 1)
        turn = rank_among_equals((row + image.reshape(batches.shape)).ravel())
        ids = batches[:, mine]
        view = np.arange(self.views)[:, None, None] + _TURN * turn.reshape(batches.shape)[:, mine]

        def words(count: int, first: int) -> Words:  # (count, V, steps, B)
            return self._draws.words(ids, epoch, count, view=view, first=first)

        how, drawn = self.augmentation, words(4, _CROP)
        shifts = below(drawn[:2], 1 if how.resized else 2 * how.pad + 1)
        mirrored = below(drawn[2:3], 2) * int(how.flip)
        erased = jitter = resized = None
        if how.erasing:
            chosen = uniform(drawn[3]) < how.erasing
            erased = erased_boxes(words(WORDS, _ERASE), chosen, *self._size).swapaxes(0, 1)
        if how.jitter:
            spread = how.jitter * (2 * uniform(words(3, _JITTER)) - 1)
            jitter = (1 + spread).astype(np.float32).swapaxes(0, 1)
        if how.resized:
            resized = words(WORDS, _RESIZED).swapaxes(0, 1)
        crops = np.concatenate([shifts, mirrored]).swapaxes(0, 1)
        return BatchPlan(ids, crops, erased, jitter, resized, None)

    def _mix(self, epoch: int, step: int) -> Mix | None:
        """Draws one weight for the whole batch, the same on all ranks."""
        mixup, cutmix = self.augmentation.mixup, self.augmentation.cutmix
        if not (mixup or cutmix):
            return None
        from scipy.special import betaincinv  # scikit-learn brings it

        which, weight, *place = uniform(self._mixing.words(step, epoch)).tolist()
        paste = cutmix and (not mixup or which < 0.5)
        alpha = cutmix if paste else mixup
        own = float(betaincinv(alpha, alpha, weight))
        if not paste:
            return Mix(own, None)
        box: list[tuple[int, int]] = []  # as in the authors' code: a part may fall outside
        for side, centre in zip(self._size, place, strict=True):
            half, middle = int(side * (1 - own) ** 0.5) // 2, int(side * centre)
            box.append((max(middle - half, 0), min(middle + half, side)))
        (top, bottom), (left, right) = box
        height, width = self._size
        pasted = (bottom - top) * (right - left) / (height * width)
        return Mix(1 - pasted, (top, left, bottom, right))
