"""Files of students: what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutated_json, mutations, outcome
from run_cases import facts_of_three_classes, facts_of_vectors
from safetensors.torch import load_file, save_file
from torch import nn

from dml_fast.errors import UserError
from dml_fast.models import create_model
from dml_fast.runs.weights import header_of, load_student, save_student


def test_a_student_comes_back_from_its_file(tmp_path: Path) -> None:
    model = create_model("resnet8", num_classes=3, in_channels=1, image_size=8)
    model = model.to(memory_format=torch.channels_last)
    path = tmp_path / "student.safetensors"
    save_student(path, model.state_dict(), "resnet8", facts_of_three_classes())
    again, facts = load_student(path)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.to(memory_format=torch.channels_last)(x), model.eval()(x))
    assert facts["arch"] == "resnet8"
    assert facts["classes"] == ["a", "b", "c"]
    first = path.read_bytes()
    save_student(path, model.state_dict(), "resnet8", facts_of_three_classes())
    assert path.read_bytes() == first
    for content, message in (
        (first[:100], "is damaged"),
        (b"", "is damaged"),
        (first.replace(b"dml_fast", b"dml_slow"), "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_student(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_student(tmp_path / "none.safetensors")
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="is not a student of dml_fast: check the path"):
        load_student(path)


@pytest.fixture
def student(tmp_path: Path) -> tuple[Path, nn.Module]:
    """Save a student; return its file and the network."""
    model = create_model("resnet8", num_classes=3, in_channels=1, image_size=8)
    save_student(
        tmp_path / "s.safetensors", model.state_dict(), "resnet8", facts_of_three_classes()
    )
    return tmp_path / "s.safetensors", model


def test_any_changed_byte_of_a_students_file_is_seen(student: tuple[Path, nn.Module]) -> None:
    path, _ = student
    data = path.read_bytes()
    for damaged in mutations(data, 300):
        if damaged != data:
            path.write_bytes(damaged)
            assert outcome(lambda: load_student(path)) is None


@pytest.mark.parametrize("key", ["sha256", "fingerprint", "version"])
def test_a_header_without_a_checksum_has_no_other_entries(
    key: str, student: tuple[Path, nn.Module]
) -> None:
    path, _ = student
    path.write_bytes(path.read_bytes().replace(f'{key}\\"'.encode(), f'{key[:-1]}x\\"'.encode()))
    with pytest.raises(UserError, match=r"lacks the checksum|bad checksum"):
        load_student(path)


def header_of_before() -> dict[str, Any]:
    """What files without a checksum hold: neither inputs nor a view, nor a head."""
    header: dict[str, Any] = json.loads(header_of("resnet8", facts_of_three_classes()))
    del header["inputs"], header["view"], header["head"]
    return header


def save_as_before(path: Path, header: Any) -> None:
    """Write the student's tensors again with a header of before there was a checksum."""
    save_file(load_file(path), path, {"dml_fast": json.dumps(header)})


def test_files_of_before_the_checksum_load(student: tuple[Path, nn.Module]) -> None:
    path, model = student
    save_as_before(path, header_of_before())
    again, header = load_student(path)
    assert header["arch"] == "resnet8" and header["view"] == 0
    assert header["inputs"] == [{"kind": "image", "shape": [1, 8, 8]}]
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_odd_headers_are_refused(student: tuple[Path, nn.Module]) -> None:
    path, _ = student
    header = header_of_before()
    for changed in [*mutated_json(header, 200), header | {"in_channels": 10**6}, [], "x", 3]:
        save_as_before(path, changed)
        outcome(lambda: load_student(path))
    with pytest.raises(UserError):
        save_as_before(path, header | {"in_channels": 10**6})
        load_student(path)


def test_a_student_is_built_with_the_input_of_its_view(tmp_path: Path) -> None:
    """Its first layer has the size of view 1; the file names the view, and no other fits."""
    facts = facts_of_vectors()
    model = create_model("mlp_4", num_classes=3, inputs=facts.inputs[1]).eval()
    path = tmp_path / "s.safetensors"
    save_student(path, model.state_dict(), "mlp_4", facts, view=1)
    again, header = load_student(path)
    x = torch.ones(2, 3)
    assert header["view"] == 1 and header["inputs"][1] == {"kind": "vector", "shape": [3]}
    assert torch.equal(again(x), model(x))
    save_student(path, model.state_dict(), "mlp_4", facts, view=0)
    with pytest.raises(UserError, match="is damaged"):
        load_student(path)


@pytest.mark.parametrize("view", [-1, 3, "1", 1.0, None, True])
def test_a_view_that_the_data_lacks(tmp_path: Path, view: Any) -> None:
    facts = facts_of_vectors()
    model = create_model("mlp_4", num_classes=3, inputs=facts.inputs[0])
    save_student(tmp_path / "s.safetensors", model.state_dict(), "mlp_4", facts, view=view)
    with pytest.raises(UserError, match="view is"):
        load_student(tmp_path / "s.safetensors")
