"""How a model is called with a step's inputs, and which of its outputs are the logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dml_fast.errors import UserError, brief


class Call:
    """Calls a model, or what runs its passes, as its ``forward`` takes the inputs.

    A mapping becomes keywords and a tuple or list positions where ``forward`` takes them so:
    ``forward(input_ids, attention_mask)`` gets both from a tokenizer's output. Everything else, and
    a mapping or tuple that ``forward`` takes as one argument, is given as it is.

    Args:
        model: whose ``forward`` decides.
    """

    def __init__(self, model: nn.Module) -> None:
        forward = getattr(model, "_orig_mod", model).forward  # of torch.compile's wrapper
        try:
            self._signature: inspect.Signature | None = inspect.signature(forward)
        except (TypeError, ValueError):  # a scripted module's
            self._signature = None
        self._known: dict[object, bool] = {}

    def __call__(self, work: Callable[..., Any], inputs: Any) -> Any:
        """Return ``work`` of the inputs; ``work`` takes what the model's ``forward`` does."""
        if isinstance(inputs, Mapping):
            if self._takes(tuple(inputs), (), inputs):
                return work(**inputs)
        elif isinstance(inputs, tuple | list) and self._takes(len(inputs), inputs, {}):
            return work(*inputs)
        return work(inputs)

    def _takes(self, form: object, args: Any, keywords: Mapping[Any, Any]) -> bool:
        """Return whether ``forward`` takes these apart; the answer is kept by their form."""
        if form not in self._known:
            self._known[form] = self._binds(args, keywords)
        return self._known[form]

    def _binds(self, args: Any, keywords: Mapping[Any, Any]) -> bool:
        if self._signature is None or not all(isinstance(name, str) for name in keywords):
            return False
        try:
            self._signature.bind(*args, **keywords)
        except TypeError:
            return False
        return True


def is_compiled(model: nn.Module, *passes: object) -> bool:
    """Return whether `torch.compile` has made a part of a network, or one of the passes given.

    Found are modules, and functions that are attributes of a module or of its class.
    """
    modules = [
        one for given in (model, *passes) if isinstance(given, nn.Module) for one in given.modules()
    ]
    if any("_orig_mod" in one._modules or one._compiled_call_impl is not None for one in modules):
        return True
    owners = [*modules, *{kind for one in modules for kind in type(one).__mro__}]
    held = [*passes, *(value for owner in owners for value in vars(owner).values())]
    return any("_torchdynamo_orig_callable" in getattr(one, "__dict__", ()) for one in held)


def check_kinds(whose: str, call: str, **given: tuple[object, type]) -> None:
    """Refuse arguments of another type.

    Args:
        whose: they are, for the message.
        call: how they are given.
        given: each argument with the type that it must have.

    Raises:
        UserError: the first that is something else.
    """
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise UserError(
                f"the {name} of {whose} is {brief(value)}: give a {kind.__name__}, in the order "
                f"{call}"
            )


def logits_of(found: Any, arch: str) -> Tensor:
    """Return the logits among a model's outputs: a tensor, or the ``logits`` of an object.

    Args:
        found: what the model returned.
        arch: its name, for the message.

    Raises:
        UserError: there are none. A tuple is refused even if it names its logits, as it may hold
            logits of other heads, which would not be trained.
    """
    if not isinstance(found, Tensor | tuple):
        inner = (
            found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
        )
        if isinstance(inner, Tensor):
            return inner
    if isinstance(found, Tensor):
        return found
    raise UserError(
        f"the model of a student ({arch}) returned {brief(found)} in place of logits (N, C), or of "
        "an object that has them as .logits: wrap it in a module whose forward returns the logits "
        "alone"
    )
