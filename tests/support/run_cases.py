"""What a run says about its data, made up."""

from __future__ import annotations

from typing import Any

from dml_fast.runs.facts import DataFacts


def facts_of_three_classes(**changes: Any) -> DataFacts:
    facts: dict[str, Any] = {
        "name": "made up",
        "classes": ("a", "b", "c"),
        "in_channels": 1,
        "image_size": (8, 8),
        "mean": (0.5,),
        "std": (0.2,),
        "fingerprint": "",
    }
    return DataFacts(**(facts | changes))
