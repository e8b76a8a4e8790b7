"""Seeds as pure functions: the same numbers always give the same stream, on any machine.

Nothing here touches a global generator, and no generator has to be stored in a checkpoint: a
stream is named by what it is for, such as (run seed, "order", epoch).
"""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Mixes numbers and names into one seed.

    A hash rather than ``np.random.SeedSequence``, which pads with zeros and so cannot tell
    ``(1,)`` from ``(1, 0)``.

    Args:
        *parts: integers of any size and short names, in a fixed order.

    Returns:
        A seed in [0, 2**63), accepted by torch and numpy alike. Different parts give
        independent seeds, up to the chance of a collision of a 63-bit hash.
    """
    key = repr(tuple(part if isinstance(part, str) else int(part) for part in parts))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """Returns the generator named by ``parts`` (see `derive_seed`).

    Philox, because it takes all 63 bits of the seed; torch's CPU generator uses only 32 of them,
    so that among 100,000 steps two would be expected to share their draws.
    """
    return np.random.Generator(np.random.Philox(key=derive_seed(*parts)))


def seed_everything(seed: int) -> None:
    """Starts the global generators of torch, numpy and python, which models may draw from."""
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def global_state() -> tuple[object, ...]:
    """Where the global generators of torch's CPU, numpy and python are, to compare with later."""
    import torch

    _, keys, *rest = np.random.get_state(legacy=True)
    return (
        torch.get_rng_state().numpy().tobytes(),
        np.asarray(keys).tobytes(),
        *rest,
        random.getstate(),
    )
