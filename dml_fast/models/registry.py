"""From an architecture's name to a network, without importing torch until one is built.

Every name resolves to a ``module:function`` target and the options for its call, so that a
misspelt ``--arch`` is refused within milliseconds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dml_fast.errors import UserError, brief, check_whole
from dml_fast.models.inputs import InputSpec, Kind

if TYPE_CHECKING:
    from torch import nn

_RESNET_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
_ZOOS = ("timm", "torchvision")
_FORMS = (
    "other forms are wrn_DEPTH_WIDTH, wrn_DEPTH_WIDTH_dropP, inception_v1_dropP, "
    "mlp_WIDTH and mlp_WIDTH_dropP for vectors, displacement_WIDTH for pairs, "
    "timm:NAME, torchvision:NAME and package.module:function"
)
_WIDEST = {"mlp": 1_000_000, "displacement": 1024}  # units or channels of a hidden layer
DEFAULTS: dict[Kind, str] = {
    "image": "resnet32",
    "vector": "mlp_64",
    "pair": "displacement_16",
}
"""The network for inputs of a kind, where none is named."""


@dataclass(frozen=True)
class _Recipe:
    """How to build a network: ``target`` is "module:function", ``options`` are further keywords.

    ``takes`` is the kind of input that it is for.
    """

    target: str
    options: dict[str, Any] = field(default_factory=dict)
    takes: Kind = "image"


_NAMED = {
    **{
        f"resnet{d}": _Recipe("dml_fast.models.resnet:resnet", {"depth": d}) for d in _RESNET_DEPTHS
    },
    "wrn_16_4": _Recipe("dml_fast.models.wide_resnet:wide_resnet", {"depth": 16, "width": 4}),
    "wrn_28_10": _Recipe("dml_fast.models.wide_resnet:wide_resnet", {"depth": 28, "width": 10}),
    "mobilenet_v1": _Recipe("dml_fast.models.mobilenet:mobilenet_v1"),
    "inception_v1": _Recipe("dml_fast.models.inception:inception_v1"),
    "mlp_64": _Recipe("dml_fast.models.mlp:mlp", {"width": 64}, "vector"),
    "displacement_16": _Recipe("dml_fast.models.displacement:displacement", {"width": 16}, "pair"),
}
_ALIASES = {"resnet50": "timm:resnet50"}


def model_names() -> list[str]:
    """Return the names of the built-in networks, in a readable order (ResNets by depth)."""
    return list(_NAMED)


def check_model_name(name: str, kind: Kind | None = None) -> None:
    """Check that ``name`` can be built here, without importing torch.

    Args:
        name: a built-in name (`model_names()`), ``wrn_DEPTH_WIDTH``, ``mlp_WIDTH``,
            ``displacement_WIDTH``, ``timm:NAME``, ``torchvision:NAME`` or
            ``package.module:function``. Networks with dropout take its probability as a suffix:
            ``wrn_28_10_drop0.3``, ``inception_v1_drop0.4``, ``mlp_64_drop0``. ``mlp_WIDTH`` is for
            vectors, ``displacement_WIDTH`` is for pairs, all others are for images.
        kind: of the inputs that the network will get, if that is known.

    Raises:
        UserError: the name is unknown or malformed, its package is not installed, or the network
            is for inputs of another kind.
    """
    recipe = _find_recipe(name)
    if kind is not None:
        _check_kind(name, recipe, kind)


def names_code(name: str) -> bool:
    """Return whether ``name`` is a ``package.module:function``, which is imported and called."""
    return ":" in name and name.partition(":")[0] not in _ZOOS


def check_code(names: Iterable[str], allowed: Iterable[str], where: object, advice: str) -> None:
    """Refuse ``package.module:function`` that only a file names: to build it is to run code.

    Args:
        names: the architectures that a file names.
        allowed: those that the user names.
        where: the file or folder.
        advice: how the user allows one, with ``{}`` for its name.

    Raises:
        UserError: a function is not allowed.
    """
    for name in names:
        if names_code(name) and name not in allowed:
            raise UserError(
                f"{where} names code to run, {name}: if you trust it, {advice.format(name)}"
            )


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    inputs: InputSpec | None = None,
) -> nn.Module:
    """Build a network by name, initialised from torch's global random generator only.

    Two networks of the same name differ only by the state of that generator.

    Args:
        name: see `check_model_name`. A ``package.module:function`` is called with the keywords
            ``num_classes`` (int), ``in_channels`` (int) and ``image_size`` (a pair H, W).
        num_classes: C, the number of logits.
        in_channels: channels of the images.
        image_size: height and width in pixels; one number means a square.
        inputs: what the network gets, images, vectors or pairs; it replaces ``in_channels`` and
            ``image_size``, which are for images.

    Returns:
        A module that maps images (N, in_channels, H, W), vectors (N, D), or pairs
        (N, *tensor_shape), to logits (N, C). The built-in networks for images and vectors are
        `dml_fast.models.base.FeatureNet`, which also give the features before the classifier.

    Raises:
        UserError: the name is unknown, its package is missing, or the network cannot be built
            for such inputs.
    """
    recipe = _find_recipe(name)
    check_whole(f"{name}: num_classes", num_classes, 1)
    if inputs is None:
        inputs = _images(name, in_channels, image_size)
    if not isinstance(inputs, InputSpec):
        raise UserError(f"{name}: inputs is {brief(inputs)}: give an InputSpec of dml_fast.models")
    _check_kind(name, recipe, inputs.kind)
    shape = inputs.shape
    sizes: dict[str, Any] = {"size": shape[0]}
    if inputs.kind == "image":
        sizes = {"in_channels": shape[0], "image_size": shape[1:]}
    elif inputs.kind == "pair":
        sizes = {"channels": shape[:2], "search": shape[3]}
    module, function = recipe.target.split(":")
    build: Callable[..., nn.Module] = getattr(import_module(module), function)
    return build(num_classes=num_classes, **sizes, **recipe.options)


def _images(name: str, channels: int, image_size: int | tuple[int, int]) -> InputSpec:
    pair = isinstance(image_size, tuple | list) and len(image_size) == 2
    sides: Any = image_size if pair else (image_size, image_size)
    labels = ("in_channels", "image_size (height)", "image_size (width)")
    shape = (channels, *sides)
    for label, value in zip(labels, shape, strict=True):
        check_whole(f"{name}: {label}", value, 1)
    return InputSpec("image", shape)


def _check_kind(name: str, recipe: _Recipe, kind: Kind) -> None:
    if recipe.takes != kind:
        raise UserError(
            f"{name} is a network for {recipe.takes}s and its inputs are {kind}s: take a network "
            f"for {kind}s, such as {DEFAULTS[kind]}"
        )


def _find_recipe(name: str) -> _Recipe:
    name = _ALIASES.get(name, name)
    if ":" in name:
        return _find_external(name)
    base, found, text = name.partition("_drop")
    recipe = _NAMED.get(base) or _wide_resnet(base) or _of_width(base)
    if recipe is None:
        raise UserError(_unknown(name))
    if not found:
        return recipe
    if not base.startswith(("wrn_", "inception_", "mlp_")):
        raise UserError(f"{base} has no dropout: write {base!r} instead of {name!r}")
    if not re.fullmatch(r"0(\.\d+)?|\.\d+", text):
        raise UserError(
            f"{name!r}: the dropout probability {text!r} must be in [0, 1), as in {base}_drop0.3"
        )
    return replace(recipe, options={**recipe.options, "dropout": float(text)})


def _wide_resnet(name: str) -> _Recipe | None:
    match = re.fullmatch(r"wrn_(\d+)_(\d+)", name)
    if match is None:
        return None
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise UserError(
            f"{name!r}: a wide ResNet's depth is 6n + 4 (10, 16, 22, 28, ...) "
            "and its width at least 1, as in wrn_28_10"
        )
    return _Recipe("dml_fast.models.wide_resnet:wide_resnet", {"depth": depth, "width": width})


def _of_width(name: str) -> _Recipe | None:
    match = re.fullmatch(r"(mlp|displacement)_(\d+)", name)
    if match is None:
        return None
    example = {"mlp": "mlp_64", "displacement": "displacement_16"}[match[1]]
    most = _WIDEST[match[1]]
    if len(match[2]) > 7 or not 1 <= int(match[2]) <= most:
        raise UserError(f"{name!r}: the width is a number from 1 to {most}, as in {example}")
    return replace(_NAMED[example], options={"width": int(match[2])})


def _find_external(name: str) -> _Recipe:
    package, _, rest = name.partition(":")
    if package in _ZOOS:
        if not rest:
            raise UserError(
                f"{name!r}: write the network's name after the colon, as {package}:NAME"
            )
        if find_spec(package) is None:
            raise UserError(f"{name!r} needs {package}: pip install 'dml_fast[zoo]'")
        return _Recipe(f"dml_fast.models.external:from_{package}", {"name": rest})
    if not all(part.isidentifier() for part in [*package.split("."), rest]):
        raise UserError(f"{name!r} is not of the form package.module:function; {_FORMS}")
    # Only the top-level package: looking for a submodule would import it, and perhaps torch.
    top = package.split(".")[0]
    if top not in sys.modules and find_spec(top) is None:
        raise UserError(
            f"{name!r}: there is no module {top!r} on Python's path: install it or set PYTHONPATH"
        )
    return _Recipe("dml_fast.models.external:from_function", {"name": name})


def _unknown(name: str) -> str:
    plain = name.lower().replace("-", "_")
    nearest = get_close_matches(plain, _NAMED, n=3, cutoff=0.5)
    listing = ", ".join(nearest or _NAMED)
    label = "the nearest are" if nearest else "the built-in ones are"
    return f"unknown architecture {name!r}: {label} {listing}; {_FORMS}"
