"""What comparisons stand on: without the mutual term a student is trained as if it were alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_cases import picture, save

from dml_fast.runs.weights import load_student
from dml_fast.train import main

pytestmark = pytest.mark.slow

CASES = {
    "sequential": ["--executor", "sequential"],
    "threads": ["--executor", "threads"],
    "bf16": ["--executor", "sequential", "--amp", "--amp-dtype", "bf16"],
    "alternating": ["--update", "alternating"],
    "fallback": ["--executor", "sequential", "--loader", "fallback", "--image-size", "16"],
    "resident": ["--executor", "threads", "--loader", "resident", "--image-size", "16", "--amp"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i in range(60):
        save(root / "train" / f"{i % 3}" / f"{i}.png", picture(i))
    return root


def weights(out: Path, student: int) -> dict[str, bytes]:
    model, _ = load_student(out / f"student_{student}.safetensors")
    return {name: x.numpy().tobytes() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_no_weight_is_no_method_and_a_student_is_alone(
    case: str, folder: Path, tmp_path: Path
) -> None:
    data = f"folder:{folder}" if case in ("fallback", "resident") else "digits"
    common = ["--data", data, "--epochs", "2", "--batch-size", "16", "--device", "cpu"]
    common += ["--seed", "3", "--train-fraction", "0.1" if data == "digits" else "1"]
    mixed = "wrn_10_1_drop0.3,resnet8" if case == "sequential" else "resnet8,resnet14"
    both = [*common, *CASES[case], "--arch", mixed]
    alone = [option for option in both if option not in ("--update", "alternating")]
    runs = {
        "independent": [*alone, "--method", "independent"],
        "weight 0": [*both, "--method", "dml", "--kl-weight", "0"],
        "dml": [*both, "--method", "dml"],
    }
    for name, options in runs.items():
        assert main([*options, "--out", str(tmp_path / name)]) == 0
    first = mixed.partition(",")[0]
    single = [first if option == mixed else option for option in alone]
    single += ["--cohort", "1", "--method", "independent", "--out", str(tmp_path / "single")]
    if case in ("threads", "resident"):  # one student has nothing to share out
        single[single.index("threads")] = "sequential"
    assert main(single) == 0
    for k in (0, 1):
        found = weights(tmp_path / "independent", k)
        assert weights(tmp_path / "weight 0", k) == found
        assert weights(tmp_path / "dml", k) != found
    if "drop" not in first:  # students of a process draw their dropout one after the other
        assert weights(tmp_path / "single", 0) == weights(tmp_path / "independent", 0)
