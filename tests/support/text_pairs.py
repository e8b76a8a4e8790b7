"""Pairs of short made-up texts: words, pairs of words and edges tell a little of their relation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

RELATIONS = ("cause", "contrast", "sequence")
COUNT = 400
PARTS = {"train": 280, "val": 50, "test": 70}

_MARKS = (("because", "since"), ("but", "though"), ("then", "later"))  # they begin an argument
_PAIRS = (("rain", "flood"), ("summer", "winter"), ("breakfast", "lunch"))  # one in each argument
_TOPICS = ("storm", "colour", "kitchen")
_OTHERS = tuple(f"word{i}" for i in range(40))


def text_pairs(path: Path, *, seed: int = 0, columns: str = "id split label arg1 arg2") -> Path:
    """Write `COUNT` rows as a tab-separated file of these columns; the same for each seed."""
    rng = np.random.default_rng(seed)
    splits = [part for part, count in PARTS.items() for _ in range(count)]
    lines = ["\t".join(columns.split())]
    for number, split in enumerate(splits):
        relation = int(rng.integers(len(RELATIONS)))
        told = [relation if rng.random() < 0.6 else int(rng.integers(3)) for _ in range(3)]
        first = [*rng.choice(_OTHERS, 5), _PAIRS[told[0]][0], _TOPICS[told[1]]]
        second = [*rng.choice(_OTHERS, 5), _PAIRS[told[0]][1]]
        row = {
            "id": f"pair {number:03d}",
            "split": split,
            "label": RELATIONS[relation],
            "arg1": " ".join(map(str, rng.permutation(first))),
            "arg2": " ".join([rng.choice(_MARKS[told[2]]), *map(str, rng.permutation(second))]),
        }
        row["text"] = f"{row['arg1']} {row['arg2']}"
        lines.append("\t".join(row[name] for name in columns.split()))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
