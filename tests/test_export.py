"""``python -m dml_fast.export``: files that compute what the student does, or no files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import facts_of_three_classes
from torch import Tensor, nn

from dml_fast import cli
from dml_fast.data import open_dataset
from dml_fast.export import main
from dml_fast.models.heads import Head, new_network
from dml_fast.runs import checkpoint, exporting
from dml_fast.runs.exporting import TrainedStudent, export
from dml_fast.runs.folder import Run
from dml_fast.runs.weights import HEADER, build_student, load_student
from dml_fast.train import main as train

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "run"
    options = "--arch resnet8,resnet14 --epochs 1 --train-fraction 0.1 --device cpu"
    assert train([*options.split(), "--out", str(path)]) == 0
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Five test images, normalised by hand."""
    data = open_dataset("digits", val_fraction=0.1, train_fraction=0.1, seed=0)
    assert data.test is not None
    pixels = torch.from_numpy(data.test.images[:5]).double() / 255
    return ((pixels - data.mean[0]) / data.std[0]).float()


def logits(folder: Path, student: int, inputs: Tensor, which: str = "best") -> Tensor:
    """What the student itself says."""
    state = checkpoint.load(folder / f"{which}.pt")["students"][student]
    facts = Run.open(folder).facts
    with torch.no_grad():
        out: Tensor = build_student(state["arch"], facts, state["model"])(inputs)
    return out


def check_header(header: str, folder: Path) -> None:
    facts = json.loads(header)
    data = json.loads((folder / "config.json").read_text())["data"]
    assert facts["arch"] == "resnet8" and data.items() <= facts.items()
    assert data["classes"] == list("0123456789") and len(data["mean"]) == 1


