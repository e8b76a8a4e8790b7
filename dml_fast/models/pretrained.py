"""Weights to start from: those that timm publishes, or a file's. The classifier is always new.

Torch is imported only when weights are read.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_fast.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict", "model")  # keys under which other programs store a state dict
_log = logging.getLogger("dml_fast")


def check_pretrained(source: str, names: Sequence[str]) -> None:
    """Check what can be checked without reading weights.

    Args:
        source: ``timm`` or a file.
        names: the students' architectures.

    Raises:
        UserError: there is no such file, or a network is not timm's.
    """
    if source == "timm":
        for name in names:
            _timm_name(name)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"--pretrained {source} does not exist: give timm, or a file of weights")
    if path.suffix not in _SUFFIXES:
        raise UserError(
            f"--pretrained {source} is of no known kind: give timm, or a file that ends in "
            f"{', '.join(_SUFFIXES)}"
        )


def load_pretrained(model: nn.Module, source: str, arch: str) -> None:
    """Load weights into a network, in place.

    Tensors are matched by name and shape. Every tensor of the network must be found, except those
    of its classifier: the last linear layer, or everything but the backbone of an `EmbeddingNet`.

    Args:
        model: from `create_model` or `create_embedding_net`.
        source: ``timm``; a ``.safetensors`` file, such as a trained student's; or a ``.pth``,
            ``.pt`` or ``.bin`` file of a state dict, bare or under ``state_dict`` or ``model``.
        arch: the network's name.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    from dml_fast.models.embedding import EmbeddingNet, last_linear

    check_pretrained(source, [arch])
    found = _published(arch) if source == "timm" else _read(Path(source).expanduser())
    if found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    # in an embedding student's file, the backbone has the names of the plain network
    found = {name.removeprefix("backbone."): tensor for name, tensor in found.items()}
    if isinstance(model, EmbeddingNet):
        target, classifier = model.backbone, None
    else:
        target, classifier = model, last_linear(model)
    wanted = {
        name: tensor
        for name, tensor in target.state_dict().items()
        if classifier is None or not name.startswith(f"{classifier}.")
    }
    _check_fit(wanted, found, source, arch)
    target.load_state_dict({n: found[n] for n in wanted if n in found}, strict=False)
    unused = sorted(found.keys() - wanted.keys())
    if unused:
        _log.info(
            "%s: %d tensors of %s were not used, %s first", arch, len(unused), source, unused[0]
        )


def _check_fit(wanted: dict[str, Tensor], found: dict[str, Tensor], source: str, arch: str) -> None:
    bad = []
    for name, tensor in wanted.items():
        if name not in found:
            if not name.endswith("num_batches_tracked"):  # older files lack it
                bad.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            shapes = (tuple(found[name].shape), tuple(tensor.shape))
            bad.append(f"{name} is {shapes[0]} and not {shapes[1]}")
    if bad:
        raise UserError(
            f"--pretrained {source} does not fit {arch}: {len(bad)} of {len(wanted)} tensors "
            f"differ ({bad[0]}): give weights of this architecture"
        )


def _timm_name(arch: str) -> str:
    if arch == "resnet50":
        return arch
    package, _, name = arch.partition(":")
    if package != "timm" or not name:
        raise UserError(
            f"--pretrained timm has no weights for {arch}: give --arch timm:NAME, or a file"
        )
    return name


def _published(arch: str) -> dict[str, Tensor]:
    name = _timm_name(arch)
    timm: Any = import_module("timm")
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # no weights, no connection, a full disk: all kinds
        raise UserError(
            f"the weights that timm publishes for {name} cannot be loaded ({first_line(error)}): "
            "fetch them where there is a network, and give the file with --pretrained"
        ) from error
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--pretrained {path} was not loaded, it holds objects that could run code: give a "
            "plain state dict"
        ) from None
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"--pretrained {path} is damaged ({first_line(error)}): replace it"
        ) from None
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in content.items()
    ):
        raise UserError(f"--pretrained {path} holds no state dict: give one, bare or under 'model'")
    return content
