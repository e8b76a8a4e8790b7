"""Files of weights: odd tensors, and damage, which is refused or changes nothing."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutated_json, mutations, outcome
from run_cases import facts_of_three_classes
from safetensors.torch import save_file
from torch import Tensor
from weights_cases import small, states_equal

from dml_fast.errors import UserError
from dml_fast.models.pretrained import load_pretrained
from dml_fast.runs.weights import save_student

KINDS = ("zip", "legacy", "safetensors", "student")


def write(path: Path, kind: str, state: dict[str, Tensor]) -> None:
    """Write weights as one of the kinds of files."""
    if kind == "student":
        save_student(path, state, "small", facts_of_three_classes())
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")


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


@pytest.mark.compat
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


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are UTF-8 elsewhere")
@pytest.mark.parametrize("kind", [*KINDS])
def test_names_of_files_are_bytes(kind: str, tmp_path: Path) -> None:
    state = small(0).state_dict()
    write(tmp_path / "w", kind, state)
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9 [x] $y_$\n.safetensors"))
    (tmp_path / "w").rename(path)
    net = small(1)
    load_pretrained(net, path, "small")
    assert torch.equal(net.conv.weight, state["conv.weight"])
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    with pytest.raises(UserError, match=r"caf\\xe9 \[x\] \$y_\$\\n.safetensors is damaged"):
        load_pretrained(net, path, "small")


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


def as_python_2(file: bytes) -> bytes:
    """Rewrite the strings in the five pickles of the old format as Python 2 wrote them."""
    source, out = io.BytesIO(file), b""
    for _ in range(5):
        codes = [*pickletools.genops(source), (None, None, source.tell())]
        for (code, value, start), (_, _, end) in itertools.pairwise(codes):
            old = code is not None and code.name == "BINUNICODE"
            text = str(value).encode()
            assert isinstance(start, int) and isinstance(end, int)
            out += b"U" + bytes([len(text)]) + text if old else file[start:end]
    return out + source.read()


def test_files_of_python_2_are_read(tmp_path: Path) -> None:
    state = small(0).state_dict()
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(as_python_2(path.read_bytes()))
    assert b"X" + bytes([11, 0, 0, 0]) + b"conv.weight" not in path.read_bytes()
    net = small(1)
    load_pretrained(net, str(path), "small")
    assert torch.equal(net.conv.weight, state["conv.weight"])


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


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_load_the_same(kind: str, tmp_path: Path) -> None:
    """Where the format has checksums, no other number is loaded; elsewhere none is NaN."""
    source = small(0)
    state = dict(source.state_dict())
    path = tmp_path / ("w.safetensors" if kind in ("safetensors", "student") else "w.pth")
    write(path, kind, state)
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


def test_odd_headers_of_safetensors_are_refused(tmp_path: Path) -> None:
    state = dict(small(0).state_dict())
    path = tmp_path / "w.safetensors"
    save_file(state, path, {"format": "pt"})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    loaded = 0
    for header in mutated_json(json.loads(data[8 : 8 + size]), 300):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        net = small(1)
        if outcome(lambda net=net: (load_pretrained(net, str(path), "small"), True)[1]):
            assert torch.equal(net.conv.weight, state["conv.weight"])
            loaded += 1
    assert 0 < loaded < 150
    deep = b"[" * 10**5
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(UserError, match="no file of weights"):
        load_pretrained(small(1), str(path), "small")
    deep = b'{"a":' * 10**5
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(UserError, match="is damaged"):
        load_pretrained(small(1), str(path), "small")


STAND_IN = b"ctorch._utils\n_rebuild_parameter\n"
PROGRAMS = {
    "a call of a class": b"(cbuiltins\nlist\no.",
    "a call by name": b"(S'echo run!'\nios\nsystem\n.",
    "an extension": b"\x82\x01.",
    "attributes of a function": STAND_IN + b"N}X\x05\x00\x00\x00buildK\x01s\x86b.",
    "a call of a value": b"K\x01)R.",
    "a new object of a value": b"K\x01)\x81.",
    "an item of a function": STAND_IN + b"X\x01\x00\x00\x00aK\x01s.",
    "a far place in the memo": b"Nr\xf0\xff\xff\xff.",
    "a long array of bytes": b"\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "long bytes": b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00.",
    "a buffer": b"\x97.",
    "a number of many digits": b"I" + b"9" * 10_000 + b"\n.",
    "a storage that is none": b"(X\x07\x00\x00\x00storageK\x01tQ.",
    "no end": b"(" * 10**5,
    "tuples in one another": b"N" + b"\x85" * 10**5 + b".",
    "lists in one another": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
}


@pytest.mark.parametrize("case", PROGRAMS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_no_pickle_takes_memory_or_runs_code(
    case: str, form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = b"\x80\x02" + PROGRAMS[case]
    path = tmp_path / "w.pth"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        head = path.read_bytes().partition(pickle.dumps({}, protocol=2)[:4])[0]
        path.write_bytes(head + program + pickle.dumps([], protocol=2))
    with pytest.raises(UserError, match=r"is damaged|holds no state dict"):
        load_pretrained(small(1), str(path), "small")
    assert "run!" not in capfd.readouterr().out
