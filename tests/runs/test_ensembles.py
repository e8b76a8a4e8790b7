"""``export --student ensemble``: one file in each format, with the numbers of `evaluate`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import json_of, refusal_of, train
from market_cases import make_market
from retrieval_cases import embeddings, oracle
from run_cases import facts_of_three_classes, facts_of_vectors
from torch import Tensor

from dml_fast import cli
from dml_fast.data import RetrievalSet, open_dataset
from dml_fast.errors import UserError
from dml_fast.evaluate import main as evaluate
from dml_fast.export import main
from dml_fast.models.heads import Head, new_network
from dml_fast.predict import main as predict
from dml_fast.runs import checkpoint
from dml_fast.runs.exported import Apply, TrainedEnsemble
from dml_fast.runs.exporting import export
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.weights import HEADER, load_ensemble, load_student

pytestmark = pytest.mark.compat


def need(kind: str) -> None:
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="needs pip install 'dml_fast[export]'")


def opened(path: Path, inputs: list[str]) -> tuple[Apply, dict[str, Any]]:
    """Read a file as its users do; return the network and what the file says about it."""
    if path.suffix == ".safetensors":
        return load_ensemble(path)
    if path.suffix == ".pt2":
        extra = {f"{HEADER}.json": ""}
        module = torch.export.load(path, extra_files=extra).module()
        return module, json.loads(extra[f"{HEADER}.json"])
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == inputs

    def apply(*given: Tensor) -> tuple[Tensor, ...]:
        named = {name: x.numpy() for name, x in zip(inputs, given, strict=True)}
        found = tuple(map(torch.from_numpy, session.run(None, named)))
        return found[0] if len(found) == 1 else found

    return apply, json.loads(session.get_modelmeta().custom_metadata_map[HEADER])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ensemble") / "run"
    options = "--arch resnet8,resnet14 --epochs 1 --train-fraction 0.1 --device cpu"
    assert train(*options.split(), "--out", str(path)) == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pt2", "onnx"])
def test_a_file_says_what_evaluate_and_predict_say(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(kind)
    path = tmp_path / f"e.{kind}"
    arguments = ["--student", "ensemble", "--format", kind, "--out", str(path)]
    assert main([str(run), *arguments]) == 0
    assert "ensemble of students 0 (resnet8), 1 (resnet14) of best.pt" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    network, header = opened(path, ["images"])
    assert header["archs"] == ["resnet8", "resnet14"] and header["classes"] == list("0123456789")
    test = open_dataset("digits", val_fraction=0.1, train_fraction=0.1, seed=0).test
    assert test is not None
    pixels = torch.from_numpy(test.images).double() / 255
    inputs = ((pixels - header["mean"][0]) / header["std"][0]).float()
    with torch.no_grad():
        found = network(inputs)
    right = (found.argmax(1).numpy() == test.labels).mean()
    assert right == json_of(evaluate, capsys, run)["ensemble_accuracy"]
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for i in range(20):
        Image.fromarray(test.images[i, 0]).save(folder / f"{i:02d}.png")
    out = tmp_path / "classes.jsonl"
    options = ["--student", "ensemble", "--top", "10", "--out", str(out), "--device", "cpu"]
    assert predict([str(run), str(folder), *options]) == 0
    for row, line in zip(found, map(json.loads, out.read_text().splitlines()), strict=False):
        said = dict(zip(line["classes"], line["probabilities"], strict=True))
        np.testing.assert_allclose(row, [said[str(c)] for c in range(10)], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_embeddings_rank_as_the_ensemble_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"market1501:{make_market(tmp_path / 'market')}"
    options = "--arch resnet8 --epochs 1 --batch-size 16 --image-size 0 --val-fraction 0.25"
    run, out = tmp_path / "run", tmp_path / "both.safetensors"
    assert train(*options.split(), "--data", data, "--out", str(run), "--device", "cpu") == 0
    arguments = ["--student", "ensemble", "--checkpoint", "last", "--out", str(out)]
    assert main([str(run), *arguments]) == 0
    images = open_dataset(data, val_fraction=0.25).test
    assert isinstance(images, RetrievalSet)
    network, facts = load_ensemble(out)
    mean, std = (np.reshape(facts[key], (1, -1, 1, 1)) for key in ("mean", "std"))
    with torch.no_grad():
        x = torch.from_numpy(((images.images / 255 - mean) / std).astype(np.float32))
        f = network(x).double().numpy()
    np.testing.assert_allclose(f, embeddings(run, images)[-1], atol=1e-5)
    found = json_of(evaluate, capsys, run, "--checkpoint", "last")["ensemble"]
    assert oracle(f, images) == pytest.approx(found)


def trained(facts: DataFacts, archs: list[str]) -> TrainedEnsemble:
    torch.manual_seed(0)
    made = (new_network(arch, 3, facts.input_of(k), facts.head) for k, arch in enumerate(archs))
    return TrainedEnsemble(tuple(net.eval() for net in made), tuple(archs), facts)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        *(("safetensors", answer) for answer in ("probabilities", "embeddings", "codes")),
        *(
            pytest.param(kind, answer, marks=pytest.mark.slow)
            for kind in ("pt2", "onnx")
            for answer in ("embeddings", "codes")
        ),
    ],
)
def test_students_with_other_views_take_their_own_inputs(
    kind: str, answer: str, tmp_path: Path
) -> None:
    need(kind)
    heads = {"embeddings": Head("bnneck"), "codes": Head("hash", 5)}
    facts = facts_of_vectors()
    facts = replace(facts, retrieval=answer == "embeddings", head=heads.get(answer, Head("linear")))
    students = trained(facts, ["mlp_4", "mlp_6", "mlp_8", "mlp_4"])
    inputs = [torch.randn(7, *spec.shape) for spec in facts.inputs]
    path = tmp_path / f"e.{kind}"
    assert export(students, kind, path, *inputs).passed
    names = ["vectors_0", "vectors_1", "vectors_2"]
    assert students.input_names == tuple(names)
    network, _ = opened(path, names)
    for count in (1, 7):
        rows = [x[:count] for x in inputs]
        with torch.no_grad():
            expected, found = students.network(*rows), network(*rows)
        if answer == "codes":
            assert torch.equal(expected[1], found[1])
            expected, found = expected[0], found[0]
        assert torch.allclose(expected, found, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_file_of_one_student_is_no_ensemble(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert main([str(copy), "--student", "ensemble"]) == 0
    path = copy / "ensemble-best.safetensors"
    with pytest.raises(UserError, match=r"is an ensemble: read it with load_ensemble"):
        load_student(path)
    with pytest.raises(UserError, match=r"is one student: read it with load_student"):
        load_ensemble(copy / "student_0.safetensors")
    assert len(load_ensemble(path)[0].students) == 2
    other = trained(facts_of_three_classes(), ["resnet8", "resnet14"])
    other.save(path)
    with pytest.raises(UserError, match="is of another run"):
        load_ensemble(path)
    other.save(tmp_path / "elsewhere.safetensors")
    assert load_ensemble(tmp_path / "elsewhere.safetensors")[1]["archs"] == list(other.archs)
    code = other._replace(archs=("resnet8", "mine:net"))
    code.save(tmp_path / "code.safetensors")
    with pytest.raises(UserError, match=r"mine:net.*give load_ensemble allow_code"):
        load_ensemble(tmp_path / "code.safetensors")


@pytest.mark.slow
def test_an_ensemble_with_a_student_that_diverged_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    state = checkpoint.load(copy / "last.pt")
    weights = state["students"][1]["model"]
    weights[next(iter(weights))].fill_(float("nan"))
    torch.save(state, copy / "last.pt")
    before = set(copy.iterdir())
    arguments = [copy, "--student", "ensemble", "--checkpoint", "last"]
    error = refusal_of(main, capsys, *arguments)
    assert "student 1's weights" in error and "give another --checkpoint, or --student" in error
    assert set(copy.iterdir()) == before
    assert cli.run(main, [str(copy), "--student", "0", "--checkpoint", "last"]) == 0
