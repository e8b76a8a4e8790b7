"""One student's weights as a safetensors file that says itself how to build the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dml_fast.errors import UserError
from dml_fast.models import create_model
from dml_fast.models.embedding import create_embedding_net
from dml_fast.runs.files import atomic_write
from dml_fast.version import __version__

_KEY = "dml_fast"


def save_student(path: Path, state: dict[str, Tensor], arch: str, data: dict[str, Any]) -> None:
    """Write a student.

    Args:
        path: of the new file.
        state: the model's ``state_dict``.
        arch: what ``create_model`` knows it by.
        data: the run's ``data`` facts: ``num_classes, in_channels, image_size, mean, std,
            classes``; kept in the file's header beside ``arch``.
    """
    tensors = {  # no shared storage and no channels_last: the format refuses both
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    facts = json.dumps({"version": __version__, "arch": arch, **data})
    with atomic_write(path) as file:  # one key: the library writes several in random order
        file.write(save(tensors, metadata={_KEY: facts}))


def load_student(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Read a student.

    Args:
        path: what ``save_student`` wrote.

    Returns:
        The network in evaluation mode on the CPU, and ``arch`` with the data's facts.

    Raises:
        UserError: not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a student of dml_fast ({error}): check the path") from None
    return build_student(facts["arch"], facts, state), facts


def build_student(arch: str, data: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A network in evaluation mode on the CPU, from a state and the data's facts."""
    create = create_embedding_net if data.get("task") == "retrieval" else create_model
    model = create(
        arch,
        num_classes=data["num_classes"],
        in_channels=data["in_channels"],
        image_size=tuple(data["image_size"]),
    )
    model.load_state_dict(state)
    return model.eval()