def test_safetensors_is_a_student_again(folder: Path, inputs: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    assert main([str(folder), "--student", "1", "--out", str(path)]) == 0
    model, facts = load_student(path)
    with torch.no_grad():
        assert torch.equal(model(inputs), logits(folder, 1, inputs))
    data = json.loads((folder / "config.json").read_text())["data"]
    assert data.items() <= facts.items() and facts["arch"] == "resnet14"


@pytest.mark.slow
def test_pt2_runs_on_any_number_of_images(folder: Path, inputs: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    arguments = [str(folder), "--student", "0", "--format", "pt2", "--out", str(path)]
    assert main(arguments) == 0
    extra = {f"{HEADER}.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    for count in (1, 2, 5):
        torch.testing.assert_close(module(inputs[:count]), logits(folder, 0, inputs[:count]))
    check_header(extra[f"{HEADER}.json"], folder)


def test_onnx_runs_on_any_number_of_images(folder: Path, inputs: Tensor, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs pip install 'dml_fast[export]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'dml_fast[export]'")
    path = tmp_path / "x.onnx"
    arguments = [str(folder), "--student", "0", "--format", "onnx", "--out", str(path)]
    assert main(arguments) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]  # weights are in it
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        [found] = session.run(["logits"], {"images": inputs[:count].numpy()})
        expected = logits(folder, 0, inputs[:count])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    check_header(session.get_modelmeta().custom_metadata_map[HEADER], folder)


def test_onnx_names_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name)
    )
    before = set(folder.iterdir())
    assert cli.run(main, [str(folder), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "onnxscript" in error and "pip install 'dml_fast[export]'" in error
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("better", [0, 1])
def test_best_is_by_validation_in_the_checkpoints_epoch(
    copy: Path, better: int, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(copy / "last.pt")
    history = json.loads(state["history"])
    for k, student in enumerate(history[-1]["students"]):
        student["val_acc"] = 0.9 if k == better else 0.8
    torch.save(state | {"history": json.dumps(history)}, copy / "last.pt")
    assert main([str(copy), "--checkpoint", "last"]) == 0
    out = capsys.readouterr().out
    assert f"student_{better}-last.safetensors: student {better} " in out
    assert "32 images of the validation split" in out
    assert (copy / f"student_{better}-last.safetensors").is_file()


def test_before_the_first_validation_no_student_is_best(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(copy / "last.pt")
    torch.save(state | {"history": "[]"}, copy / "last.pt")
    assert cli.run(main, [str(copy), "--checkpoint", "last"]) == 2
    assert "give --student with a number" in capsys.readouterr().err
    assert main([str(copy), "--checkpoint", "last", "--student", "1"]) == 0


def test_without_the_data_random_images_are_compared_and_it_says_so(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"data": "digits"', '"data": "folder:/nowhere"'))
    assert main([str(copy)]) == 0
    assert "on 32 random images" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["a bit", "nan", "another shape"])
def test_a_file_that_differs_is_not_kept(
    copy: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: object, path: Path) -> Any:
        model = load_student(path)[0]
        if wrong == "another shape":
            return lambda x: model(x)[:, :1]
        # only the larger batch differs, so that looking at one is not enough
        return lambda x: model(x) + (len(x) > 1) * (1e-6 if wrong == "a bit" else float("nan"))

    monkeypatch.setattr(exporting, "_read_safetensors", read)
    path = copy / "student_0-best.safetensors"
    path.write_bytes(b"an old one")
    before = set(copy.iterdir())
    assert main([str(copy), "--student", "0"]) == 1
    assert path.read_bytes() == b"an old one" and set(copy.iterdir()) == before


class Untraceable(nn.Module):
    """Chooses by a value, which a graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)


class FrozenBatch(nn.Module):
    """Computes one thing for two images and another for more, which tracing cannot see."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * (1.0 if torch.compiler.is_exporting() or len(x) < 3 else 2.0)


def test_a_network_that_cannot_be_traced_is_a_users_error(tmp_path: Path) -> None:
    student = TrainedStudent(Untraceable().eval(), "mine:net", facts_of_three_classes())
    with pytest.raises(ValueError, match=r"mine:net cannot be traced .* --format safetensors"):
        export(student, "pt2", tmp_path / "x.pt2", torch.ones(3, 1, 8, 8))
    assert not list(tmp_path.iterdir())


def test_what_tracing_got_wrong_is_found(tmp_path: Path) -> None:
    student = TrainedStudent(FrozenBatch().eval(), "mine:net", facts_of_three_classes())
    check = export(student, "pt2", tmp_path / "x.pt2", torch.ones(3, 1, 8, 8))
    assert not check.passed and check.difference == 1.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "2"], "--student is '2' and .* has 2 students: .* from 0 to 1"),
        (["--student", "-1"], "--student is '-1'"),
        (["--student", "worst"], "--student is 'worst'"),
        (["--format", "pt2", "--out", "x.onnx"], "x.onnx does not end in .pt2"),
        (["--out", "/proc/nowhere/x.safetensors"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_named(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert cli.run(main, [str(folder), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["bnneck", "hash"])
@pytest.mark.parametrize("format_", ["safetensors", "pt2", "onnx"])
def test_each_head_of_classes_gives_logits(
    kind: Any, format_: str, inputs: Tensor, tmp_path: Path
) -> None:
    """And codes; a program with a bit of another sign is not kept."""
    if format_ == "onnx":
        pytest.importorskip("onnxruntime")
    head = Head(kind, 12 if kind == "hash" else 0)
    facts = facts_of_three_classes(head=head)
    torch.manual_seed(0)
    net = new_network("resnet8", 3, facts.inputs[0], head).eval()
    student = TrainedStudent(net, "resnet8", facts)
    assert student.outputs == (("logits", "codes") if kind == "hash" else ("logits",))
    assert export(student, format_, tmp_path / f"s.{format_}", inputs).passed


def test_codes_that_differ_are_seen(inputs: Tensor, tmp_path: Path) -> None:
    head = Head("hash", 12)
    facts = facts_of_three_classes(head=head)
    net = new_network("resnet8", 3, facts.inputs[0], head).eval()
    student = TrainedStudent(net, "resnet8", facts)
    for byte, seen in ((128, True), (1, float("inf"))):  # a bit, and one that is filled up

        def apply(x: Tensor, byte: int = byte) -> tuple[Tensor, Tensor]:
            logits, codes = student.network(x)
            codes[-1, -1] ^= byte
            return logits, codes

        with torch.no_grad():
            check = exporting._compare(student, apply, [inputs], exact=False)
        assert not check.passed and (seen is True or check.difference == seen)
