"""The plan: which images are in a batch, and what is done to each of them.

Everything random is drawn here, on the CPU, from (seed; sample, epoch, view, draw). Loaders only
execute the plan. So all loaders give the same batches and have no state, and a run can change its
loader in the middle of an epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dml_fast.data.boxes import WORDS, Boxes, erased_boxes, resized_boxes
from dml_fast.data.philox import Draws, Words, below, uniform
from dml_fast.data.sampling import Ids, Order, place_among_equals, share_of
from dml_fast.errors import check_choice, check_number, check_whole

# the first block, of four words each, of each kind of draw
_CROP, _JITTER, _ERASE, _RESIZED, _POLICY = 0, 1, 2, 8, 16
_TURN = 1 << 16  # an image that is in a batch twice is drawn as another view of it
_DRAWN_AT_ONCE = 4096  # samples: numpy needs as much time for one as for a hundred

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness",
    "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
"""The operations of TrivialAugment (`dml_fast.data.loaders.policy`)."""
LEVELS = 30
"""Strengths of an operation, beside none."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        pad: the most pixels by which an image is shifted in each direction. The border that
            appears has the mean colour. Unused with ``resized``.
        flip: whether half of the images are mirrored.
        resized: whether a random part of the image, resized to the whole, replaces the shift.
        policy: ``trivial`` for one random operation on each image, before it is shifted
            (TrivialAugment: Müller & Hutter, ICCV 2021); ``none``.
        erasing: the probability that a rectangle is blanked, 0..1.
        jitter: the largest relative change of brightness, contrast and saturation, 0..1.
        mixup: the parameter of the Beta distribution of mixup's weight (Zhang et al., ICLR 2018);
            0 for no mixup.
        cutmix: the same for CutMix (Yun et al., ICCV 2019). With both, each batch has one of them.
    """

    pad: int = 0
    flip: bool = False
    resized: bool = False
    policy: str = "none"
    erasing: float = 0.0
    jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Check the attributes.

        Raises:
            UserError: one is no number, or out of range.
        """
        check_whole("pad", self.pad, 0)
        check_choice("policy", self.policy, ("none", "trivial"))
        for name in ("erasing", "jitter"):
            value = getattr(self, name)
            check_number(name, value, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            check_number(name, value, "a finite number, 0 or more", lambda x: 0 <= x < math.inf)


class Mix(NamedTuple):
    """How the images of a batch are mixed: the first with the last, and so on.

    Attributes:
        weight: of the image itself, 0..1.
        box: None for mixup; for CutMix the part that is pasted, in pixels: top, left, bottom and
            right.
    """

    weight: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class BatchPlan:
    """A batch of B images in V views.

    Attributes:
        ids: (B,) int64 indices of images.
        crops: (V, 3, B) int64: top and left of the crop in the padded image, each 0..2*pad, and
            whether the crop is mirrored, 0 or 1.
        erased: (V, 4, B) int64 of `erased_boxes`, or None.
        jitter: (V, 3, B) float32 factors of brightness, contrast and saturation, or None.
        resized: (V, WORDS, B) uint32 for `boxes`, or None if images are not cut and resized.
        mix: None if images are not mixed.
        policy: (V, 2, B) int64: which of `OPERATIONS`, and its strength, -LEVELS..LEVELS (some
            operations ignore the sign); None without a policy.
    """

    ids: Ids
    crops: Boxes
    erased: Boxes | None
    jitter: npt.NDArray[np.float32] | None
    resized: Words | None
    mix: Mix | None
    policy: npt.NDArray[np.int64] | None = None

    def boxes(self, heights: Boxes, widths: Boxes) -> Boxes:
        """Return the part of each image that each view shows.

        Args:
            heights: (B,) int64, in pixels.
            widths: (B,) int64, in pixels.

        Returns:
            (V, 4, B) int64 of `resized_boxes`.
        """
        assert self.resized is not None
        return resized_boxes(self.resized.swapaxes(0, 1), heights, widths).swapaxes(0, 1)


class Plan:
    """The batches of one rank.

    Args:
        order: the batches of all ranks together.
        augmentation: what is done to the images.
        size: height and width of the network's input, in pixels.
        seed: the run's seed.
        views: V, the number of versions of each image.
        rank: the rank of this process, 0..ranks-1; it takes that share of each batch.
        ranks: R, a divisor of the batch size of ``order``.
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
        # kept only to save time: both can be computed again
        self._batches: tuple[int, Ids] | None = None
        self._drawn: tuple[tuple[int, int], BatchPlan] | None = None

    def __call__(self, epoch: int, step: int) -> BatchPlan:
        """Return the plan of batch ``step`` (0..steps_per_epoch-1) of ``epoch``.

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
            policy=None if drawn.policy is None else drawn.policy[:, :, row],
        )

    def _ids(self, epoch: int) -> Ids:
        if self._batches is None or self._batches[0] != epoch:
            self._batches = epoch, self._order(epoch)
        return self._batches[1]

    def _draw(self, batches: Ids, epoch: int) -> BatchPlan:
        """Draw the plans of several batches at once: a BatchPlan with (steps, B) in place of B."""
        steps, size = batches.shape
        mine = share_of(size, self._rank, self._ranks)
        _, image = np.unique(batches, return_inverse=True)
        row = np.arange(steps)[:, None] * (batches.size + 1)
        turn = place_among_equals((row + image.reshape(batches.shape)).ravel())
        ids = batches[:, mine]
        view = np.arange(self.views)[:, None, None] + _TURN * turn.reshape(batches.shape)[:, mine]

        def words(count: int, first: int) -> Words:  # (count, V, steps, B)
            return self._draws.words(ids, epoch, count, view=view, first=first)

        how, drawn = self.augmentation, words(4, _CROP)
        shifts = below(drawn[:2], 1 if how.resized else 2 * how.pad + 1)
        mirrored = below(drawn[2:3], 2) * int(how.flip)
        erased = jitter = resized = policy = None
        if how.erasing:
            chosen = uniform(drawn[3]) < how.erasing
            erased = erased_boxes(words(WORDS, _ERASE), chosen, *self._size).swapaxes(0, 1)
        if how.jitter:
            spread = how.jitter * (2 * uniform(words(3, _JITTER)) - 1)
            jitter = (1 + spread).astype(np.float32).swapaxes(0, 1)
        if how.resized:
            resized = words(WORDS, _RESIZED).swapaxes(0, 1)
        if how.policy == "trivial":
            which, strength, sign = words(3, _POLICY)
            level = below(strength, LEVELS + 1) * (1 - 2 * below(sign, 2))
            policy = np.stack([below(which, len(OPERATIONS)), level]).swapaxes(0, 1)
        crops = np.concatenate([shifts, mirrored]).swapaxes(0, 1)
        return BatchPlan(ids, crops, erased, jitter, resized, None, policy)

    def _mix(self, epoch: int, step: int) -> Mix | None:
        """Draw one weight for the whole batch, the same on all ranks."""
        mixup, cutmix = self.augmentation.mixup, self.augmentation.cutmix
        if not (mixup or cutmix):
            return None
        from scipy.special import betaincinv  # scikit-learn depends on scipy

        which, weight, *place = uniform(self._mixing.words(step, epoch)).tolist()
        paste = cutmix and (not mixup or which < 0.5)
        alpha = cutmix if paste else mixup
        own = float(betaincinv(alpha, alpha, weight))
        if not paste:
            return Mix(own, None)
        box: list[tuple[int, int]] = []  # as in the authors' code, the box is cut at the border
        for side, centre in zip(self._size, place, strict=True):
            half, middle = int(side * (1 - own) ** 0.5) // 2, int(side * centre)
            box.append((max(middle - half, 0), min(middle + half, side)))
        (top, bottom), (left, right) = box
        height, width = self._size
        pasted = (bottom - top) * (right - left) / (height * width)
        return Mix(1 - pasted, (top, left, bottom, right))
