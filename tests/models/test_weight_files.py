"""Files of weights: odd tensors, and damage, which is refused or changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutations, outcome
from run_cases import facts_of_three_classes
from safetensors.torch import save_file
from torch import Tensor
from weights_cases import small, states_equal

from dml_fast.errors import UserError
from dml_fast.models.pretrained import load_pretrained
from dml_fast.runs.weights import save_student

ODD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda t: t.to_sparse(), "conv.weight is sparse"),
    "meta": (lambda t: t.to("meta"), r"conv.weight is without values \(of the meta device\)"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "conv.weight is quantised",
    ),
    "complex": (lambda t: t.to(torch.complex64), "is of torch.complex64 and not torch.float32"),
    "int8": (lambda t: t.to(torch.int8), "is of torch.int8 and not torch.float32"),
    "bool": (lambda t: t > 0, "is of torch.bool and not torch.float32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "conv.weight is of a rare type"),
    "NaN": (lambda t: t.clone().fill_(torch.nan), "18 numbers of conv.weight are NaN or infinite"),
    "infinite": (lambda t: t.double() * 1e300 * 1e10, "18 numbers of conv.weight are NaN or"),
    "too large": (lambda t: t.double() * 0 + 1e300, "18 numbers of conv.weight are NaN or"),
    "a list": (lambda t: t.tolist(), "conv.weight is missing"),
    "a number": (lambda t: 1.0, "conv.weight is missing"),
    "transposed": (lambda t: t.flatten(), r"conv.weight is \(18,\) and not \(2, 1, 3, 3\)"),
    "expanded": (lambda t: torch.zeros(1).expand(10**6, 10**6), r"is \(1000000, 1000000\) and not"),
}


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_odd_tensors_are_refused(case: str, form: str, tmp_path: Path) -> None:
    make, message = ODD[case]
    state = dict(small(0).state_dict())
    state["conv.weight"] = make(state["conv.weight"])
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=message):
        load_pretrained(small(1), str(tmp_path / "w.pth"), "small")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: t.to(dtype) for name, t in small(0).state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        net = small(1)
        load_pretrained(net, str(tmp_path / name), "small")
        assert torch.equal(net.conv.weight, state["conv.weight"].float())  # type: ignore[union-attr]


def test_views_and_shared_storages_are_read(tmp_path: Path) -> None:
    state = dict(small(0).state_dict())
    whole = torch.arange(100.0)
    state["conv.weight"] = whole[7:61:3].view(2, 1, 3, 3).transpose(2, 3)
    state["norm.weight"] = whole[50:52]
    state["norm.bias"] = whole.view(10, 10)[3:5, 4]
    for new in (True, False):
        torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        net = small(1)
        load_pretrained(net, str(tmp_path / "w.pth"), "small")
        assert all(torch.equal(net.state_dict()[n], state[n]) for n in state if "fc" not in n)


def test_nesting_does_not_matter(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(400):
        deep = [deep, {"x": deep}]
    ring: dict[str, Any] = {}
    ring["ring"] = [ring] * 100
    state = small(0).state_dict()
    torch.save({"deep": deep, "ring": ring, "model": state}, tmp_path / "w.pth")
    net = small(1)
    load_pretrained(net, str(tmp_path / "w.pth"), "small")
    assert torch.equal(net.conv.weight, state["conv.weight"])  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "student"])
def test_damaged_files_are_refused_or_load_the_same(kind: str, tmp_path: Path) -> None:
    """Where the format has checksums, no other number is loaded; elsewhere none is NaN."""
    source = small(0)
    state = dict(source.state_dict())
    path = tmp_path / ("w.safetensors" if kind in ("safetensors", "student") else "w.pth")
    if kind == "student":
        save_student(path, state, "small", facts_of_three_classes())
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    start = small(1)
    refused = 0
    for damaged in mutations(data, 300):
        path.write_bytes(damaged)
        net = small(1)
        load = lambda net=net: (load_pretrained(net, str(path), "small"), True)[1]  # noqa: E731
        if outcome(load) is None:
            assert states_equal(net, start)
            refused += 1
            continue
        for name, tensor in net.state_dict().items():
            if kind in ("zip", "student") and not name.startswith("fc."):
                assert torch.equal(tensor, state[name]), name
            assert tensor.isfinite().all()
    assert refused > 150
    if kind in ("zip", "student"):
        for at in range(0, len(data), 17):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            net = small(1)
            if outcome(lambda: (load_pretrained(net, str(path), "small"), True)[1]):  # noqa: B023
                expected = state | {n: t for n, t in start.state_dict().items() if "fc" in n}
                assert all(torch.equal(t, expected[n]) for n, t in net.state_dict().items())
