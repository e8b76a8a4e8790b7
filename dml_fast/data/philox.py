"""Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011), in numpy.

A draw is a pure function of (seed; sample, epoch, view, draw). There is no state between batches:
any loader can make any batch at any time. The numbers are those of Random123, cuRAND and Triton's
``tl.philox``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dml_fast.rng import derive_seed

Words = npt.NDArray[np.uint32]
Counter = int | npt.NDArray[np.integer]

_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Counter, Counter, Counter, Counter], key: int) -> Words:
    """Compute ten rounds for many counters at once.

    Args:
        counter: four words, 0..2^32-1 each; arrays are broadcast against one another to shape S.
        key: an integer of 64 bits.

    Returns:
        (4, *S) uint32.
    """
    a, b, c, d = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    low, high = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        first, second = a * np.uint64(_MULTIPLY[0]), c * np.uint64(_MULTIPLY[1])
        a = second >> 32 ^ b ^ np.uint64(low)
        b = second & np.uint64(_LOW)
        c = first >> 32 ^ d ^ np.uint64(high)
        d = first & np.uint64(_LOW)
        low, high = low + _WEYL[0] & _LOW, high + _WEYL[1] & _LOW
    return np.stack([a, b, c, d]).astype(np.uint32)


class Draws:
    """Random numbers for one purpose, such as the order of the images.

    Args:
        seed: the run's seed.
        purpose: a name; draws for different purposes are independent.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = derive_seed(seed, purpose)

    def words(
        self, samples: Counter, epoch: Counter, count: int = 4, *, view: Counter = 0, first: int = 0
    ) -> Words:
        """Draw ``count`` words for each sample.

        Args:
            samples: indices of samples, of any shape S.
            epoch: the epoch of the run; broadcast against ``samples``.
            count: how many words for each sample.
            view: which of several versions of a sample; broadcast against ``samples``.
            first: the first block of four words, so that the draws of several calls differ.

        Returns:
            (count, *S) uint32.
        """
        blocks = range(first, first + (count + 3) // 4)
        drawn = [philox((samples, epoch, view, block), self._key) for block in blocks]
        return np.concatenate(drawn)[:count] if len(drawn) > 1 else drawn[0][:count]

    def permutation(self, count: int, epoch: int, number: int = 0) -> npt.NDArray[np.int64]:
        """Return 0..count-1 in random order, (count,) int64, another for each (epoch, number)."""
        words = self.words(np.arange(count), epoch, 2, view=number).astype(np.uint64)
        order: npt.NDArray[np.int64] = np.argsort(words[0] << 32 | words[1], kind="stable")
        return order


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """Turn words into float64 numbers in [0, 1), multiples of 2^-32, of the same shape."""
    return words.astype(np.float64) * 2.0**-32


def below(words: Words, limit: Counter) -> npt.NDArray[np.int64]:
    """Turn words into integers 0..limit-1, all equally likely up to 2^-32.

    Args:
        words: of shape S.
        limit: 1..2^31, broadcast against ``words``.

    Returns:
        int64 of the broadcast shape.
    """
    return (words.astype(np.uint64) * np.asarray(limit, np.uint64) >> 32).astype(np.int64)
