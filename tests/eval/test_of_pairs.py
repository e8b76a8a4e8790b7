"""``python -m dml_fast.register``: a run on pairs registers images, and its own training pairs."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import json_of, refusal_of
from pair_cases import BIAS, make_pairs, two_modalities
from run_cases import facts_of_three_classes

from dml_fast import cli
from dml_fast.config import TrainConfig
from dml_fast.data import PairSet
from dml_fast.data.offset_files import offsets_in
from dml_fast.errors import UserError
from dml_fast.eval import of_pairs
from dml_fast.export import main as export
from dml_fast.register import main, register
from dml_fast.runs import checkpoint
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import Trained
from dml_fast.runs.weights import load_student
from dml_fast.train import main as train_command

pytestmark = pytest.mark.slow
OPTIONS = "--arch displacement_8 --patch 12 --search 3 --batch-size 16 --device cpu --lr 0.04"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students of 120 pairs, which tell by how much they are off."""
    path = tmp_path_factory.mktemp("pairs")
    data = make_pairs(path / "pairs.npz", 120, aligned=False, offset=True)
    options = f"--data {data} {OPTIONS} --epochs 9 --out {path / 'run'}"
    assert cli.run(train_command, options.split()) == 0
    return path / "run"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two views of one scene, the second seen from (2, -1): its content is at (-2, 1)."""
    path = tmp_path_factory.mktemp("images")
    first, second = two_modalities(64, seed=3)
    for name, image in (("a", first[10:40, 10:44]), ("b", second[12:42, 9:43])):
        np.save(path / f"{name}.npy", image)
    return path / "a.npy", path / "b.npy"


def told_pairs(path: Path, count: int, **options: Any) -> tuple[np.ndarray, ...]:
    """Both sides of pairs of another scene, and by how much they are off."""
    with np.load(make_pairs(path / "told.npz", count, seed=1, **options)[len("pairs:") :]) as told:
        sides = [told[name].astype(np.float32) for name in "ab"]
        return *sides, told["offset"] if "offset" in told else np.zeros((count, 2), np.int64)


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return json_of(main, capsys, *arguments, "--device", "cpu")


refusal = partial(refusal_of, main)


def test_two_files(
    folder: Path, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The true displacement, in words and in files; the surface is that of the library."""
    surface, picture = tmp_path / "new" / "s.npz", tmp_path / "p.png"
    arguments = [str(folder), *map(str, pair), "--surface", str(surface), "--picture", str(picture)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("rows -2, columns 1: what ")
    assert "lies 2 pixels above and 1 right of its place in" in out
    assert "of 7 x 7 displacements; 2 students of best.pt" in out
    assert f"{pair[0]} without a border of 3 pixels, for a search of 3" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    a, b = map(np.load, pair)
    trained = Trained.load(Run.open(folder), "best")
    expected = register([trained.model(k) for k in range(2)], a[3:-3, 3:-3], b)
    with np.load(surface) as file:
        assert file["offset"].tolist() == expected.offset.tolist() == [-2, 1]
        np.testing.assert_array_equal(file["logits"], expected.logits)
        assert file["margin"] == expected.margin


def test_the_second_image_may_be_wider(
    folder: Path, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the search, by more, and by less: the same comparison, and what is cut off is said."""
    a = np.load(pair[0])
    results = []
    for border in (3, 5, 1):
        inner = a[border:-border, border:-border]
        np.save(tmp_path / "a.npy", inner)
        results.append(found(capsys, folder, tmp_path / "a.npy", pair[1]))
    assert [(r["rows"], r["columns"]) for r in results] == [(-2, 1)] * 3
    assert results[0]["cut"] == ""
    assert results[1]["cut"].startswith(f"{pair[1]} without a border of 2 pixels")
    assert results[2]["cut"].startswith(f"{tmp_path / 'a.npy'} without a border of 2 pixels")
    assert results[2]["margin"] == results[0]["margin"]
    less = found(capsys, folder, *pair, "--search", 2)
    assert (less["rows"], less["columns"], less["search"]) == (-2, 1, 2)


def test_pairs_that_do_not_tell_are_registered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that stand out most are nearer to the truth than all are."""
    a, b, truth = told_pairs(tmp_path, 100, aligned=False, offset=True)
    numbers, zeros = np.arange(100) + 7, np.zeros((100, 2), np.int64)
    hidden = PairSet(a, b, offset=zeros, numbers=numbers, search=3, patch=12, seed=0)
    monkeypatch.setattr(of_pairs, "open_data", lambda *_, **__: SimpleNamespace(train=hidden))
    students = of_pairs.StudentsOfPairs.load(folder, "best", "cpu")
    errors = []
    for keep, count in ((1.0, 100), (0.3, 30)):
        result = of_pairs.register_training_pairs(students, keep, tmp_path / "o.tsv")
        assert (result["pairs"], result["kept"], result["no_room"]) == (100, count, 0)
        assert result["mean_offset"] == result["mean_correction"]
        offsets = offsets_in(tmp_path / "o.tsv")
        assert len(offsets) == count and list(offsets) == sorted(offsets, key=int)
        wrong = [np.array(o) - truth[int(name) - 7] for name, o in offsets.items()]
        errors.append(np.hypot(*np.transpose(wrong)).mean())
        if keep == 1.0:
            assert np.abs(np.array(result["mean_offset"]) - BIAS).max() < 0.7
    assert errors[1] < errors[0] < 1.5


def test_offsets_add_up_over_rounds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair starts from the run's --offsets, or the data's where those leave it out."""
    first, second = tmp_path / "1.tsv", tmp_path / "2.tsv"
    once = found(capsys, folder, "--training-pairs", "--out", first)
    assert (once["pairs"], once["kept"]) == (108, 54)
    config = Run.open(folder).config
    options = f"--data {config.data} {OPTIONS} --epochs 1 --offsets {first} --out {tmp_path / 'r'}"
    assert cli.run(train_command, [*options.split(), "--pretrained", str(folder)]) == 0
    assert "may be of other features" not in capsys.readouterr().err  # that is for vectors
    twice = found(capsys, tmp_path / "r", "--training-pairs", "--keep", 1, "--out", second)
    assert (twice["pairs"], twice["kept"] + twice["no_room"]) == (108, 108)
    trained = Trained.load(Run.open(tmp_path / "r"), "best")
    before, after = offsets_in(first), offsets_in(second)
    models = [trained.model(k) for k in range(2)]
    with np.load(config.data.removeprefix("pairs:")) as file:
        a, b, own = file["a"], file["b"], file["offset"]
    seen = set()
    for name in [*after][::9]:
        pair = int(name)
        base = np.array(before.get(name, own[pair]))
        seen.add(name in before)
        row, column = base + 8 - 3
        moved = register(models, a[pair], b[pair, row : row + 22, column : column + 22]).offset
        assert after[name] == tuple(base + moved)
    assert seen == {True, False}


def test_offsets_near_the_margin(folder: Path, tmp_path: Path) -> None:
    """The part of a whose surroundings are in b is registered; what could not be shown is left."""
    a, b, _ = told_pairs(tmp_path, 40)
    far = np.zeros((40, 2), np.int64)
    far[:20] = -6, 2  # the content is 6 rows below where this says; the margin is 8, the search 3
    pairs = PairSet(a, b, far, np.arange(40), search=3, patch=12, seed=0)
    students = of_pairs.StudentsOfPairs.load(folder, "best", "cpu")
    surfaces = of_pairs.register_pairs(students, pairs)
    for i in (0, 39):
        top = 8 + far[i] - 3
        rows = slice(max(0, -top[0]), 16)
        expected = register(
            students.models,
            a[i, rows],
            b[i, top[0] + rows.start : top[0] + 22, top[1] : top[1] + 22],
        )
        np.testing.assert_allclose(surfaces[i].logits, expected.logits, atol=1e-5)
        assert surfaces[i].offset.tolist() == expected.offset.tolist()


def test_pairs_without_room_are_left_out(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their content is 7 rows off, and displacements could be shown for up to 6."""
    a, b, _ = told_pairs(tmp_path, 40)
    b[:10] = np.roll(b[:10], 7, axis=1)
    known = np.zeros((40, 2), np.int64)
    known[:10, 0] = 5
    pairs = PairSet(a, b, known, np.arange(40), search=3, patch=12, seed=0)
    assert pairs.room.tolist() == [6, 6]
    monkeypatch.setattr(of_pairs, "open_data", lambda *_, **__: SimpleNamespace(train=pairs))
    students = of_pairs.StudentsOfPairs.load(folder, "best", "cpu")
    result = of_pairs.register_training_pairs(students, 1.0, tmp_path / "o.tsv")
    assert 5 <= result["no_room"] <= 12 and result["kept"] == 40 - result["no_room"]
    offsets = offsets_in(tmp_path / "o.tsv")
    assert max(max(map(abs, offset)) for offset in offsets.values()) <= 6
    assert f"{result['no_room']} pairs are left out: their offset leaves no room" in caplog.text
    monkeypatch.setattr(
        of_pairs,
        "open_data",
        lambda *_, **__: SimpleNamespace(train=pairs.subset(np.arange(18))),
    )
    with pytest.raises(UserError, match="of 18 pairs have an offset that leaves room for crops"):
        of_pairs.register_training_pairs(students, 1.0, tmp_path / "p.tsv")
    assert not (tmp_path / "p.tsv").exists()


@pytest.mark.parametrize("kind", ["safetensors", "pt2", "onnx"])
def test_what_is_exported_registers_alike(
    folder: Path, pair: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """A student of a file gives the surface of the run's student, for any number of pairs."""
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="needs pip install 'dml_fast[export]'")
    path = tmp_path / f"x.{kind}"
    arguments = [str(folder), "--student", "1", "--format", kind, "--out", str(path)]
    assert cli.run(export, arguments) == 0
    student = Trained.load(Run.open(folder), "best").model(1)
    a, b = (torch.from_numpy(np.load(image)).float() for image in pair)
    x = torch.zeros(3, 2, 18, 18)
    for i in range(3):
        x[i, 0, 3:-3, 3:-3], x[i, 1] = a[i : i + 12, :12], b[i : i + 18, :18]
    with torch.inference_mode():
        expected = student(x)
    if kind == "safetensors":
        model, _ = load_student(path)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
        surface = register([model], a[3:-3, 3:-3], b).logits
        np.testing.assert_array_equal(surface, register([student], a[3:-3, 3:-3], b).logits)
    elif kind == "pt2":
        found = torch.export.load(path).module()(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        [logits] = session.run(["logits"], {"pairs": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_a_student_that_diverged_is_left_out(
    folder: Path,
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(Path(shutil.copytree(folder, tmp_path / "run")))
    for students, code in (([0], 0), ([0, 1], 2)):
        state = checkpoint.load(run.checkpoint("best"))
        for k in students:
            state["students"][k]["model"]["log_scale"].fill_(float("nan"))
        checkpoint.save(run, state, best=True)
        assert cli.run(main, [str(run.folder), *map(str, pair)]) == code
    assert "student 0's weights are not finite: it is left out" in caplog.text
    out, error = capsys.readouterr()
    assert "one student of best.pt" in out and "has finite weights in best.pt" in error


def test_images_that_are_refused(
    folder: Path, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (a, b) = tmp_path / "x.npy", pair
    good = np.load(a)
    nan = good.copy()
    nan[1, 2] = np.inf
    for image, message in (
        (nan, f"{path} is inf at row 1, column 2, and not finite in 1 of 1020 pixels"),
        (np.full((30, 34), 3.0), f"{path} is 3 everywhere, so nothing in it can be found"),
        (good[None], f"{path} has 3 dimension(s): pass one channel, (height, width)"),
        (good.astype(object), "is damaged (ValueError"),
        (good.astype(str), "has type <U"),
        (good[:, 1:], f"{path} is 30 x 33 and {b} 30 x 34 pixels: give images of one size"),
        (np.pad(good, 2), f"{path} is 34 x 38 and {b} 30 x 34 pixels: give images of one size"),
    ):
        np.save(path, image, allow_pickle=True)
        assert message in refusal(capsys, folder, path, b)
    np.save(path, good[:10, :10])
    assert "a search of 3 leaves too little of the first" in refusal(capsys, folder, path, path)
    assert "cannot be read (No such file" in refusal(capsys, folder, tmp_path / "no.npy", b)
    np.savez(tmp_path / "x.npz", a=good)
    assert "is damaged" in refusal(capsys, folder, a, tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("RUN A B --search 4", "--search is 4, and RUN learned displacements of up to 3 pixels"),
        (
            "RUN --training-pairs --out o --keep 0.1",
            "--keep 0.1 keeps 11 of 108 pairs, fewer than a batch of the run (16): give at least "
            "--keep 0.15",
        ),
        ("A A B", "is not a run folder, it has no config.json"),
    ],
)
def test_what_the_run_does_not_allow(
    folder: Path,
    pair: tuple[Path, Path],
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": folder, "A": pair[0], "B": pair[1]}
    given = [names.get(word, word) for word in arguments.split()]
    assert message.replace("RUN", str(folder)) in refusal(capsys, *given)
    assert not [*tmp_path.iterdir()]


def test_a_run_of_images_registers_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    run.prepare(0)
    run.describe(TrainConfig(arch="resnet8"), facts_of_three_classes(), [])
    error = refusal(capsys, tmp_path / "run", *pair)
    assert "was trained on images and registers nothing: give a run on --data pairs:" in error
