"""A student that trains on several ranks at once: DistributedDataParallel, or FSDP2's shards.

Only a run of several processes imports this module, since DTensor takes long to import.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dml_fast.engine.averaging import Average
from dml_fast.engine.precision import Precision
from dml_fast.engine.student import Student

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class _Both(nn.Module):
    """A model whose ``forward``, which DDP calls, returns features and logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.model.features_and_logits(*inputs, **named)  # type: ignore[operator]
        return found


class _JoinedStudent(Student):
    """A student that the ranks of a row train together, each on its own images.

    Running statistics are those of the first rank's images, as with DDP's ``broadcast_buffers``.
    """

    joined = True
    _group: ProcessGroup

    def _settle_statistics(self, skipped: Tensor) -> None:
        super()._settle_statistics(skipped)
        for statistics in self._statistics:
            torch.distributed.broadcast(statistics, group=self._group, group_src=0)


class ReplicatedStudent(_JoinedStudent):
    """A student of which every rank of a row has a copy; DDP averages the gradients.

    Args:
        model: as in `Student`.
        optimizer: as in `Student`.
        precision: as in `Student`.
        arch: as in `Student`.
        group: the ranks of the row, for this student alone: others may use theirs meanwhile.
        with_features: whether passes of training give features as well.
        average: as in `Student`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        arch: str,
        *,
        group: ProcessGroup,
        with_features: bool,
        average: Average | None = None,
    ) -> None:
        ddp = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # since torch 2.13
        options: dict[str, Any] = {
            "process_group": group,
            "forward_sync_buffers" if new else "broadcast_buffers": False,
        }
        joined = ddp(_Both(model) if with_features else model, **options)
        passes = {"features_and_logits" if with_features else "logits": joined}
        super().__init__(model, optimizer, precision, arch, average=average, **passes)
        self._group = group
        self._joined = joined

    def deferring(self, more: bool) -> AbstractContextManager[None]:
        """As `Student.deferring`: without an all-reduce in each part."""
        return self._joined.no_sync() if more else nullcontext()


class ShardedStudent(_JoinedStudent):
    """A student whose weights, gradients and optimizer are shared out over a row by FSDP2.

    The optimizer has the local shards as its parameters: fused SGD does not take DTensors
    (torch 2.13: no sharding strategy for ``_fused_sgd_``), and elementwise updates need none.

    Args:
        model: after `shard`.
        optimizer: over `local_parameters`.
        precision: as in `Student`.
        arch: as in `Student`.
        group: the ranks of the row.
        shards: the model's parameters of which the optimizer has the parts, in its order.
        average: as in `Student`; its model after `shard` too.
    """

    shared_out = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        arch: str,
        *,
        group: ProcessGroup,
        shards: Sequence[nn.Parameter],
        average: Average | None = None,
    ) -> None:
        super().__init__(model, optimizer, precision, arch, average=average)
        self._group = group
        self._shards = list(shards)

    def _collect_gradients(self) -> Tensor:
        """Hand each shard its gradient; return the norm of the whole gradient."""
        found = [p.grad for p in self._shards if p.grad is not None]
        for shard, local in zip(self._shards, self.parameters, strict=True):
            if shard.grad is not None:
                local.grad = shard.grad.to_local()  # type: ignore[attr-defined]
                shard.grad = None
        norm: Any = nn.utils.get_total_norm(found)
        whole: Tensor = norm.full_tensor()
        return whole

    def state_dict(self) -> dict[str, Any]:
        """As `Student.state_dict`, but of DTensors, which a sharded checkpoint puts together."""
        state = super().state_dict()
        moments = {
            index: {name: _whole_of(value, self._shards[index]) for name, value in values.items()}
            for index, values in state["optimizer"]["state"].items()
        }
        return {**state, "optimizer": {"state": moments}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned; its tensors may also be whole."""
        model = self.model.state_dict()
        weights = {
            part: {name: _part(value, model[name]) for name, value in state[part].items()}
            for part in ("model", "average")
            if part in state
        }
        moments = {
            index: {name: _local(value, self._shards[index]) for name, value in values.items()}
            for index, values in state["optimizer"]["state"].items()
        }
        super().load_state_dict({**state, **weights, "optimizer": {"state": moments}})

    def weights(self, weights: str = "student") -> dict[str, Tensor]:
        """As `Student.weights`, put together; all ranks of the row must call this."""
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()
            for name, t in self.network(weights).state_dict().items()
        }

    @contextmanager
    def whole(self, weights: str = "student") -> Iterator[None]:
        """Inside, every rank has the whole weights and may run the network by itself."""
        from torch.distributed.fsdp import FSDPModule

        parts = [m for m in self.network(weights).modules() if isinstance(m, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(True, recurse=False)


def shard(model: nn.Module, mesh: DeviceMesh, *, trained: bool = True) -> None:
    """Share a model out over the ranks of a row: each of its blocks, then what is left.

    Args:
        model: on its device.
        mesh: of the row.
        trained: whether backward passes follow, which share out again what a pass put together;
            otherwise the pass itself does so.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 demands it
    for container in model.modules():
        if isinstance(container, nn.Sequential | nn.ModuleList) and not _inside_a_shard(
            model, container
        ):
            for block in container:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if trained else True)
    for name in ("features_and_logits", "embed"):
        # further passes: FSDP2 does not see them otherwise, and the next backward may wait for ever
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def local_parameters(shards: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return this rank's part of each parameter, in the memory of its DTensor."""
    return [nn.Parameter(p.to_local().detach()) for p in shards]  # type: ignore[attr-defined]


def _inside_a_shard(model: nn.Module, module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(
        isinstance(other, FSDPModule) and module in list(other.modules())
        for other in model.modules()
    )


def _part(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor laid out like one of the model's."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _whole_of(value: Tensor, like: Tensor) -> Tensor:
    """Return the optimizer's tensor of which ``value`` is this rank's part; scalars are whole."""
    if not value.dim():
        return value
    assert isinstance(like, DTensor)
    return DTensor.from_local(
        value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def _local(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of an optimizer's tensor; scalars are whole."""
    if not value.dim():
        return value
    part: Tensor = _part(value, like).to_local()  # type: ignore[attr-defined]
    return part
