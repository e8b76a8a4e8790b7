"""Which kind of work a kernel does, from its name: a guess, good enough to see where time goes."""

from __future__ import annotations

from collections.abc import Iterable

KINDS = {  # the first that fits; parts of names, in small letters
    "loss": ("one_pass", "two_sweep", "nll_loss", "kl_div", "softmax"),
    "optimizer": (
        "fusedsgd",
        "fused_sgd",
        "fusedoptimizer",
        "fusedadam",
        "fused_adam",
        "multi_tensor",
    ),
    "norm": ("batch_norm", "batchnorm", "bn_fw", "bn_bw", "::bn", "native_norm", "layer_norm"),
    # Changes of layout by cuDNN are copies, although its name is in them.
    "copy": (
        "memcpy",
        "memset",
        "copy",
        "fill",
        "nchwtonhwc",
        "nhwctonchw",
        "transpose",
        "catarray",
    ),
    "conv": (
        "conv",
        "dgrad",
        "wgrad",
        "implicit",
        "gemm",
        "cutlass",
        "cudnn",
        "xmma",
        "cublas",
        "addmm",
        "::mm",
    ),
    "pointwise": (
        "elementwise",
        "pointwise",
        "reduce",
        "pool",
        "triton_",
        "threshold",
        "relu",
        "add",
    ),
}
OTHER = "other"


def kind_of(name: str) -> str:
    """Return the kind of a kernel, or of an operator, with that name."""
    small = name.lower()
    for kind, parts in KINDS.items():
        if kind == "conv" and small.startswith("triton_"):
            continue  # Inductor names what it fused with, and leaves convolutions to cuDNN
        if any(part in small for part in parts):
            return kind
    return OTHER


def by_kind(work: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """Return the time and the count of each kind.

    Args:
        work: names, and times in any unit.
    """
    found = {kind: {"time": 0.0, "count": 0.0} for kind in (*KINDS, OTHER)}
    for name, taken in work:
        entry = found[kind_of(name)]
        entry["time"] += taken
        entry["count"] += 1
    return found
