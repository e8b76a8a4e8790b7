"""The loss of hashing with mutual information (MIHash: Cakir et al., ICCV 2017, arXiv 1703.08919).

Bits of a code are relaxed to φ = tanh(s u / 2), and the distance of two codes of b bits to
d = (b - φ_i · φ_j) / 2. For each row, the anchor, the other rows of its class and those of other
classes give a histogram of distances each. The loss is minus the mutual information between the
distance and "same class or not", averaged over the anchors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dml_fast.errors import brief
from dml_fast.loss.problem import UNLABELLED_TARGET
from dml_fast.loss.values import dense, fail, finite, integer, number, tensor

MOST_ROWS = 2048
"""Rows of a batch: above, the N x N distances of each student take too much memory."""


class MIHashLoss(nn.Module):
    """`mihash_loss` as a module of codes (N, b) and target (N,).

    Attributes:
        information: 0-d, the mean mutual information of the last batch in bits, without a graph;
            0 before the first. Students that share the module share it too.

    Args:
        bins: L of `mihash_loss`.
        scale: s of `mihash_loss`.

    Raises:
        UserError: one of these is out of range.
    """

    def __init__(self, bins: int = 16, scale: float = 1.0) -> None:
        super().__init__()
        self.bins, self.scale = _checked_options(bins, scale)
        self.information = torch.zeros(())

    def forward(self, u: Tensor, target: Any) -> Tensor:
        """Return the 0-d loss."""
        loss = mihash_loss(u, target, self.bins, self.scale)
        self.information = -loss.detach()
        return loss

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return f"bins={self.bins}, scale={self.scale:g}"


def mihash_loss(u: Tensor, target: Any, bins: int = 16, scale: float = 1.0) -> Tensor:
    """Return minus the mean mutual information between distance and class, in bits.

    The histograms have L + 1 centres from 0 to b, and each distance is shared out between its two
    nearest. The mutual information of an anchor lies between 0 and the entropy of the share of its
    class. Anchors that have no other row of their class, or none of another, are left out. The work
    and the shapes do not depend on the values, and nothing waits for the device.

    Args:
        u: (N, b) codes before the sign, any floating dtype, at most 2,048 rows. Batch normalisation
            should precede it.
        target: (N,) classes, integers in a tensor, list or numpy array. Rows of -100 belong to no
            class and are left out.
        bins: L, a whole number of at least 1; more than b separate nothing more.
        scale: s, above 0: the larger, the nearer φ is to the sign.

    Returns:
        0-d, in float32 or the codes' dtype, whichever is wider; 0 with a gradient of 0 if no anchor
        is left.

    Raises:
        UserError: if an argument has a wrong shape, device, dtype or value.
    """
    bins, scale = _checked_options(bins, scale)
    target = _checked_target(u, target)
    x = u.to(torch.promote_types(u.dtype, torch.float32))
    bits = x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        phi = torch.tanh(scale / 2 * x)
        # distances, in widths of a bin
        places = torch.addmm(phi.new_full((), bins / 2), phi, phi.T, alpha=-bins / (2 * bits))
        loss: Tensor = _Loss.apply(places, _kinds(target), bins)  # type: ignore[no-untyped-call]
        return loss + 0 * phi.sum()  # NaN stays NaN, which histograms of whole numbers would lose


def has_anchors(target: Tensor) -> Tensor:
    """Return whether a batch has two rows of one class and a row of another, 0-d bool.

    Args:
        target: (N,) classes; rows of -100 do not count.
    """
    ordered = target.sort().values
    labelled = ordered[:-1] != UNLABELLED_TARGET
    changes = ordered[1:] != ordered[:-1]
    return (labelled & changes).any() & (labelled & ~changes).any()


def _kinds(target: Tensor) -> Tensor:
    """Return what each pair is, (N, N) int64: 0 for one class, 1 for two, 2 for no pair."""
    kinds = (target[:, None] != target[None]).long()
    left_out = target == UNLABELLED_TARGET
    kinds.masked_fill_(left_out[:, None], 2).masked_fill_(left_out[None], 2)
    return kinds.fill_diagonal_(2)


class _Loss(torch.autograd.Function):
    """The loss of distances (N, N), in widths of a bin, between pairs of the given kinds."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, kinds: Tensor, bins: int) -> Tensor:
        """Find loss and gradient at once, so that (N, N) numbers are all that is kept.

        With A, B and C = A + B pairs in a bin of an anchor, of n, m and t in all,
        t MI = Σ A log(A t / (C n)) + Σ B log(B t / (C m)), and t dMI/dA = log(A / C) + const.
        """
        low = places.clamp(0, bins).floor_()
        upper = places - low  # the share of the next bin
        columns = low.long().add_(kinds, alpha=bins + 1).clamp_(0, 3 * bins + 2)  # NaN: anywhere
        sums = _sums(columns, upper, 3 * (bins + 1) + 1)[:, : 2 * (bins + 1)]
        sums = sums.view(-1, 2, bins + 1)  # A and B
        parts, counts = (x.double() * 2.0**-50 for x in (sums, sums.sum(2)))
        total = counts.sum(1).clamp(min=1)
        logs = (parts / parts.sum(1, keepdim=True)).log2().masked_fill(parts == 0, 0.0)
        prior = (counts / total[:, None]).log2().masked_fill(counts == 0, 0.0)
        information = ((parts * logs).sum(2) - counts * prior).sum(1) / total
        anchors = (counts > 0).all(1).double()
        weights = anchors / anchors.sum().clamp(min=1)
        if ctx.needs_input_grad[0]:
            slopes = (-weights / total)[:, None, None] * logs.diff(dim=2)  # (N, 2, L)
            slopes = torch.nn.functional.pad(slopes.to(places.dtype), (0, 1, 0, 1))
            ctx.save_for_backward(slopes.flatten(1).gather(1, columns))
        loss: Tensor = 0 - (weights * information.clamp(min=0)).sum().to(places.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient of the distances."""
        (slopes,) = ctx.saved_tensors
        return grads[0] * slopes, None, None


def _sums(columns: Tensor, upper: Tensor, width: int) -> Tensor:
    """Return (N, width) int64 histograms: each pair is shared out between a column and the next.

    Whole numbers of 2^-50 are added up. Their sums are exact, so that they do not depend on the
    order, which atomic additions on a GPU change from run to run.

    Args:
        columns: (N, N) int64.
        upper: (N, N), the share of the next column.
        width: columns.
    """
    above = (upper.clamp(0, 1) * 2.0**50).long()
    found = above.new_zeros(len(columns), width)
    found.scatter_add_(1, columns, 2**50 - above)
    return found.scatter_add_(1, columns + 1, above)


def _checked_options(bins: Any, scale: Any) -> tuple[int, float]:
    bins, scale = integer(bins, "bins"), number(scale, "scale")
    if bins < 1:
        fail(f"bins is {bins}", "pass a whole number of at least 1")
    if not (finite(scale) and scale > 0):
        fail(f"scale is {scale}", "pass a finite number above 0")
    return bins, scale


def _checked_target(u: Any, target: Any) -> Tensor:
    """Refuse codes and classes that do not fit; return the classes as int64."""
    if not isinstance(u, Tensor) or not u.is_floating_point():
        fail(f"u is {brief(u)}", "pass a floating-point tensor (N, b)")
    if dense(u, "u").dim() != 2 or not u.shape[1]:
        fail(f"u has shape {tuple(u.shape)}", "it must be (N, b) with at least one bit")
    if not 1 <= len(u) <= MOST_ROWS:
        fail(f"u has {len(u)} rows", f"pass 1 to {MOST_ROWS}")
    target = tensor(target, "target", u.device)
    if target.is_floating_point() or target.is_complex() or target.shape != u.shape[:1]:
        fail(f"target is {brief(target)}", f"pass {len(u)} whole numbers, the rows' classes")
    if target.device != u.device:
        fail(f"target is on {target.device} and u on {u.device}", "move it there")
    classes: Tensor = target.long()
    return classes
