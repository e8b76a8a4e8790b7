"""Students that read different views of a row: each is what a run of its own would be."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_cases import digest, train
from torch import Tensor
from view_cases import SIZES, config_of_views, make_views

from dml_fast.config import TrainConfig
from dml_fast.data import VectorSet, open_dataset
from dml_fast.data.loaders import train_loader
from dml_fast.data.plan import Augmentation
from dml_fast.engine import Cohort, Engine, Precision, Student
from dml_fast.engine.optim import make_optimizer
from dml_fast.engine.threads import Threads
from dml_fast.errors import UserError
from dml_fast.eval.of_run import evaluate_run
from dml_fast.export import main as export
from dml_fast.models import InputSpec, create_model
from dml_fast.rng import derive_seed, seed_everything
from dml_fast.runs.folder import Run
from dml_fast.runs.weights import load_student
from dml_fast.training.students import build_cohort

CPU = Precision(torch.device("cpu"))
CASES: dict[str, dict[str, Any]] = {
    "dropout": {},
    "five students on three views": {"cohort": 5},
    "mixed, adamw": {"arch": "mlp_8,mlp_4_drop0.5,mlp_6_drop0", "cohort": 0, "optimizer": "adamw"},
    "alternating": {"update": "alternating"},
    "distill": {"method": "distill", "epochs": 2},
    "amp": {"amp": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_split_equals_straight(tmp_path: Path, options: dict[str, Any]) -> None:
    config = config_of_views(make_views(tmp_path / "v.npz"), **options)
    assert train(tmp_path / "straight", config)
    split = tmp_path / "split"
    assert not train(split, config, steps=7)
    assert not train(split, config, steps=10, resume=True)
    assert train(split, config, resume=True)
    assert digest(split) == digest(tmp_path / "straight")


def trained_weights(engine: Engine, data: Any) -> list[dict[str, Tensor]]:
    """Train two epochs; return the weights of each student."""
    how = Augmentation()
    loader = train_loader(
        data, how, batch_size=16, seed=1, device="cpu", students=engine.cohort.total
    )
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            views = isinstance(batch.inputs, tuple)
            engine.step(batch.inputs, batch.target, views=views)
    return [student.weights() for student in engine.cohort]


@pytest.mark.parametrize("executor", [None, "threads"])
def test_without_teaching_each_student_is_a_run_of_its_own(
    tmp_path: Path, executor: str | None
) -> None:
    """Bit for bit: KL of weight 0 over three views, and each view's student alone."""
    spec = make_views(tmp_path / "v.npz")
    config = config_of_views(spec, arch="mlp_8_drop0,mlp_4_drop0,mlp_8_drop0", cohort=0)
    data = open_dataset(spec, levels=())
    assert [one.shape for one in data.inputs] == [(size,) for size in SIZES.values()]
    cohort = build_cohort(config, CPU, num_classes=4, inputs=data.inputs)
    how = Threads(3, workers=2, threads_each=torch.get_num_threads()) if executor else None
    together = trained_weights(Engine(cohort, kl_weight=0.0, executor=how), data)
    for k, (name, arch) in enumerate(zip(SIZES, config.architectures, strict=True)):
        own = open_dataset(spec, levels=(name,))
        assert isinstance(own.train, VectorSet) and own.inputs == (data.inputs[k],)
        seed_everything(derive_seed(config.seed, "student", k))
        model = create_model(arch, num_classes=4, inputs=own.inputs[0])
        optimizer = make_optimizer(
            list(model.parameters()), algorithm="sgd", lr=config.peak_lrs[0], momentum=0.9,
            weight_decay=5e-4,
        )  # fmt: skip
        alone = Engine(Cohort([Student(model, optimizer, CPU, arch)]), method="independent")
        [weights] = trained_weights(alone, own)
        assert all(torch.equal(weights[n], together[k][n]) for n in weights), name
    taught = trained_weights(
        Engine(build_cohort(config, CPU, num_classes=4, inputs=data.inputs)), data
    )
    assert not torch.equal(taught[0]["classifier.weight"], together[0]["classifier.weight"])


