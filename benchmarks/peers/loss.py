"""Ways to the cohort's losses and their gradients: what users write, what they could pick, ours.

All do one job: from K logits (N, C), leaves that require gradients, and a target (N,), to the
losses (K,) and the K gradients of their sum, with the paper's defaults. bf16 logits are widened to
fp32 as autocast would, and the gradients come back as bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_fast.errors import UserError
from dml_fast.kernels.availability import unavailable_reason
from dml_fast.loss import backends, mutual_loss, mutual_loss_and_grad

Losses = Callable[[list[Tensor], Tensor], Tensor]  # K x (N, C), (N,) -> (K,)
Run = Callable[[list[Tensor], Tensor], tuple[Tensor, Sequence[Tensor]]]  # the gradients as well

Function = TypeVar("Function", Losses, Run)

COMPILE = " + compile"
AUTOTUNE = " + max-autotune"
MODES = {COMPILE: None, AUTOTUNE: "max-autotune-no-cudagraphs"}  # of torch.compile
AUTOGRAD = " autograd"


class AbsentError(Exception):
    """This contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to losses and gradients."""

    name: str
    run: Run
    spoils_logits: bool = False
    """Writes gradients over the logits, which must be put back before the next call."""
    waits: bool = False
    """Reads values of the device on the host, so no CUDA graph can hold it."""


def naive(logits: list[Tensor], target: Tensor) -> Tensor:
    """As most re-implementations have it: K(K-1) calls of F.kl_div, two softmaxes each."""
    return torch.stack(naive_losses(logits, target))


def naive_losses(logits: list[Tensor], target: Tensor) -> list[Tensor]:
    """The same, each student's loss apart."""
    losses = []
    for k, z in enumerate(logits):
        kl: Tensor | float = 0.0
        for j, other in enumerate(logits):
            if j != k:
                log_q = F.log_softmax(z, 1, dtype=torch.float32)
                p = F.softmax(other.detach(), 1, dtype=torch.float32)
                kl = kl + F.kl_div(log_q, p, reduction="batchmean")
        losses.append(F.cross_entropy(z.float(), target) + kl / max(1, len(logits) - 1))
    return losses


def careful(logits: list[Tensor], target: Tensor) -> Tensor:
    """Use one log-softmax per student and make pairs from those, as a careful user would."""
    log_qs = [F.log_softmax(z, 1, dtype=torch.float32) for z in logits]
    ps = [log_q.detach().exp() for log_q in log_qs]
    losses = []
    for k, log_q in enumerate(log_qs):
        loss = F.nll_loss(log_q, target)
        others = [F.kl_div(log_q, p, reduction="batchmean") for j, p in enumerate(ps) if j != k]
        if others:
            loss = loss + torch.stack(others).sum() / len(others)
        losses.append(loss)
    return torch.stack(losses)


def liger() -> Losses:
    """Composed of Liger-Kernel's cross-entropy and KL kernels, as sparing as they allow.

    Its cross-entropy writes the gradient over the logits, so the softmaxes come first. Summed and
    scaled once, the KL's backward spares a pass over its gradient that "batchmean" takes.
    """
    if not torch.cuda.is_available():
        raise AbsentError("Liger's kernels need a GPU")
    if find_spec("liger_kernel") is None:
        raise AbsentError("liger-kernel is not installed")
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    cross_entropy = LigerCrossEntropyLoss()
    kl_div = LigerKLDIVLoss(reduction="sum", log_target=True)

    def losses(logits: list[Tensor], target: Tensor) -> Tensor:
        log_qs = [F.log_softmax(z, 1, dtype=torch.float32) for z in logits]
        share = 1 / (len(target) * max(1, len(logits) - 1))
        found = []
        for k, (z, log_q) in enumerate(zip(logits, log_qs, strict=True)):
            peers = [p.detach() for j, p in enumerate(log_qs) if j != k]
            loss = cross_entropy(z, target)
            if peers:
                loss = loss + torch.stack([kl_div(log_q, p) for p in peers]).sum() * share
            found.append(loss)
        return torch.stack(found)

    return losses


