"""Weights to start from: those that timm publishes, a file's, or a run's.

Torch is imported only when weights are read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_fast.errors import UserError, first_line
from dml_fast.foreign import reading, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dml_fast.models.matching import Match
    from dml_fast.models.stored import Stored

_LISTED = 3  # names in a message
_log = logging.getLogger("dml_fast")


def check_pretrained(source: str, names: Sequence[str]) -> None:
    """Check what can be checked without reading weights.

    Args:
        source: ``timm``, a file or the folder of a run.
        names: the students' architectures.

    Raises:
        UserError: there is no such file or run, it is of no known kind, or a network is not timm's.
    """
    if source == "timm":
        for name in names:
            _timm_name(name)
        return
    path = Path(source).expanduser()
    if is_run(source):
        return
    if path.is_dir():
        raise UserError(
            f"--pretrained {source} is a folder, and not one of a run: give timm, a run or "
            "a file of weights"
        )
    if not path.is_file():
        raise UserError(
            f"--pretrained {source} does not exist: give timm, a run or a file of weights"
        )
    _kind(path)


def is_run(source: str) -> bool:
    """Return whether ``source`` is the folder of a run, or one of its checkpoints."""
    if source in ("", "timm"):
        return False
    path = Path(source).expanduser()
    if path.name in ("best.pt", "last.pt", "previous.pt") and (path.is_dir() or path.is_file()):
        path = path.parent
    config = path / "config.json"
    return config.is_file() and b'"dml_fast"' in config.read_bytes()  # others have that name too


def load_pretrained(
    model: nn.Module,
    source: str,
    arch: str,
    state: Mapping[str, Tensor] | None = None,
    *,
    option: str = "--pretrained",
    whole: bool = False,
) -> None:
    """Load weights into a network, in place.

    Tensors are matched by name and shape; `dml_fast.models.matching` tells where they may be in a
    file. Every tensor of the network must be found and finite, except those of its classifier: the
    last linear layer, or everything but the backbone of an `EmbeddingNet` or a `HashNet`; and of
    further layers with as many outputs, if theirs has another number. One line of the log says what
    was taken, what is new and what was left.

    Args:
        model: of `dml_fast.models.heads.new_network`.
        source: ``timm``, a ``.safetensors`` file or one of ``torch.save``, whatever its name.
        arch: the network's name.
        state: what ``source`` holds, if it was read already.
        option: by which the user gives ``source``.
        whole: whether the classifier is taken too, and must fit.

    Raises:
        UserError: the weights cannot be read or do not fit.
    """
    from dml_fast.models.embedding import EmbeddingNet, last_linear
    from dml_fast.models.hashing import HashNet
    from dml_fast.models.matching import best_match

    found: Any
    if state is not None:
        found = _stored(state)
    elif source == "timm":
        found = _stored(_published(arch))
    else:
        found = read_weights(Path(source).expanduser())
    given = f"{option} {source}"
    if whole:
        target, classifier = model, None
    elif isinstance(model, EmbeddingNet | HashNet):
        target, classifier = model.backbone, None
    else:
        target, classifier = model, last_linear(model)
    wanted = {
        name: tensor
        for name, tensor in target.state_dict().items()
        if classifier is None or not name.startswith(f"{classifier}.")
    }
    match = best_match(found, wanted)
    if match is None:
        raise UserError(
            f"{given} holds no state dict: give one, such as "
            "torch.save(model.state_dict(), file) makes"
        )
    new = _new_layers(model, target, classifier)
    new += _other_heads(target, classifier, match.tensors)
    wanted = {n: tensor for n, tensor in wanted.items() if n.rpartition(".")[0] not in new}
    _check_fit(wanted, match, given, arch)
    with reading(given, "replace it"):
        taken = {name: match.tensors[name].read() for name in wanted if name in match.tensors}
    _check_values(taken, dict(target.named_parameters()), given)
    target.load_state_dict(taken, strict=False)
    _log.info(
        "%s: %d tensors are those of %s%s%s; new: %s; not used: %s",
        arch,
        len(taken),
        shown(source),
        f" under {shown(match.place)}" if match.place else "",
        f" (also under {shown(', '.join(match.others))})" if match.others else "",
        _listed([f"{name}.*" for name in new]),
        _listed(match.unused),
    )


def read_weights(path: Path) -> Any:
    """Read a file of weights, without running any code in it.

    Args:
        path: a file in the safetensors format or of ``torch.save``.

    Returns:
        What it holds, where each tensor is a `Stored`.

    Raises:
        UserError: it is damaged or of another kind.
    """
    from dml_fast.models.safetensors_files import read_safetensors
    from dml_fast.models.torch_files import read_torch_file

    kind = _kind(path)
    with reading(f"--pretrained {path}", "replace it"):
        return read_safetensors(path)[0] if kind == "safetensors" else read_torch_file(path)


def _new_layers(model: nn.Module, target: nn.Module, classifier: str | None) -> list[str]:
    if target is model:
        return [classifier] if classifier else []
    return [name for name, module in model.named_children() if module is not target]


def _other_heads(
    target: nn.Module, classifier: str | None, found: Mapping[str, Stored]
) -> list[str]:
    """Return further layers with an output for each class, such as auxiliary ones, of other sizes.

    The classifier itself is not among them.
    """
    from torch.nn import Linear

    classes = target.get_submodule(classifier).out_features if classifier else None
    return [
        name
        for name, layer in target.named_modules()
        if isinstance(layer, Linear)
        and layer.out_features == classes
        and name != classifier
        and (stored := found.get(f"{name}.weight")) is not None
        and stored.shape != tuple(layer.weight.shape)
    ]


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return shown(", ".join(names[:_LISTED])) + more


def _stored(state: Mapping[str, Tensor]) -> dict[str, Stored]:
    from dml_fast.models.stored import Stored

    def reader(tensor: Tensor) -> Any:
        return lambda: tensor

    return {name: Stored(tuple(t.shape), t.dtype, reader(t)) for name, t in state.items()}


def _check_fit(wanted: Mapping[str, Tensor], match: Match, given: str, arch: str) -> None:
    """Refuse weights that do not fit; a count of batches that is missing or a float is left out."""
    bad, found = [], match.tensors
    for name, tensor in wanted.items():
        stored = found.get(name)
        counts = name.endswith("num_batches_tracked")  # older files lack it
        if stored is None:
            bad += [] if counts else [f"{name} is missing"]
        elif stored.problem:
            bad.append(f"{name} is {stored.problem}")
        elif stored.shape != tuple(tensor.shape):
            bad.append(f"{name} is {stored.shape} and not {tuple(tensor.shape)}")
        elif (
            stored.dtype.is_complex or stored.dtype.is_floating_point != tensor.is_floating_point()
        ):
            if counts:
                del found[name]
            else:
                bad.append(f"{name} is of {stored.dtype} and not {tensor.dtype}")
    if bad:
        raise UserError(
            f"{given} does not fit {arch}: {len(bad)} of {len(wanted)} "
            f"tensors differ ({bad[0]}); not used: {_listed(match.unused)}: give weights of "
            "this architecture"
        )


def _check_values(taken: Mapping[str, Tensor], parameters: Mapping[str, Any], given: str) -> None:
    """Refuse NaN; in parameters and statistics also infinity and what float32 cannot hold."""
    for name, tensor in taken.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float()
        finite = name in parameters or "running_" in name
        bad = ~values.isfinite() if finite else values.isnan()
        if bad.any():
            raise UserError(
                f"{given}: {int(bad.sum())} numbers of {name} are NaN "
                "or infinite: give other weights"
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


def _kind(path: Path) -> str:
    """Return ``safetensors`` or ``torch``, by a file's first bytes: names say little.

    Raises:
        UserError: it is neither, or cannot be read.
    """
    with reading(f"--pretrained {path}", "check it"), path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        return "safetensors"
    if head.startswith((b"PK", b"\x80")):
        return "torch"
    raise UserError(
        f"--pretrained {path} is no file of weights: give one in the safetensors format, or "
        "one that torch.save made"
    )
