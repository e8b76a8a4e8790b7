"""A run that continues elsewhere says what changes, and is silent where nothing does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_cases import QUICK, train
from engine_cases import networks, student

from dml_fast.distributed.mesh import Mesh
from dml_fast.engine import Cohort
from dml_fast.errors import UserError
from dml_fast.training.elsewhere import changed_mesh, changed_surroundings, surroundings

PATH = Path("run/last.pt")


def here() -> dict[str, str]:
    return surroundings(Cohort([student(networks(1)[0])]), "sequential")


def test_what_decides_the_last_bits_is_known() -> None:
    found = here()
    assert found["precision"] == "fp32"
    assert found["threads"] == str(torch.get_num_threads())
    assert found["torch"] == torch.__version__
    assert found["device"].startswith("CPU with ")
    assert not changed_surroundings({"surroundings": json.dumps(found)}, found, PATH)
    assert not changed_surroundings({}, found, PATH)  # of a version that did not save it


@pytest.mark.parametrize(
    "name", ["device", "precision", "executor", "fsdp", "threads", "dml_fast", "torch"]
)
def test_each_change_is_named(name: str) -> None:
    found = here()
    state = {"surroundings": json.dumps({**found, name: "another"})}
    said = changed_surroundings(state, found, PATH)
    assert f"continues with {name} {found[name]} in place of another: not bit for bit" in said


def test_a_mesh_of_other_rows_changes_draws_alone() -> None:
    assert not changed_mesh("2x1", Mesh(2, 1), 64, PATH)
    said = changed_mesh("4x2", Mesh(2, 2), 64, PATH)
    assert "on a mesh of 4x2 and continues on 2x2: networks that draw random numbers" in said
    assert said.endswith("all else is as it was")


def test_a_mesh_of_other_columns_changes_what_batchnorm_sees() -> None:
    said = changed_mesh("1x2", Mesh(2, 1), 64, PATH)
    assert "(BatchNorm, triplets, mixup) sees 64 images in place of 32, gradients are" in said
    assert "all else" not in said


@pytest.mark.parametrize("text", ["", "2", "axb", "1x0", "2x1x1", "[1]"])
def test_a_damaged_mesh_or_surroundings(text: str) -> None:
    with pytest.raises(UserError, match=r"run/last\.pt is damaged"):
        changed_mesh(text, Mesh(1, 1), 64, PATH)
    with pytest.raises(UserError, match=r"run/last\.pt is damaged"):
        changed_surroundings({"surroundings": text}, here(), PATH)


def test_a_resumed_run_says_what_is_not_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(*QUICK, "--executor", "sequential", "--out", str(folder)) == 0
    capfd.readouterr()
    assert train("--resume", str(folder)) == 0
    assert "in place of" not in capfd.readouterr().err
    for path in {path.resolve() for path in folder.glob("*.pt")}:
        state = torch.load(path, weights_only=True)
        state["surroundings"] = json.dumps(json.loads(state["surroundings"]) | {"torch": "1.0"})
        path.unlink()
        torch.save(state, path)
    assert train("--resume", str(folder)) == 0
    err = " ".join(capfd.readouterr().err.split())
    assert f"the run continues with torch {torch.__version__} in place of 1.0: not bit" in err