def quack() -> Losses:
    """quack's cross-entropy, which is the whole loss of one student."""
    if not torch.cuda.is_available():
        raise AbsentError("quack's kernels need a GPU")
    try:
        from quack.cross_entropy import cross_entropy
    except ImportError as error:  # it or what it needs
        raise AbsentError(f"quack-kernels is not installed ({error})") from None

    def losses(logits: list[Tensor], target: Tensor) -> Tensor:
        (z,) = logits
        return cross_entropy(z, target, reduction="mean").float().view(1)

    return losses


def through_autograd(losses_of: Losses) -> Run:
    """The losses, then autograd for the gradients of their sum."""

    def run(logits: list[Tensor], target: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        losses = losses_of(logits, target)
        return losses, torch.autograd.grad(losses.sum(), logits)

    return run


def ours_with_autograd(backend: str) -> Run:
    """`mutual_loss`, as in a user's own training loop."""

    def losses(logits: list[Tensor], target: Tensor) -> Tensor:
        found = mutual_loss(logits, target, backend=backend)
        assert isinstance(found, Tensor)
        return found

    return through_autograd(losses)


def ours(backend: str) -> Run:
    """`mutual_loss_and_grad`, as in our engine. It also counts right answers and bad students."""

    def run(logits: list[Tensor], target: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        losses, grads, _ = mutual_loss_and_grad(logits, target, backend=backend)
        return losses, grads

    return run


def names() -> list[str]:
    """All contestants, whether or not they can run here."""
    written = [name + how for name in ("naive", "careful") for how in ("", *MODES)]
    mine = [name + path for name in our_backends() for path in (AUTOGRAD, "")]
    return [*written, "liger", "quack", f"closed_form{COMPILE}", *mine]


def is_baseline(name: str) -> bool:
    """Whether it is what a user would write or choose without us."""
    return name.split(" ")[0] in ("naive", "careful", "liger", "quack")


def our_backends() -> list[str]:
    """Those that this version has."""
    found = []
    for name in ("native", "closed_form", "compiled", "triton"):
        with contextlib.suppress(UserError):
            backends.check(name)
            found.append(name)
    return found


def champion(device: torch.device) -> str:
    """Ours, which all are compared with: what ``backend="auto"`` is on that device."""
    return "triton" if device.type == "cuda" else "native"


def needs_compiling(name: str) -> bool:
    """Whether torch.compile makes it, which takes seconds to a minute."""
    return name.endswith(tuple(MODES)) or name.removesuffix(AUTOGRAD) == "compiled"


def contestant(name: str, device: torch.device, students: int) -> Contestant:
    """The contestant of that name.

    Raises:
        AbsentError: it cannot run on this device, or not here, or not with so many students.
    """
    if name == "quack":
        if students != 1:
            raise AbsentError("for one student: it has no divergence")
        return Contestant(name, through_autograd(quack()))
    if name == "liger":
        return Contestant(name, through_autograd(liger()), spoils_logits=True, waits=True)
    if name.startswith("native") and device.type != "cpu":
        raise AbsentError("for CPUs")
    if name.startswith("compiled") and device.type == "cuda":
        raise AbsentError(f"for CPUs; on a GPU, closed_form{COMPILE} is the same")
    if name.startswith("triton"):
        if device.type == "cpu":
            raise AbsentError("on a CPU Triton is interpreted, which is no measure of it")
        if reason := unavailable_reason(device):  # or the closed form would run in its name
            raise AbsentError(reason)
    plain = {"naive": naive, "careful": careful}
    base, mode = name, ""
    for how in MODES:
        if name.endswith(how):
            base, mode = name.removesuffix(how), how
    if mode == AUTOTUNE and device.type == "cpu":
        raise AbsentError(
            f"on a CPU torch.compile makes the same code for it as for {base}{COMPILE}"
        )
    if base in plain:
        losses = _compile(plain[base], MODES[mode]) if mode else plain[base]
        return Contestant(name, through_autograd(losses))
    if mode:
        return Contestant(name, _compile(ours(base), MODES[mode]))
    backend = base.removesuffix(AUTOGRAD)
    return Contestant(name, (ours_with_autograd if backend != base else ours)(backend))


def _compile(function: Function, mode: str | None) -> Function:
    """For exactly the shapes that it will see, and in one piece."""
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    return compiled
