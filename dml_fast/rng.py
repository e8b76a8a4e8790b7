"""Random numbers: seeds as pure functions, and the state of the global generators.

Order and augmentation of the data are drawn from streams that are named by their purpose, such as
(run seed, "order", epoch): the same name gives the same numbers on any machine, and no such stream
is stored. Only what models draw (initial weights, dropout) comes from the global generators of
torch, numpy and Python, whose state is saved with each checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def derive_seed(*parts: int | str) -> int:
    """Mix numbers and names into one seed.

    A hash rather than ``np.random.SeedSequence``, which pads with zeros and so cannot tell
    ``(1,)`` from ``(1, 0)``.

    Args:
        *parts: integers of any size and short names; their order matters.

    Returns:
        A seed in [0, 2**63), which both torch and numpy accept. Different parts give independent
        seeds, unless their 63-bit hashes collide.
    """
    key = repr(tuple(part if isinstance(part, str) else int(part) for part in parts))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """Return the generator named by ``parts`` (see `derive_seed`).

    It is a Philox generator, which uses all 63 bits of the seed. torch's CPU generator uses only
    32 of them, so that among 100,000 steps two would be expected to draw the same numbers.
    """
    return np.random.Generator(np.random.Philox(key=derive_seed(*parts)))


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def state() -> dict[str, Any]:
    """Return the state of all global generators, of every CUDA device too.

    Its types are those that ``torch.load`` accepts with ``weights_only=True``.
    """
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": json.dumps(random.getstate()),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": json.dumps([str(kind), int(position), int(has_gauss), float(gauss)]),
    }


def set_state(saved: Mapping[str, Any]) -> None:
    """Put all global generators back into a state that `state` returned.

    Where the number of CUDA devices differs, those keep their own state, and a warning says so.

    Raises:
        Exception: it is no such state; of which kind depends on what is wrong.
    """
    import torch

    kind, position, has_gauss, cached = json.loads(saved["numpy_rest"])
    keys = saved["numpy"].numpy()
    # numpy would read beyond the end of its keys
    if keys.shape != (624,) or not (keys >= 0).all() or not 0 <= position <= 624:
        raise ValueError("it is no state of numpy's generator")
    torch.set_rng_state(saved["torch"])
    if len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    else:
        logger.warning(
            "the random state was saved with %d CUDA devices and there are %d: "
            "dropout on them continues with other random numbers",
            len(saved["cuda"]),
            torch.cuda.device_count(),
        )
    version, internal, gauss = json.loads(saved["python"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((kind, keys.astype(np.uint32), position, has_gauss, cached))


def cpu_position() -> tuple[object, ...]:
    """Return where the generators of the CPU are: it changes with every number drawn from them.

    Only for comparison, several times in a step; it takes half the time of `state`.
    """
    import torch

    _, keys, *rest = np.random.get_state(legacy=True)
    return (
        torch.get_rng_state().numpy().tobytes(),
        np.asarray(keys).tobytes(),
        *rest,
        random.getstate(),
    )
