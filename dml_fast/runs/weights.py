"""One student's weights as a safetensors file, whose header tells how to build the network."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dml_fast.errors import UserError
from dml_fast.foreign import reading
from dml_fast.models import check_code, create_model
from dml_fast.models.embedding import create_embedding_net
from dml_fast.models.safetensors_files import HEADER, NO_SEAL, SEAL, read_safetensors, seal
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import atomic_write
from dml_fast.runs.folder import Run
from dml_fast.version import __version__

_STUDENT = re.compile(r"student_(\d{1,9})(-best|-last)?\.safetensors")  # in a run folder


def header_of(arch: str, facts: DataFacts) -> str:
    """Return the JSON that every file of a student carries beside its weights."""
    return json.dumps({"version": __version__, "arch": arch, **facts.to_json()})


def save_student(path: Path, state: dict[str, Tensor], arch: str, facts: DataFacts) -> None:
    """Write a student.

    Args:
        path: the new file.
        state: the model's ``state_dict``.
        arch: its name for ``create_model``.
        facts: of the run's data; they are in the file's header.
    """
    tensors = {  # no shared storage and no channels_last: the format refuses both
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    header = json.loads(header_of(arch, facts)) | {SEAL: NO_SEAL}
    metadata = {HEADER: json.dumps(header)}  # one key: several are written in random order
    with atomic_write(path) as file:
        file.write(seal(save(tensors, metadata=metadata)))


def load_student(
    path: str | Path, allow_code: Collection[str] = ()
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a student.

    Args:
        path: a file that `save_student` wrote.
        allow_code: the functions, as ``package.module:function``, that may build the network. A
            file that names another one is refused: to build its network would run its code.

    Returns:
        The network in evaluation mode on the CPU, and the file's header: ``arch``, ``version`` and
        the data's facts (see `DataFacts.to_json`).

    Raises:
        UserError: it is not such a file, names code that is not allowed, or lies in the folder of
            another run under the name of its student.
    """
    with reading(path, "check the path, or restore it"):
        tensors, header = read_safetensors(Path(path))
        state = {name: tensor.read() for name, tensor in tensors.items()}
    if not header:
        raise UserError(f"{path} is not a student of dml_fast: check the path")
    with reading(path):
        arch, facts = header["arch"], DataFacts.from_json(header, "its header")
        if not isinstance(arch, str):
            raise TypeError("arch is no name")
    check_code([arch], allow_code, path, "give load_student allow_code=[{!r}]")
    _check_run(Path(path), arch, facts)
    with reading(path):
        return build_student(arch, facts, state), header


def _check_run(path: Path, arch: str, facts: DataFacts) -> None:
    """Refuse a file with the name of a run's student, in its folder, that is of another run."""
    run = Run(path.parent)
    number = _STUDENT.fullmatch(path.name)
    if number is None or not run.config_file.is_file():
        return
    archs = run.config.architectures
    if int(number[1]) >= len(archs) or archs[int(number[1])] != arch or facts != run.facts:
        raise UserError(
            f"{path} is of another run, its architecture or data are not those in "
            f"{run.config_file.name}: restore it, or give it another name"
        )


def build_student(arch: str, facts: DataFacts, state: dict[str, Tensor]) -> nn.Module:
    """Build a network from its ``state_dict``: in evaluation mode, on the CPU."""
    create = create_embedding_net if facts.retrieval else create_model
    model = create(
        arch,
        num_classes=len(facts.classes),
        in_channels=facts.in_channels,
        image_size=facts.image_size,
    )
    model.load_state_dict(state)
    return model.eval()
