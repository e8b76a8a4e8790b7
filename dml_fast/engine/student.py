"""One student: a model, its optimizer and its loss scaler, and one guarded update of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dml_fast.engine.averaging import Average, check_state
from dml_fast.engine.calls import Call, check_kinds, is_compiled, logits_of
from dml_fast.engine.casts import Casts
from dml_fast.engine.norms import counted, frozen, norms_of, share_storage
from dml_fast.engine.precision import Precision, keep_in_full_precision
from dml_fast.engine.stepping import Stepper, mean_and_clip
from dml_fast.errors import UserError, check_choice

Pass: TypeAlias = Callable[[Any], Any]


class Student:
    """A network that learns, with all that belongs to it alone.

    Args:
        model: on its device. ``forward`` takes a tensor (N, ...) or what else
            `dml_fast.engine.Engine.step` is given, and returns logits (N, C), or an object with
            them as ``.logits``. An `EmbeddingNet` also gives its features. For bf16 on a CPU its
            depthwise convolutions are put into fp32.
        optimizer: over the model's parameters, of `torch.optim` or derived from its base class.
            Those built with ``fused=True`` (SGD, Adam, AdamW, Adagrad) are quickest: a bad step is
            skipped on the device, and a CUDA graph takes them.
        precision: how to run the forward pass.
        arch: the architecture's name, for tables and files.
        logits: runs the passes of training that give logits, in place of the model itself.
        features_and_logits: likewise those that give features and logits.
        average: of the model's weights, to be kept: ``Average(model, 0.999)``.

    Raises:
        UserError: the optimizer needs a closure, the model has a layer of sparse gradients, or an
            argument is of another kind or on another device.
    """

    shared_out = False
    """Whether the weights are shared out over ranks, so that every pass communicates."""

    joined = False
    """Whether other processes train it too: they wait for its gradients, one by one."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        arch: str = "",
        *,
        logits: Pass | None = None,
        features_and_logits: Pass | None = None,
        average: Average | None = None,
    ) -> None:
        _check(model, optimizer, precision)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if not self.shared_out and {*map(id, model.parameters())}.isdisjoint(map(id, trained)):
            raise UserError(
                f"the optimizer of a student ({type(model).__name__}) holds none of its model's "
                "parameters: build it over model.parameters()"
            )
        self.depthwise = keep_in_full_precision(model, precision)  # how many
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.average = average
        if average is not None:
            keep_in_full_precision(average.model, precision)
        self.arch = arch or type(model).__name__
        self.scaler = precision.scaler()
        self.stepper = Stepper(optimizer, self.arch)
        self.parameters = trained
        self.norms = norms_of(model)
        self.generation = 0  # grows when new tensors take the place of the optimizer's
        self.pending = Fraction(0)  # batches with backward passes since the last update
        self._call = Call(model)
        self._casts = Casts(model, precision)
        # whether casts and counters of all layers are one launch each: not for a compiler's layers
        self.gathers = not is_compiled(model, logits, features_and_logits)
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []
        # a compiled module has no truth value
        self._logits: Pass = model if logits is None else logits
        self._both: Pass | None = features_and_logits
        if features_and_logits is None:
            self._both = getattr(model, "features_and_logits", None)
        self._one = torch.ones((), device=self.parameters[0].device)

    @property
    def gives_features(self) -> bool:
        """Whether `features_and_logits` can be called."""
        return self._both is not None

    def forward(self, inputs: Any) -> Tensor:
        """Return logits (N, C) of inputs (N, ...), in the precision's type, with their graph.

        Raises:
            UserError: the model returned something else.
        """
        return self.logits_of(self._training_pass(inputs, features=False))

    def logits_of(self, found: Any) -> Tensor:
        """Return the logits of what a pass gave.

        Raises:
            UserError: it gave something else.
        """
        return logits_of(found, self.arch)

    def features_and_logits(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return an `EmbeddingNet`'s features (N, D) and logits (N, C) of one pass, with graph."""
        found: tuple[Tensor, Tensor] = self._training_pass(inputs, features=True)
        return found

    def _training_pass(self, inputs: Any, features: bool) -> Any:
        """Return what `run` does, and see to the running statistics."""
        self.keep_statistics()
        with ExitStack() as stack:
            if self.gathers and self.norms:
                stack.enter_context(counted(self.norms, self._statistics[1]))
            if self.gathers and not self.joined:
                stack.enter_context(self._casts.taken())
            return self.run(inputs, features)

    def keep_statistics(self) -> None:
        """Keep the running statistics of before, for an update that may be skipped."""
        if self.norms and not self._shares_storage():
            self._statistics = share_storage(self.norms)
        if not self.pending:
            self._before = [tensor.clone() for tensor in self._statistics]

    def run(self, inputs: Any, features: bool) -> Any:
        """Return what a pass gives, features and logits or what the model returns, and no more."""
        work = self._both if features else self._logits
        assert work is not None
        with self.precision.autocast():
            return self._call(work, inputs)

    def compile(self) -> None:
        """Compile the passes of training; parameters are inputs, so equal students share the code.

        Evaluation and ``predict`` stay as they are.
        """
        self.gathers = False
        self._logits = torch.compile(self._logits, dynamic=False)
        if self._both is not None:
            self._both = torch.compile(self._both, dynamic=False)

    @property
    def grad_scale(self) -> Tensor:
        """The factor for the gradient of the logits: 0-d, 1 unless fp16."""
        scale: Tensor = self.scaler.scale(self._one)
        return scale

    def deferring(self, more: bool) -> AbstractContextManager[None]:
        """Return a context for both passes of a part of a batch: whether ``more`` parts follow.

        A student of several ranks need not add up gradients among them before the last part.
        """
        return nullcontext()

    def backward(
        self,
        logits: Tensor,
        grad: Tensor,
        extra: Tensor | None = None,
        extra_weight: float = 1.0,
        share: Fraction = Fraction(1),
    ) -> None:
        """Run the backward pass; gradients add up until ``update``.

        Args:
            logits: (N, C), from ``forward`` or ``features_and_logits``.
            grad: (N, C), the gradient of the loss with respect to them, times ``grad_scale``.
            extra: 0-d, another loss of the same pass, made by the same thread; it may be constant.
            extra_weight: its weight.
            share: of the batch that this pass is of.
        """
        ends = self.ends(logits, grad, extra, extra_weight)
        torch.autograd.backward([end for end, _ in ends], [g for _, g in ends])
        self.pending += share

    def ends(
        self, logits: Tensor, grad: Tensor, extra: Tensor | None, extra_weight: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return where the backward pass begins, with the gradients there; as of `backward`."""
        found = [(logits, grad)]
        if extra is not None and extra.requires_grad:
            found.append((extra, extra_weight * self.grad_scale))
        return found

    def update(self, clip_norm: float | None = None) -> Tensor:
        """Step the optimizer by the mean of the gradients since the last update, if it is finite.

        A skipped step leaves no trace in weights, momentum or running statistics. The average, if
        there is one, follows. With a fused optimizer nothing here waits for the device.

        Args:
            clip_norm: the largest norm of the gradient, as in `torch.nn.utils.clip_grad_norm_`;
                None: any.

        Returns:
            0-d bool tensor: whether the step was skipped.

        Raises:
            UserError: a gradient is sparse.
        """
        norm = self._collect_gradients()
        skipped = ~torch.isfinite(norm)
        if self.pending > 1 or clip_norm is not None:
            batches = int(self.pending)
            mean_and_clip(self.parameters, norm, batches, clip_norm, self.grad_scale)
        self.stepper.step(self.scaler, skipped)
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = Fraction(0)
        self._settle_statistics(skipped)
        if self.average is not None:
            self.average.update(self.model)
        return skipped

    def _settle_statistics(self, skipped: Tensor) -> None:
        """Give running statistics their values from before a step that was skipped."""
        for now, before in zip(self._statistics, self._before, strict=True):
            torch.where(skipped, before, now, out=now)

    def _collect_gradients(self) -> Tensor:
        """Return the norm of all gradients, 0-d."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        try:
            return torch.nn.utils.get_total_norm(found)
        except RuntimeError:
            if all(grad.layout is torch.strided for grad in found):
                raise
            raise _sparse(f"a parameter of a student ({self.arch})") from None

    @torch.no_grad()
    def predict(self, inputs: Any, *, training: bool = False, weights: str = "student") -> Tensor:
        """Return logits (N, C) without a graph; running statistics and the mode stay the same.

        Args:
            inputs: as of `forward`.
            training: whether to compute as in training (batch statistics, dropout).
            weights: whose, as of `network`.
        """
        model = self.network(weights)
        norms = self.norms if self.average is None or weights == "student" else self.average.norms
        was_training = model.training
        model.train(training)
        with frozen(norms, training), self.precision.autocast():
            logits = self._call(model, inputs)
        model.train(was_training)
        return logits_of(logits, self.arch)

    def network(self, weights: str) -> nn.Module:
        """Return the model (``student``) or the average of its weights (``ema``).

        Raises:
            UserError: it is none of the two, or no average is kept.
        """
        check_choice("weights", weights, ("student", "ema"))
        if weights == "student":
            return self.model
        if self.average is None:
            raise UserError(
                f"weights is ema and a student ({self.arch}) keeps no average: give it "
                "average=Average(model, 0.999), or choose student"
            )
        return self.average.model

    def set_lr(self, lr: float) -> None:
        """Set the learning rate, in place where it is a tensor."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: ``arch``, ``model``, ``optimizer`` and ``scaler``.

        Of the optimizer that is its state by parameter; its options come from the run. If there is
        an average, its state is ``average``.
        """
        average = {} if self.average is None else {"average": self.average.model.state_dict()}
        return {
            "arch": self.arch,
            "model": self.model.state_dict(),
            "optimizer": {"state": self.optimizer.state_dict()["state"]},
            "scaler": self.scaler.state_dict(),
            **average,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned, and the optimizer's options if they are there.

        Raises:
            UserError: only one of the student and the state has an average.
        """
        check_state(self.average, state, self.arch)
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        moments = {
            index: {
                name: _laid_out(value, self.parameters[index]) if self.stepper.fused else value
                for name, value in values.items()
            }
            for index, values in state["optimizer"]["state"].items()
        }
        found = state["optimizer"]
        options = found.get("param_groups") or self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": options})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.generation += 1

    def weights(self, weights: str = "student") -> dict[str, Tensor]:
        """Return the state of `network` on the CPU; all ranks that share it out must call this."""
        return {name: t.detach().cpu() for name, t in self.network(weights).state_dict().items()}

    def whole(self, weights: str = "student") -> AbstractContextManager[None]:
        """Return a context inside which this process may run `network` by itself."""
        return nullcontext()

    def forget_step(self) -> None:
        """Drop what an unfinished step has left behind."""
        self.optimizer.zero_grad(set_to_none=True)
        self.pending = Fraction(0)
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()

    def _shares_storage(self) -> bool:
        """Return False at first, and again after ``model.to(...)``, which makes new tensors."""
        first = self.norms[0].running_mean
        assert first is not None
        return bool(self._statistics) and first.data_ptr() == self._statistics[0].data_ptr()


def _check(model: object, optimizer: object, precision: object) -> None:
    """Refuse what cannot be a student's."""
    check_kinds(
        "a student",
        "Student(model, optimizer, precision)",
        model=(model, nn.Module),
        optimizer=(optimizer, torch.optim.Optimizer),
        precision=(precision, Precision),
    )
    assert isinstance(model, nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(precision, Precision)
    device = optimizer.param_groups[0]["params"][0].device
    if device.type != precision.device.type:
        raise UserError(
            f"the parameters of a student are on {device} and its precision is for "
            f"{precision.device}: move the model there before its optimizer is made"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise _sparse(f"layer {name or type(layer).__name__!r} of a student")


def _sparse(what: str) -> UserError:
    return UserError(
        f"{what} has sparse gradients, whose norm torch cannot tell: build it with sparse=False"
    )


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """Return an optimizer's tensor with its parameter's strides: fused updates need them equal."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if value.shape != parameter.shape:
        raise ValueError(f"the optimizer has {tuple(value.shape)} for {tuple(parameter.shape)}")
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
