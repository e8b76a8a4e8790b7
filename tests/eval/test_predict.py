"""``python -m dml_fast.predict`` against `evaluate` on the same images, as files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_cases import json_of, refusal_of, tree
from market_cases import make_market
from mutations import mutations
from PIL import Image
from run_cases import reconfigure

from dml_fast import cli
from dml_fast.data import open_dataset
from dml_fast.data.loaders import evaluation_batches
from dml_fast.eval import of_images
from dml_fast.eval.given_images import GivenImages, find_images
from dml_fast.evaluate import main as evaluate
from dml_fast.predict import main
from dml_fast.runs.folder import Run
from dml_fast.runs.trained import open_data
from dml_fast.runs.weights import load_student
from dml_fast.train import main as train

pytestmark = pytest.mark.usefixtures("as_without_training")

BF16 = ("--amp", "--amp-dtype", "bf16")
ONE_EPOCH = ("--epochs", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixed cohort of digits after two epochs in bf16."""
    path = tmp_path_factory.mktemp("predict") / "run"
    options = ("--arch", "resnet8,resnet14", "--train-fraction", "0.5", *BF16)
    assert train([*options, "--epochs", "2", "--device", "cpu", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' test set as gray PNG files, in its order, each in a folder of its class."""
    root = tmp_path_factory.mktemp("pictures")
    test = open_dataset("digits").test
    assert test is not None
    for index, (image, label) in enumerate(zip(test.pixels, test.labels.tolist(), strict=True)):
        (root / f"{index:03d}" / str(label)).mkdir(parents=True)
        Image.fromarray(image[0]).save(root / f"{index:03d}" / str(label) / "gray.png")
    return root


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_market(tmp_path_factory.mktemp("market"))


@pytest.fixture(scope="module")
def searching(market: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort that learned identities."""
    path = tmp_path_factory.mktemp("searching") / "run"
    options = "--arch resnet8,mobilenet_v1 --batch-size 16 --image-size 0 --val-fraction 0.25"
    where = ("--data", f"market1501:{market}", "--out", str(path))
    assert train([*options.split(), *ONE_EPOCH, *where]) == 0
    return path


def predict(*arguments: object) -> int:
    return cli.run(main, [*map(str, arguments), "--device", "cpu"])


scores = partial(json_of, evaluate)
refusal = partial(refusal_of, main)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; bytes that are not UTF-8 as in `os.fsdecode`."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def objects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def right(rows: Sequence[dict[str, str]]) -> float:
    """The share of images whose first class is the folder that they are in."""
    return sum(row["class_1"] == Path(row["path"]).parent.name for row in rows) / len(rows)


@pytest.mark.parametrize("student", ["0", "1", "ensemble"])
def test_the_first_classes_are_as_often_right_as_evaluate_says(
    digits: Path, pictures: Path, student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "classes.csv"
    assert predict(digits, pictures, "--student", student, "--out", out) == 0
    assert "classes of 359 images" in capsys.readouterr().out
    found = scores(capsys, digits, "--device", "cpu")
    expected = {str(k): score["accuracy"] for k, score in enumerate(found["students"])}
    expected["ensemble"] = found["ensemble_accuracy"]
    rows = table(out)
    assert len(rows) == 359 and right(rows) == expected[student]
    same_inputs(digits, pictures)
    assert 0.2 < expected[student] < 1 and len(set(expected.values())) > 1  # or little is shown


def test_both_formats_hold_the_probabilities_of_the_likeliest_classes(
    digits: Path, pictures: Path, tmp_path: Path
) -> None:
    """In fp32, against a network from its own file and numpy."""
    run = Path(shutil.copytree(digits, tmp_path / "run"))
    reconfigure(run, amp=False)
    files = sorted(pictures.rglob("*.png"))[40:50]
    arguments = (run, *files, "--student", 1, "--checkpoint", "last", "--top", 3)
    assert predict(*arguments, "--out", tmp_path / "a.csv") == 0
    assert predict(*arguments, "--out", tmp_path / "a.jsonl") == 0
    model, facts = load_student(run / "student_1.safetensors")
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    inputs = ((pixels / 255 - facts["mean"][0]) / facts["std"][0]).astype(np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs)).double().numpy()
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares = powers / powers.sum(1, keepdims=True)
    order = np.argsort(-shares, axis=1)[:, :3]
    rows, lines = table(tmp_path / "a.csv"), objects(tmp_path / "a.jsonl")
    for file, row, line, best, share in zip(files, rows, lines, order, shares, strict=True):
        assert row["path"] == line["path"] == str(file)
        assert [row[f"class_{n}"] for n in (1, 2, 3)] == line["classes"] == [*map(str, best)]
        assert [float(row[f"probability_{n}"]) for n in (1, 2, 3)] == line["probabilities"]
        np.testing.assert_allclose(line["probabilities"], share[best], rtol=1e-4)
    assert len(rows[0]) == 7


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--image-size", "16", "--crop", "resized")])
def test_a_folders_images_are_prepared_as_in_the_run(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tree(tmp_path / "data", classes=3, images=7)
    options = (*options, "--data", f"folder:{data}", "--val-fraction", "0.2", "--batch-size", "8")
    run, out = tmp_path / "run", tmp_path / "a.csv"
    assert train([*options, "--arch", "resnet8,resnet14", *ONE_EPOCH, "--out", str(run)]) == 0
    found = scores(capsys, run, "--device", "cpu")
    for student, expected in enumerate(found["students"]):
        assert predict(run, data / "test", "--student", student, "--out", out) == 0
        rows = table(out)
        assert right(rows) == expected["accuracy"] and len(rows) == 21
        assert len(rows[0]) == 1 + 2 * 3  # there are no 5 classes
    same_inputs(run, data / "test")


def same_inputs(folder: Path, images: Path) -> None:
    """The students are given the same bits, in the same order of memory, as by `evaluate`."""
    run = Run.open(folder)
    given = GivenImages.for_run(find_images([images]), run.config, run.facts).as_set()
    test = open_data(run).test
    assert test is not None
    usual: dict[str, Any] = {"mean": run.facts.mean, "std": run.facts.std, "device": "cpu"}
    ours, theirs = (
        [batch.inputs for batch in evaluation_batches(images, batch_size=9, **usual)]
        for images in (given, test)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride()


@pytest.mark.slow
def test_features_of_a_run_are_ranked_as_the_run_is(
    searching: Path, market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scores(capsys, searching, "--batch-size", 5, "--device", "cpu")
    assert found["queries"] == 5
    expected = {str(k): student for k, student in enumerate(found["students"])}
    expected["ensemble"] = found["ensemble"]
    for student, score in expected.items():
        paths = []
        for part in ("query", "bounding_box_test"):
            paths.append(tmp_path / f"{part}.npz")
            arguments = ("--student", student, "--batch-size", 5, "--features", paths[-1])
            assert predict(searching, market / part, *arguments) == 0
        arrays = np.load(paths[1])
        assert arrays["pids"].min() == -1 and set(arrays["cams"]) == {1, 2}
        assert Path(arrays["names"][0]).parent == market / "bounding_box_test"
        ranked = scores(capsys, "--features", *paths)
        assert (ranked["mAP"], ranked["cmc"][0]) == (score["mAP"], score["rank1"])


def test_classes_and_features_of_one_pass(
    searching: Path, market: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without them in the names, identities are left out, with a line."""
    for name in ("0007_c2s1_000000_00.png", "plain.png"):
        shutil.copy(next((market / "query").iterdir()), tmp_path / name)
    out, features = tmp_path / "a.jsonl", tmp_path / "a.npz"
    files = [tmp_path / "0007_c2s1_000000_00.png", tmp_path / "plain.png"]
    assert predict(searching, *files, "--out", out, "--features", features) == 0
    assert "plain.png is not named like 0002_c1s1_000451_03.jpg" in caplog.text
    arrays = np.load(features)
    assert set(arrays) == {"features", "names"} and arrays["names"].tolist() == [*map(str, files)]
    np.testing.assert_array_equal(arrays["features"][0], arrays["features"][1])
    assert set(objects(out)[1]["classes"]) < {f"{pid:04d}" for pid in range(1, 13)}
    assert predict(searching, files[0], "--features", features) == 0
    arrays = np.load(features)
    assert arrays["pids"].tolist() == [7] and arrays["cams"].tolist() == [2]


@pytest.mark.parametrize("arch", ["resnet8", pytest.param("timm:resnet10t", marks=pytest.mark.zoo)])
def test_a_classifiers_features_are_what_its_last_layer_sees(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tree(tmp_path / "data")
    run, features = tmp_path / "run", tmp_path / "a.npz"
    where = ("--data", f"folder:{data}", "--val-fraction", "0.2", "--out", str(run))
    options = ("--arch", arch, "--method", "independent", "--cohort", "1", "--batch-size", "8")
    assert train([*options, *where, *ONE_EPOCH]) == 0
    out = tmp_path / "a.jsonl"
    arguments = ("--checkpoint", "last", "--student", 0, "--features", features, "--out", out)
    assert predict(run, data / "test", *arguments) == 0
    model = load_student(run / "student_0.safetensors")[0]
    layer = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    arrays = np.load(features)
    with torch.no_grad():
        shares = layer(torch.from_numpy(arrays["features"])).softmax(1).numpy()
    for line, share in zip(objects(out), shares, strict=True):
        np.testing.assert_allclose(line["probabilities"], np.sort(share)[::-1], rtol=1e-5)
    assert arrays["pids"].tolist() == [Path(name).parent.name for name in arrays["names"]]


def test_files_that_are_no_images_are_named_and_left_out(
    digits: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(pictures.rglob("*.png"))[:5]
    for number, path in enumerate(good):
        shutil.copy(path, tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(good[3].read_bytes()[:60])
    (tmp_path / "4.png").write_text("no image")
    out, features = tmp_path / "a.csv", tmp_path / "a.npz"
    arguments = (digits, tmp_path, "--out", out, "--features", features, "--batch-size", 2)
    assert predict(*arguments) == 1
    printed = capsys.readouterr().err
    assert f"left out: {tmp_path / '3.png'} (" in printed
    assert f"left out: {tmp_path / '4.png'} (cannot identify" in printed
    assert "2 of 5 files were left out" in printed
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    assert [row["path"] for row in table(out)] == names == np.load(features)["names"].tolist()
    bad = [tmp_path / "3.png", tmp_path / "4.png"]
    assert "none of 2 files can be decoded" in refusal(capsys, digits, *bad, "--out", out)
    assert [row["path"] for row in table(out)] == names  # as it was


def test_each_damaged_image_is_predicted_or_named(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """300 files of three formats; a change that no decoder can see gives an image like others."""
    for suffix in ("png", "jpg", "bmp"):
        content = io.BytesIO()
        Image.effect_noise((24, 20), 60).save(content, {"jpg": "jpeg"}.get(suffix, suffix))
        for number, data in enumerate(mutations(content.getvalue(), 100)):
            (tmp_path / f"{number}.{suffix}").write_bytes(data)
    assert predict(digits, tmp_path, "--out", tmp_path / "a.csv") == 1
    left_out = capsys.readouterr().err.count("left out: ")
    assert left_out > 100 and len(table(tmp_path / "a.csv")) + left_out == 300


def test_images_of_another_kind_are_made_to_fit(
    digits: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RGB for gray, and another size, which is said."""
    first = next(pictures.rglob("*.png"))
    with Image.open(first) as image:
        image.convert("RGB").save(tmp_path / "rgb.bmp")
        image.resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    out = tmp_path / "a.csv"
    assert predict(digits, first, tmp_path / "rgb.bmp", "--out", out) == 0
    assert not caplog.text
    same = [[*row.values()][1:] for row in table(out)]
    assert same[0] == same[1]
    assert predict(digits, first, tmp_path / "large.png", "--out", out) == 0
    assert "1 images were resized to 8 x 8 pixels" in caplog.text
    assert len(table(out)) == 2


ODD = (b"caf\xe9.png", b'a,"b".png', b"line\nbreak\rtab\t.png", b"=1.png", "né.png".encode())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".npz"])
def test_every_name_can_be_recovered(
    digits: Path, pictures: Path, suffix: str, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ODD:
        shutil.copy(next(pictures.rglob("*.png")), os.path.join(os.fsencode(folder), name))
    out, how = tmp_path / f"a{suffix}", {".csv": table, ".jsonl": objects}
    assert predict(digits, folder, "--out" if suffix in how else "--features", out) == 0
    names = [r["path"] for r in how[suffix](out)] if suffix in how else np.load(out)["names"]
    expected = {os.path.join(os.fsencode(folder), name) for name in ODD}
    assert {os.fsencode(name) for name in names} == expected and len(names) == len(ODD)


def test_the_standard_output_takes_csv(
    digits: Path, pictures: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert predict(digits, pictures / "000", "--out", tmp_path / "a.csv") == 0
    capfdbinary.readouterr()
    assert predict(digits, pictures / "000", "--out", "-") == 0
    assert capfdbinary.readouterr().out == (tmp_path / "a.csv").read_bytes()


def test_an_interruption_leaves_the_old_file(
    digits: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, features = tmp_path / "a.csv", tmp_path / "a.npz"
    out.write_text("old")
    calls = iter(range(2))

    def rows(*arguments: object) -> list[Any]:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(of_images, "_rows", rows)
    assert predict(digits, pictures, "--out", out, "--features", features, "--batch-size", 9) == 130
    assert [*tmp_path.iterdir()] == [out] and out.read_text() == "old"


def test_what_is_wrong_is_said_in_a_line(
    digits: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, refused = ("--out", tmp_path / "a.csv"), partial(refusal, capsys, digits)
    assert "nothing.png is no file and no folder" in refused(tmp_path / "nothing.png", *out)
    assert "there is nothing to predict" in refused(*out)
    assert "give --out FILE.csv or .jsonl" in refused(pictures)
    assert "a.txt does not end in .csv or .jsonl" in refused(pictures, "--out", "a.txt")
    assert "a.csv does not end in .npz" in refused(pictures, "--features", "a.csv")
    assert "--top is 0" in refused(pictures, *out, "--top", 0)
    assert "--batch-size is 0" in refused(pictures, *out, "--batch-size", 0)
    for student in ("2", "-1", "first", "9" * 5000, "01"):
        error = refused(pictures, *out, f"--student={student}")
        assert "has 2 students: give best, ensemble, or a number from 0 to 1" in error
    assert "is not a run folder" in refusal(capsys, tmp_path, pictures, *out)
    (tmp_path / "folder.csv").mkdir()
    assert "folder.csv is a folder" in refused(pictures, "--out", tmp_path / "folder.csv")
    (tmp_path / "file").touch()
    assert "cannot be written (" in refused(pictures, "--features", tmp_path / "file" / "a.npz")
    assert not [*tmp_path.glob("a.*"), *tmp_path.glob(".*")]


def test_a_student_that_overflowed_predicts_nothing(
    digits: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    build = of_images.run_students

    def broken(*arguments: Any) -> list[torch.nn.Module]:
        models = build(*arguments)
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.fill_(torch.nan)
        return models

    monkeypatch.setattr(of_images, "run_students", broken)
    file = next(pictures.rglob("*.png"))
    out, features = ("--out", tmp_path / "a.csv"), ("--features", tmp_path / "a.npz")
    assert f"the logits for {file} are not finite" in refusal(capsys, digits, file, *out)
    capsys.readouterr()
    assert predict(digits, file, *features) == 2  # and a line that names the student
    assert "no embeddings are finite" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    assert predict(digits, file, *features, "--student", "ensemble") == 0
    assert "student 0's embeddings are not finite: it is left out" in caplog.text
