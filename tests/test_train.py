"""``python -m dml_fast.train`` as its users meet it: what it writes, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from blank_curves import drawn
from command_cases import QUICK, train, tree
from PIL import Image
from run_cases import facts_of_three_classes

from dml_fast.config import TrainConfig
from dml_fast.config.files import from_mapping, load_toml
from dml_fast.errors import UserError
from dml_fast.runs.folder import Run
from dml_fast.train import arguments

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    options = ["--arch", "resnet8,mobilenet_v1", "--epochs", "2", "--train-fraction", "0.3"]
    with drawn():
        assert train(*options, "--amp", "--out", str(folder)) == 0
    return folder


def test_a_run_writes_what_the_readme_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "curves.png",
        "student_0.safetensors", "student_1.safetensors",
    }  # fmt: skip
    with Image.open(finished / "curves.png") as curves:
        curves.load()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert line.keys() >= {"epoch", "step", "seconds", "images_per_s", "ensemble_val_acc"}
        assert [s["arch"] for s in line["students"]] == ["resnet8", "mobilenet_v1"]
        for student in line["students"]:
            assert student["loss"] == pytest.approx(student["ce"] + student["kl"])
            assert 0 <= student["val_acc"] <= 1
            assert 0 <= student["train_acc"] <= 1
    description = json.loads((finished / "config.json").read_text())
    assert from_mapping(description["config"], "").amp
    assert description["data"]["num_classes"] == 10


def test_progress_goes_to_stderr_and_the_table_to_stdout(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(*QUICK, "--out", str(tmp_path / "run")) == 0
    out, err = capfd.readouterr()
    assert re.search(r"epoch 1/1  loss \d.*val \d.*ensemble \d.*images/s", err)
    assert "ensemble" in out
    assert "images/s" in out
    assert str(tmp_path / "run") in out.replace("\n", "")


@pytest.mark.parametrize("method", ["dml_e", "independent", "distill"])
def test_every_method_runs(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "run"
    assert train(*QUICK, "--cohort", "2", "--method", method, "--out", str(folder)) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [[s["loss"] is not None for s in line["students"]] for line in lines]
    expected = [[True, False], [False, True]] if method == "distill" else [[True, True]]
    assert trained == expected


@pytest.mark.slow
def test_a_cohort_of_one_may_train_independently(tmp_path: Path) -> None:
    options = ["--cohort", "1", "--method", "independent", "--out", str(tmp_path / "run")]
    assert train(*QUICK, *options) == 0


PROCESSES = [
    # the run's own options, processes and --mesh now, and the mesh, shares and fsdp that follow
    ({"mesh": "1x2"}, 2, "", ("1x2", "", False)),
    ({"mesh": "1x2", "fsdp": True}, 2, "", ("1x2", "", True)),
    ({"mesh": "1x2", "fsdp": True}, 2, "1x2", ("1x2", "", True)),
    ({"mesh": "1x2", "fsdp": True}, 4, "", ("", "", True)),
    ({"mesh": "1x2", "fsdp": True}, 4, "1x4", ("1x4", "", True)),
    ({"mesh": "1x2", "fsdp": True}, 2, "2x1", ("2x1", "", False)),
    ({"mesh": "1x2", "fsdp": True}, 1, "", ("", "", False)),
    ({"mesh": "2x1", "shares": "1,1"}, 2, "", ("2x1", "1,1", False)),
    ({"mesh": "2x1", "shares": "1,1"}, 2, "1x2", ("1x2", "", False)),
    ({"shares": "1,1"}, 2, "", ("", "1,1", False)),
    ({"shares": "1,1"}, 1, "", ("", "", False)),
    ({}, 4, "", ("", "", False)),
]


@pytest.mark.parametrize(("own", "processes", "mesh", "expected"), PROCESSES)
def test_a_run_keeps_its_mesh_where_it_fits(
    own: dict[str, object],
    processes: int,
    mesh: str,
    expected: tuple[str, str, bool],
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    students = [{"arch": "resnet32", "parameters": 1}] * 2
    run.describe(replace(TrainConfig(), **own), facts_of_three_classes(), students)
    options = ["--mesh", mesh] if mesh else []
    args = arguments(["--resume", str(tmp_path), *options], processes)
    assert (args.mesh, args.shares, args.fsdp) == expected


BAD = [
    ("--cohort 1", "--cohort is 1 but --method dml needs at least 2 students: give --cohort 2"),
    ("--cohort -2", "--cohort is -2"),
    ("--cohort 3 --arch resnet8,resnet20", "--cohort is 3 but --arch names 2"),
    ("--arch resent32", "unknown architecture 'resent32': the nearest are resnet32"),
    ("--arch resnet8,", "unknown architecture ''"),
    ("--data folder:/no/such", "folder:/no/such does not exist: put images in"),
    ("--data difits", "digits"),
    ("--data cifar10:/no/such", "--download"),
    ("--epochs 0", "--epochs is 0: give a whole number of at least 1"),
    ("--lr -1", "--lr is -1.0: give a finite number"),
    ("--lr nan", "--lr is nan: give a finite number"),
    ("--temperature 0", "--temperature is 0.0: give a number above 0"),
    ("--label-noise 1", "--label-noise is 1.0"),
    ("--train-fraction 0", "--train-fraction is 0.0"),
    ("--val-fraction 1", "--val-fraction is 1.0"),
    ("--save-every often", "--save-every is 'often': give steps (200) or seconds (60s)"),
    ("--seed -1", "--seed is -1"),
    ("--small-loss 0.2 --method independent", "--method independent, whose students"),
    ("--small-loss 0.2 --method dml_e", "in the loss that is shown: give dml"),
    ("--small-loss 0.2 --update alternating", "give simultaneous"),
    ("--small-loss 0.2 --mixup 0.1", "--mixup 0.1 blends labels"),
    ("--small-loss 0.2 --cutmix 1", "--cutmix 1.0 blends labels"),
    ("--small-loss 1", "--small-loss is 1.0: give a number from 0 to below 1"),
    ("--prior balance --data market1501:nowhere", "--prior means nothing with --data market1501"),
    ("--update alternating --method independent", "--update alternating means nothing"),
    ("--views levels", "--views levels means nothing with --data digits: give text:FILE.tsv"),
    ("--data text:t.tsv --views per-student", "text:t.tsv, which is not augmented: leave it out"),
    ("--data text:t.tsv --random-erasing 0.5", "--random-erasing means nothing with --data text:"),
    ("--data vectors:v.npz --dim 9", "--dim means nothing with --data vectors:v.npz, but only"),
    ("--classes a,b", "--classes means nothing with --data digits, but only with text:FILE.tsv"),
    ("--data text:t.tsv --classes a,b,a", "--classes is 'a,b,a': give different names, as in a,b"),
    ("--labels l.tsv --data market1501:nowhere", "--labels means nothing with --data market1501:"),
    ("--head linear --data market1501:nowhere", "--head linear gives no embeddings, by which"),
    ("--head hash --data pairs:p.npz", "--head hash means nothing with --data pairs:p.npz"),
    ("--head bnneck --data text:t.tsv", "--head bnneck means nothing with --data text:t.tsv"),
    ("--bits 16", "--bits means nothing without --head hash (--head is auto): leave it out"),
    ("--head hash --bits 65473", "--bits is 65473: give a whole number from 1 to 65472"),
    ("--head hash --mihash-bins 33", "--mihash-bins is 33 and --bits 32"),
    ("--head hash --mihash-scale 0", "--mihash-scale is 0.0: give a number above 0"),
    ("--head hash --mixup 0.2", "compares rows by their classes, and --mixup 0.2 blends them"),
    ("--head hash --small-loss 0.2", "--mihash-weight 1.0 would still compare the rows"),
    ("--patch 16", "--patch means nothing with --data digits, but only with pairs:FILE.npz"),
    ("--data pairs:p.npz --labels l.tsv", "--labels means nothing with --data pairs:p.npz"),
    ("--data pairs:p.npz --mixup 1", "--mixup means nothing with --data pairs:p.npz, which has"),
    ("--data pairs:p.npz --no-augment", "--augment means nothing with --data pairs:p.npz"),
    ("--data pairs:p.npz --views per-student", "--views per-student means nothing with --data"),
    ("--data pairs:p.npz --dither -1", "--dither is -1.0: give a finite number, 0 or more"),
    ("--epoch-steps -1", "--epoch-steps is -1: give a whole number, 0 or more"),
    ("--labels-per-class 9 --unlabelled-share 1", "is 1.0: give auto, or a number from 0 to below"),
    ("--kl-warmup -2", "--kl-warmup is -2.0: give auto, or a finite number, 0 or more"),
    ("--batch-size 100000", "100000"),
    ("--device cuda:77", "error: device is 'cuda:77'"),
    ("--device teapot", "error: device is 'teapot': give auto, cpu"),
    ("--amp --amp-dtype fp16 --device cpu", "error: amp_dtype is fp16"),
    (
        "--config /no/such.toml",
        "--config /no/such.toml cannot be read (No such file or directory): give",
    ),
    ("--resume /no/such", "/no/such is not a run folder"),
    ("--cohrt 4", "--cohrt is no option of python -m dml_fast.train: did you mean --cohort?"),
    ("--no-such", "--no-such is no option of python -m dml_fast.train: see python -m"),
    ("--lr 1 2", "'2' belongs to no option: leave it out, or put quotes around"),
    ("--method=dlm", "--method is 'dlm', which is none of dml, dml_e, independent, distill: did"),
    ("--epochs=many", "--epochs is 'many': give a whole number"),
    ("--kl-weight 1,5", "--kl-weight is '1,5': give a number"),
    ("--kl-weight", "--kl-weight has no value: give one"),
    ("--ema abc", "--ema is 'abc': give off or a number"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_input_gets_one_sentence(
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*options.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(Path("runs").glob("*"))  # nothing is left behind


def test_a_class_without_images_a_corrupt_image_and_skipping_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tree(tmp_path / "my images")
    options = [*QUICK[:4], "--batch-size", "4", "--data", f"folder:{folder}"]
    broken = folder / "train" / "class 1" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert train(*options, "--out", str(tmp_path / "a")) == 2
    err = capfd.readouterr().err
    assert str(broken) in err
    assert "--skip-corrupt" in err
    assert train(*options, "--skip-corrupt", "--out", str(tmp_path / "b")) == 0
    assert "skipped 1 corrupt files: train/class 1/3.png" in capfd.readouterr().err
    (folder / "train" / "class 2").mkdir()
    assert train(*options, "--skip-corrupt", "--out", str(tmp_path / "c")) == 2
    assert str(folder / "train" / "class 2") in capfd.readouterr().err
    assert not (tmp_path / "a").exists()


def test_resume_refuses_another_architecture_and_other_data(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    resume = ["--resume", str(finished)]
    assert train(*resume, "--arch", "resnet8") == 2
    assert "--arch is resnet8 and the run" in capfd.readouterr().err
    assert train(*resume, "--batch-size", "9") == 2
    assert "--batch-size is 9" in capfd.readouterr().err
    folder = tree(tmp_path / "data")
    assert train(*resume, "--data", f"folder:{folder}", "--batch-size", "64") == 2
    capfd.readouterr()
    assert train("--config", "x.toml", *resume) == 2
    assert "exclude each other" in capfd.readouterr().err


def test_two_processes_do_not_share_a_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with Run(folder).lock():
        assert train(*QUICK, "--out", str(folder)) == 2
        assert "another process is training in" in capfd.readouterr().err
    assert train(*QUICK, "--out", str(folder)) == 0


def test_a_batch_that_a_network_cannot_train_on_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["--arch", "mobilenet_v1", "--cohort", "2", "--batch-size", "1"]
    assert train(*options, "--out", str(folder)) == 2
    assert "mobilenet_v1 cannot train on batches of 1 images" in capfd.readouterr().err
    assert not folder.exists()


def test_a_hand_edited_config_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert train(*QUICK, "--out", str(folder)) == 0
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"epochs": 1', '"epochs": 2'))
    assert train("--resume", str(folder)) == 2
    assert "(it has --epochs 1 and not 2): restore the one that was" in capfd.readouterr().err


def test_a_student_that_stays_bad_stops_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_model.py").write_text(
        "import torch\n"
        "class Broken(torch.nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(64, num_classes)\n"
        "        self.steps = 0\n"
        "    def forward(self, x):\n"
        "        self.steps += self.training\n"
        "        return self.layer(x.flatten(1)) / (self.steps < 22)\n"
        "def build(*, num_classes, in_channels, image_size):\n"
        "    return Broken(num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    options = ["--arch", "resnet8,broken_model:build", "--epochs", "9", "--out", str(folder)]
    assert train(*options, "--max-skipped", "5", "--log-every", "1") == 1
    err = capfd.readouterr().err
    assert "error: student 1 (broken_model:build) had non-finite gradients in its last 5" in err
    assert "Traceback" not in err
    assert (folder / "last.pt").exists()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["epoch"] == 1


def test_a_config_file_and_flags_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('kl-weight = 2\narch = "resnet8"\namp = true\nsave_every = "30s"\n')
    by_file = arguments(["--config", str(file)])
    by_flags = arguments(["--kl-weight", "2", "--arch", "resnet8", "--amp", "--save-every", "30s"])
    assert replace(by_file, config="") == by_flags
    assert arguments(["--config", str(file), "--kl-weight", "3", "--no-amp"]).kl_weight == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_wieght = 1", "unknown key 'kl_wieght'; did you mean kl_weight"),
        ("epochs = 1.5", "epochs is 1.5: give a value of type int"),
        ('method = "dlm"', "method is 'dlm': give one of dml, dml_e, independent, distill"),
        ("amp = 1", "amp is 1: give a value of type bool"),
        ("lr = nan", "lr is nan: give a number, or one per student, as in 0.1,0.05"),
        ("warmup = nan", "warmup is nan: give a value of type float"),
        ("epochs = 0x" + "f" * 5_000, "epochs is a number of thousands of digits: give a value of"),
        ("epochs = " + "9" * 5_000, "is damaged (ValueError: "),
        ("epochs = " + "[" * 5_000, "is damaged (RecursionError: "),
        ("epochs = 1\nepochs = 2", "is damaged (TOMLDecodeError: Cannot overwrite a value"),
        ("log-every = 1\nlog_every = 2", "log_every is there twice: leave one out"),
        ("seed = []", "seed is a list of length 0: give a value of type int"),
        ("epochs = ", "is damaged (TOMLDecodeError: Invalid value (at end of document))"),
        ('resume = "runs/x"', "unknown key 'resume'"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        arguments(["--config", str(file)])


def test_help_and_argument_errors_do_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from dml_fast import cli\n"
        "from dml_fast.train import main\n"
        "try:\n"
        "    code = cli.run(main, sys.argv[1:])\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    for options, expected in (["--help"], 0), (["--arch", "nope"], 2), (["--cohort", "1"], 2):
        done = subprocess.run(
            [sys.executable, "-c", code, *options], capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stderr
    assert "AssertionError" not in done.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_configurations_are_read(path: Path) -> None:
    config = load_toml(str(path))
    assert config != TrainConfig()
    assert min(config.peak_lrs) > 0 and config.architectures