@pytest.mark.slow
def test_a_weight_of_0_is_independent_training(tmp_path: Path) -> None:
    """By the options, with dropout: the same files, though the loss shows a KL."""
    data = make_views(tmp_path / "v.npz")
    assert train(tmp_path / "zero", config_of_views(data, kl_weight=0.0, epochs=1))
    assert train(tmp_path / "independent", config_of_views(data, method="independent", epochs=1))
    for k in range(3):
        files = [tmp_path / run / f"student_{k}.safetensors" for run in ("zero", "independent")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("views")
    config = config_of_views(make_views(folder / "v.npz"), epochs=2, cohort=4)
    assert train(folder / "run", config)
    return Run(folder / "run")


def test_facts_and_files_name_the_views(run: Run) -> None:
    assert run.facts.inputs == tuple(InputSpec("vector", (size,)) for size in SIZES.values())
    for k, size in enumerate((6, 4, 9, 6)):
        model, header = load_student(run.weights(k))
        assert header["view"] == k % 3
        assert model.get_submodule("hidden").weight.shape == (8, size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pt2", "onnx"])
def test_each_export_gives_what_evaluate_counted(run: Run, tmp_path: Path, kind: str) -> None:
    """Each file alone, on its own view's columns of the test rows, is as often right."""
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="needs pip install 'dml_fast[export]'")
    counted = evaluate_run(run.folder, split="test", device="cpu")
    data = open_dataset(run.config.data, **run.config.data_options, features=run.folder)
    assert isinstance(data.test, VectorSet)
    probabilities = torch.zeros(40, 4)
    for k in range(4):
        path = tmp_path / f"student.{kind}"
        options = ["--student", str(k), "--format", kind, "--out", str(path)]
        assert export([str(run.folder), *options]) == 0
        model = loaded(path)
        with torch.no_grad():
            logits = model(torch.from_numpy(data.test.views[k % 3]))
        right = (logits.argmax(1).numpy() == data.test.labels).mean()
        assert counted["students"][k]["accuracy"] == pytest.approx(right)
        probabilities += logits.softmax(1) / 4
    right = (probabilities.argmax(1).numpy() == data.test.labels).mean()
    assert counted["ensemble_accuracy"] == pytest.approx(right)
    assert right > 0.5


def loaded(path: Path) -> Any:
    """A function of vectors (N, D) to logits (N, C)."""
    if path.suffix == ".safetensors":
        return load_student(path)[0]
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = import_module("onnxruntime").InferenceSession(path.read_bytes())
    return lambda x: torch.from_numpy(session.run(["logits"], {"vectors": x.numpy()})[0])


def test_a_students_file_under_another_students_name_is_refused(run: Run, tmp_path: Path) -> None:
    """Views 0 and 3 have one size: only the header tells student 0 of view 0 from the others."""
    content = run.weights(1).read_bytes()
    (tmp_path / "config.json").write_bytes(run.config_file.read_bytes())
    for k, fits in ((1, True), (0, False), (2, False), (3, False)):
        path = tmp_path / f"student_{k}.safetensors"
        path.write_bytes(content)
        if fits:
            load_student(path)
        else:
            with pytest.raises(UserError, match="is of another run"):
                load_student(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cohort": 2}, "has 3 views and the cohort 2 students, .* give --cohort 3"),
        ({"arch": "resnet8"}, "resnet8 is a network for images and its inputs are vectors"),
    ],
)
def test_cohorts_that_do_not_fit_the_views(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    config = config_of_views(make_views(tmp_path / "v.npz"), **options)
    with pytest.raises(UserError, match=message):
        config.check()
        train(tmp_path / "run", config)


def test_other_data_needs_the_same_columns(run: Run, tmp_path: Path) -> None:
    other = make_views(tmp_path / "other.npz", sizes={**SIZES, "pairs": 5})
    with pytest.raises(UserError, match=r"x_pairs has 5 columns, .* take vectors of 4"):
        evaluate_run(run.folder, data=other)
    with pytest.raises(UserError, match="images of 1 x 8 x 8"):
        evaluate_run(run.folder, data="digits")


@pytest.mark.slow
def test_without_the_data_an_export_is_compared_on_random_vectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_views(tmp_path / "v.npz")
    assert train(tmp_path / "run", config_of_views(data, epochs=1))
    (tmp_path / "v.npz").unlink()
    assert export([str(tmp_path / "run"), "--student", "2"]) == 0
    assert "on 32 random vectors" in capsys.readouterr().out


def test_the_default_network_is_the_datas() -> None:
    assert TrainConfig(data="vectors:a.npz", cohort=3).architectures == ("mlp_64",) * 3
    assert TrainConfig(data="text:a.tsv").architectures == ("mlp_64",) * 2
    assert TrainConfig().architectures == ("resnet32",) * 2


@pytest.mark.slow
@pytest.mark.parametrize("with_run", [True, False])
def test_weights_to_start_from(
    run: Run, tmp_path: Path, with_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each student starts from its own; a file of one view fits no student of another."""
    data = make_views(tmp_path / "v.npz")
    if with_run:
        config = config_of_views(data, pretrained=str(run.folder), lr=1e-9, epochs=1)
        assert train(tmp_path / "run", config)
        assert (
            "may be of other features" not in capsys.readouterr().err
        )  # the same file, so the same features
        for k in range(3):
            mine, theirs = (load_student(r.weights(k))[0] for r in (Run(tmp_path / "run"), run))
            torch.testing.assert_close(
                mine.get_submodule("hidden").weight, theirs.get_submodule("hidden").weight
            )
        return
    config = config_of_views(data, pretrained=str(run.weights(0)))
    with pytest.raises(UserError, match=r"--pretrained .*hidden\.weight"):
        train(tmp_path / "run", config)
    assert capsys.readouterr().err.count("may be of other features") == 1


@pytest.mark.slow
def test_runs_of_images_from_before_load(tmp_path: Path) -> None:
    """Neither config.json nor the students' files had ``inputs``, and options of today."""
    config = TrainConfig(arch="resnet8", epochs=2, train_fraction=0.25, seed=5)
    folder = tmp_path / "run"
    assert not train(folder, config, steps=3)
    description = json.loads((folder / "config.json").read_text())
    del description["data"]["inputs"]
    for option in ("labels", "unlabelled_share", "small_loss", "prior", "levels", "classes", "dim"):
        del description["config"][option]
    (folder / "config.json").write_text(json.dumps(description))
    assert train(folder, config, resume=True)
    assert evaluate_run(folder, device="cpu")["students"][0]["accuracy"] > 0
    assert export([str(folder), "--student", "1"]) == 0
