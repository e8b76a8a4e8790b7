"""One problem for the contestants of bench_loss.py, and whether an answer to it is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dml_fast.loss import reference

SHAPES = [  # (K, N, C)
    (2, 128, 100),
    (4, 128, 10),
    (4, 128, 100),
    (8, 128, 100),
    (4, 1024, 1000),
    (4, 8192, 1000),
    (4, 4096, 32768),
    (2, 2048, 131072),
    (1, 4096, 32768),  # a cross-entropy, which others have too
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the norm of the error relative to that of the float64 reference. A gradient rounded to bf16
# is off by 1e-3; Liger sums its cross-entropy in the logits' type, which costs some more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
REFERENCE_NUMBERS = 2**22  # at a time: each costs the reference a few hundred bytes in fp64


class LossCase:
    """Logits of one shape and dtype, with a target and the right answer."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        """Draw the logits.

        Args:
            shape: (K, N, C).
            dtype: of the logits.
            device: where they are.
        """
        students, rows, classes = shape
        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.target = torch.randint(classes, (rows,), generator=generator, device=device)
        self.pristine = [
            torch.randn((rows, classes), generator=generator, device=device).mul_(2).to(dtype)
            for _ in range(students)
        ]
        self.logits = [z.clone().requires_grad_() for z in self.pristine]
        self._losses, self._grads = self._solve()

    @property
    def floor_bytes(self) -> int:
        """The fewest bytes that must move: every logit read once, every gradient written once.

        Left out is what is O(N): targets (8 bytes a row), losses (4 bytes a student).
        """
        students, rows, classes = self.shape
        return 2 * students * rows * classes * self.dtype.itemsize

    def restore(self) -> None:
        """Put the logits back that a contestant wrote over."""
        with torch.no_grad():
            for z, original in zip(self.logits, self.pristine, strict=True):
                z.copy_(original)

    def errors(self, losses: Tensor, grads: Sequence[Tensor]) -> tuple[float, float]:
        """How wrong an answer is: losses, and gradients of the worst student."""
        each = [_relative(g, right) for g, right in zip(grads, self._grads, strict=True)]
        return float(_relative(losses, self._losses)), float(torch.stack(each).max())  # or NaN

    def is_right(self, errors: tuple[float, float]) -> bool:
        """Whether they are rounding. NaN is not."""
        return all(error <= TOLERANCE[self.dtype] for error in errors)

    def _solve(self) -> tuple[Tensor, list[Tensor]]:
        """Losses (K,) and gradients by the reference in float64, some rows at a time.

        Every row has a label, so both means are sums over N.
        """
        students, rows, classes = self.shape
        step = max(1, REFERENCE_NUMBERS // (students * classes))
        losses = torch.zeros(students, dtype=torch.float64, device=self.device)
        grads = [torch.empty_like(z, dtype=torch.float64) for z in self.pristine]
        for start in range(0, rows, step):
            part = slice(start, start + step)
            z64 = [z[part].double().requires_grad_() for z in self.pristine]
            found = reference.mutual_loss(z64, self.target[part], reduction="sum") / rows
            losses += found.detach()
            for grad, g in zip(grads, torch.autograd.grad(found.sum(), z64), strict=True):
                grad[part] = g
        return losses, grads


def _relative(found: Tensor, right: Tensor) -> Tensor:
    return (found.detach() - right).norm() / right.norm()
