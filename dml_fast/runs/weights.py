"""A student's weights, or an ensemble's, in a safetensors file that tells how to build networks."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dml_fast.errors import UserError
from dml_fast.foreign import Unfit, reading, typed
from dml_fast.models import check_code
from dml_fast.models.ensemble import EnsembleNet
from dml_fast.models.heads import new_network
from dml_fast.models.safetensors_files import HEADER, NO_SEAL, SEAL, read_safetensors, seal
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.files import atomic_write
from dml_fast.runs.folder import Run
from dml_fast.version import __version__

# in a run folder
_STUDENT = re.compile(r"student_(\d{1,9})(-best|-last)?(-ema)?\.safetensors")
_ENSEMBLE = re.compile(r"ensemble(-best|-last)?(-ema)?\.safetensors")


def header_of(arch: str, facts: DataFacts, view: int = 0) -> str:
    """Return the JSON that every file of a student carries beside its weights."""
    return json.dumps({"version": __version__, "arch": arch, "view": view, **facts.to_json()})


def ensemble_header(archs: Sequence[str], facts: DataFacts) -> str:
    """Return the JSON that every file of an ensemble carries beside its weights."""
    return json.dumps({"version": __version__, "archs": list(archs), **facts.to_json()})


def save_student(
    path: Path, state: dict[str, Tensor], arch: str, facts: DataFacts, view: int = 0
) -> None:
    """Write a student.

    Args:
        path: the new file.
        state: the model's ``state_dict``.
        arch: its name for ``create_model``.
        facts: of the run's data; they are in the file's header.
        view: which of the data's views the student reads.
    """
    _write(path, state, header_of(arch, facts, view))


def save_ensemble(
    path: Path, states: Sequence[Mapping[str, Tensor]], archs: Sequence[str], facts: DataFacts
) -> None:
    """Write K students into one file: the tensors of student k are named ``student_k.NAME``.

    Args:
        path: the new file.
        states: the ``state_dict`` of each student's model.
        archs: the name of each for ``create_model``.
        facts: of the run's data; they are in the file's header.
    """
    tensors = {
        f"student_{k}.{name}": t for k, state in enumerate(states) for name, t in state.items()
    }
    _write(path, tensors, ensemble_header(archs, facts))


def _write(path: Path, state: Mapping[str, Tensor], header: str) -> None:
    tensors = {  # no shared storage and no channels_last: the format refuses both
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    # one key: several are written in random order
    metadata = {HEADER: json.dumps(json.loads(header) | {SEAL: NO_SEAL})}
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
        The network in evaluation mode on the CPU, and the file's header: ``arch``, ``version``,
        ``view``, which is the place in ``inputs`` of what the network takes, and the data's facts
        (see `DataFacts.to_json`).

    Raises:
        UserError: it is not such a file, names code that is not allowed, or lies in the folder of
            another run under the name of its student.
    """
    state, header = _read(path)
    if "archs" in header:
        raise UserError(f"{path} is an ensemble: read it with load_ensemble")
    with reading(path):
        arch, facts = header["arch"], DataFacts.from_json(header, "its header")
        view = view_of(header, facts)
        if not isinstance(arch, str):
            raise TypeError("arch is no name")
    check_code([arch], allow_code, path, "give load_student allow_code=[{!r}]")
    _check_run(Path(path), arch, facts, view)
    with reading(path):
        return build_student(arch, facts, state, view), {**header, **facts.to_json(), "view": view}


def load_ensemble(
    path: str | Path, allow_code: Collection[str] = ()
) -> tuple[EnsembleNet, dict[str, Any]]:
    """Read an ensemble.

    Args:
        path: a file that `save_ensemble` wrote.
        allow_code: as in `load_student`.

    Returns:
        The network on the CPU, ``forward(*inputs)`` with one input for each of the data's views;
        its ``students`` are the K networks. And the file's header: ``archs``, ``version``, and the
        data's facts.

    Raises:
        UserError: as `load_student`.
    """
    state, header = _read(path)
    if "arch" in header:
        raise UserError(f"{path} is one student: read it with load_student")
    with reading(path):
        archs = tuple(typed(header["archs"], list[str], "archs"))
        facts = DataFacts.from_json(header, "its header")
        if not len(facts.inputs) <= len(archs):
            raise Unfit(f"it has {len(archs)} students and {len(facts.inputs)} views")
    check_code(archs, allow_code, path, "give load_ensemble allow_code=[{!r}]")
    run = Run(Path(path).parent)
    named = _ENSEMBLE.fullmatch(Path(path).name) and run.config_file.is_file()
    if named and (archs != run.config.architectures or facts != run.facts):
        raise _of_another_run(path, run)
    states: list[dict[str, Tensor]] = [{} for _ in archs]
    with reading(path):
        for name, tensor in state.items():
            student, _, rest = name.partition(".")
            states[int(student.removeprefix("student_"))][rest] = tensor
        models = [
            build_student(arch, facts, mine, facts.view_of(k))
            for k, (arch, mine) in enumerate(zip(archs, states, strict=True))
        ]
    return ensemble_of(models, facts), {**header, **facts.to_json()}


def ensemble_of(models: Sequence[nn.Module], facts: DataFacts) -> EnsembleNet:
    """Return all students of a run as one network.

    Args:
        models: the network of each; where they learned identities it may lack the classifier.
        facts: of the data that they were trained on.
    """
    return EnsembleNet(models, [facts.view_of(k) for k in range(len(models))], facts.answer)


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file of ours, and its header."""
    with reading(path, "check the path, or restore it"):
        tensors, header = read_safetensors(Path(path))
        state = {name: tensor.read() for name, tensor in tensors.items()}
    if not header:
        raise UserError(f"{path} is not a student of dml_fast: check the path")
    return state, header


def view_of(header: Mapping[str, Any], facts: DataFacts) -> int:
    """Return which of the data's views a student reads, by its file's header.

    Raises:
        Unfit: there is no such view.
    """
    view: int = typed(header.get("view", 0), int, "view")  # our oldest files have none
    if not 0 <= view < len(facts.inputs):
        raise Unfit(f"view is {view} of {len(facts.inputs)} views")
    return view


def _check_run(path: Path, arch: str, facts: DataFacts, view: int) -> None:
    """Refuse a file with the name of a run's student, in its folder, that is of another run."""
    run = Run(path.parent)
    number = _STUDENT.fullmatch(path.name)
    if number is None or not run.config_file.is_file():
        return
    archs, k = run.config.architectures, int(number[1])
    known = facts == run.facts and view == facts.view_of(k)
    if k >= len(archs) or archs[k] != arch or not known:
        raise _of_another_run(path, run)


def _of_another_run(path: str | Path, run: Run) -> UserError:
    return UserError(
        f"{path} is of another run, its architecture or data are not those in "
        f"{run.config_file.name}: restore it, or give it another name"
    )


def build_student(
    arch: str, facts: DataFacts, state: dict[str, Tensor], view: int = 0
) -> nn.Module:
    """Build a network from its ``state_dict``: in evaluation mode, on the CPU."""
    model = new_network(arch, len(facts.classes), facts.inputs[view], facts.head)
    model.load_state_dict(state)
    return model.eval()
