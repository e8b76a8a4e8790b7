"""Find a network's weights in what other programs saved: under which key, with which prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dml_fast.models.stored import Stored

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_SECOND = ("ema", "teacher", "averag", "momentum")  # other weights are taken before these
_DEEPEST = 4  # dictionaries in one another


class Match(NamedTuple):
    """Where a network's tensors are.

    Attributes:
        key: of the dictionary that holds them, such as ``state_dict``; "" if it is the file's own.
        prefix: what stands before the network's names, such as ``module.``.
        tensors: those found, by the network's names; their shapes may differ.
        unused: names of the dictionary that are none of the network's.
        others: further places that hold all of this as well.
    """

    key: str
    prefix: str
    tensors: dict[str, Stored]
    unused: list[str]
    others: list[str]

    @property
    def place(self) -> str:
        """The key and the prefix."""
        return self.key + (f" [{self.prefix}*]" if self.prefix else "")


def best_match(content: Any, wanted: Mapping[str, Tensor]) -> Match | None:
    """Find the place with the most of a network's tensors.

    Args:
        content: what a file holds; tensors are `Stored`.
        wanted: the network's tensors by name.

    Returns:
        The place; None if ``content`` has no dictionary of tensors. Names and shapes decide, then
        weights that are trained go before means of them, and the first place before others.
    """
    names = {_plain(name): name for name in wanted}
    found = [
        (_score(match, wanted), match)
        for key, state in _dictionaries(content)
        for match in _matches(key, state, names)
    ]
    if not found:
        return None
    best, match = max(found, key=lambda pair: pair[0])
    others = [m.place for score, m in found if score[:2] == best[:2] and m.place != match.place]
    return match._replace(others=others if match.tensors else [])


def _score(match: Match, wanted: Mapping[str, Tensor]) -> tuple[int, int, bool]:
    fitting = sum(t.shape == tuple(wanted[name].shape) for name, t in match.tensors.items())
    return fitting, len(match.tensors), not any(word in match.place for word in _SECOND)


def _dictionaries(content: Any) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Yield each dictionary with tensors in it, and the keys that lead to it."""
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [("", content)]
    for _ in range(_DEEPEST):
        below: list[tuple[str, Any]] = []
        for key, value in level:
            if id(value) in seen or not isinstance(value, dict | list):
                continue
            seen.add(id(value))
            if isinstance(value, dict):
                state = {
                    name: tensor
                    for name, tensor in value.items()
                    if isinstance(name, str) and isinstance(tensor, Stored)
                }
                if state:
                    yield key, state
            items = value.items() if isinstance(value, dict) else enumerate(value)
            below += [(f"{key}.{name}" if key else str(name), inner) for name, inner in items]
        level = below


def _matches(key: str, state: dict[str, Stored], names: Mapping[str, str]) -> Iterator[Match]:
    """Yield a match for each prefix with which some of the names occur, or one without any."""
    plain = {_plain(name): name for name in state}
    prefixes: Counter[str] = Counter()
    for name in plain:
        start = 0
        while True:
            if name[start:] in names:
                prefixes[name[:start]] += 1
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    for prefix in prefixes or [""]:
        tensors = {
            own: state[plain[prefix + name]]
            for name, own in names.items()
            if prefix + name in plain
        }
        used = {plain[prefix + name] for name in names if prefix + name in plain}
        yield Match(key, prefix, tensors, [name for name in state if name not in used], [])


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
