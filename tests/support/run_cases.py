"""What a run says about its data, made up; and a run with other options, as if begun with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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


def reconfigure(folder: Path, **options: Any) -> None:
    """Change options of a finished run, in its description and in its checkpoints."""
    description = json.loads((folder / "config.json").read_text())
    assert options.keys() <= description["config"].keys()
    description["config"] |= options
    (folder / "config.json").write_text(json.dumps(description))
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["config"] = json.dumps(json.loads(state["config"]) | options)
        path.unlink()  # it may be another name of one that is still to come
        torch.save(state, path)
