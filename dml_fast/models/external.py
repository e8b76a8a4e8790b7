"""Networks from other packages: timm, torchvision, and any function on Python's path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn

from dml_fast.errors import UserError, first_line


def from_timm(
    *, name: str, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build a timm network without pre-trained weights.

    Networks made for one image size (vision transformers, mixers) get that of these images.

    Raises:
        UserError: timm lacks the network, or cannot build it for such images.
    """
    timm: Any = import_module("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    published = timm.models.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    return _build(
        f"timm:{name}",
        lambda: timm.create_model(name, pretrained=False, **options),
        num_classes,
        in_channels,
        image_size,
    )


def from_torchvision(
    *, name: str, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build a torchvision classifier without pre-trained weights.

    Raises:
        UserError: torchvision lacks the network, it cannot be built for such images, or they do
            not have 3 channels, which torchvision's networks require.
    """
    if in_channels != 3:
        raise UserError(
            f"torchvision:{name} takes images of 3 channels and these have {in_channels}: use a "
            f"built-in network or timm:NAME"
        )
    models: Any = import_module("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    options: dict[str, Any] = {"num_classes": num_classes}
    height, width = image_size
    if name.startswith("vit_"):
        if height != width:
            raise UserError(
                f"torchvision:{name} takes square images and these are {height} x {width}: "
                "use another network or resize them"
            )
        options["image_size"] = height
    elif name.startswith("maxvit"):
        options["input_size"] = image_size
    elif name in ("googlenet", "inception_v3"):
        # Auxiliary classifiers make them return a tuple in training; the loss needs logits alone.
        options |= {"aux_logits": False, "init_weights": True}
    return _build(
        f"torchvision:{name}",
        lambda: models.get_model(name, weights=None, **options),
        num_classes,
        in_channels,
        image_size,
    )


def from_function(
    *, name: str, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build a network with the function that ``package.module:function`` names.

    Raises:
        UserError: there is no such function, it does not take the three keywords, or what it
            returns does not map such images to logits.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # importing a module runs it, and it may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{name!r}: cannot import {module_name} ({reason}): check it") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{name!r}: {module_name} has no function {function_name!r}")
    keywords = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        inspect.signature(function).bind(**keywords)
    except TypeError as error:
        raise UserError(
            f"{name!r} cannot be called ({error}): it must accept the keywords "
            "(num_classes: int, in_channels: int, image_size: tuple[int, int]) "
            "and return a torch.nn.Module"
        ) from error
    return _build(name, lambda: function(**keywords), num_classes, in_channels, image_size)


def _build(
    name: str,
    build: Callable[[], Any],
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
) -> nn.Module:
    """Build a network, and check on two blank images that it gives logits of the right shape."""
    shape = (2, in_channels, *image_size)
    subject = f"{name} with images of {in_channels} x {image_size[0]} x {image_size[1]}"
    try:
        net = build()
    except Exception as error:
        raise UserError(f"{subject}: cannot be built: {first_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise UserError(f"{name}: returned a {type(net).__name__}, not a torch.nn.Module")
    # Evaluation mode changes neither batch normalisation's statistics nor the random generator.
    modes = {module: module.training for module in net.modules()}
    net.eval()
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            output = net(torch.zeros(shape, device=device))
    except Exception as error:
        raise UserError(f"{subject}: its forward pass failed: {first_line(error)}") from error
    for module, training in modes.items():
        module.training = training
    got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if got != (2, num_classes):
        raise UserError(
            f"{subject}: a batch of 2 gives {got}, and must give logits of shape (2, {num_classes})"
        )
    return net


def _unknown(package: str, name: str, known: list[str]) -> UserError:
    nearest = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f": the nearest are {', '.join(nearest)}" if nearest else ""
    return UserError(f"{package} has no network {name!r}{hint} (its list: {package} list_models())")
