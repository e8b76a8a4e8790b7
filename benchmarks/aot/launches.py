"""What a launch would compile: its arguments, recorded in the kernel's place, as Triton types them.

The launchers run unchanged on small CPU tensors, so what is compiled is what they launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor
from triton.runtime import JITFunction

OPTIONS = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion")
_TYPES = {
    "torch.float32": "*fp32",
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.int64": "*i64",
    "torch.int32": "*i32",
    "torch.uint8": "*u8",
    "torch.bool": "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch, as arguments of `aot.compile_for`."""

    kernel: Any
    grid: tuple[int, ...]
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: frozenset[str]
    options: Mapping[str, Any]

    @property
    def variant(self) -> str:
        """What Triton compiles once: two launches that agree in it share their code."""
        return repr(
            (
                self.kernel.__name__,
                sorted(self.signature.items()),
                sorted(self.constexprs.items()),
                sorted(self.aligned),
                sorted(self.options.items()),
            )
        )


class Recorder:
    """Stands in for a kernel, takes note of each launch and runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(specialise(self.kernel, grid, args, kwargs))

        return launch


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Within, launches of the kernels that ``modules`` name are noted, and nothing runs."""
    launches: list[Launch] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    with ExitStack() as stack:
        for module, name, kernel in kernels:
            stack.enter_context(mock.patch.object(module, name, Recorder(kernel, launches)))
        yield launches


def specialise(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Launch:
    """Type the arguments as `kernel[grid](*args, **kwargs)` would.

    An integer of 1 becomes a constant, pointers and integers divisible by 16 are marked, unless
    the parameter asks for neither.
    """
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name in OPTIONS}
    values |= {name: value for name, value in kwargs.items() if name not in OPTIONS}
    if unknown := values.keys() - set(kernel.arg_names):
        raise TypeError(f"{kernel.__name__} has no argument {sorted(unknown)}")
    signature, constexprs, aligned = {}, {}, set()
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        if parameter.is_constexpr or value is None or (one and special):
            constexprs[name] = value
            continue
        signature[name] = _type(value)
        if special and not parameter.do_not_specialize_on_alignment and _in_sixteens(value):
            aligned.add(name)
    return Launch(kernel, grid, signature, constexprs, frozenset(aligned), options)


def _in_sixteens(value: Any) -> bool:
    number = value.data_ptr() if isinstance(value, Tensor) else value
    return not isinstance(number, (bool, float)) and number % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[str(value.dtype)]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
