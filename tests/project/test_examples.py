"""Every pair of examples runs, and differs by the mutual loss, in few lines and in nothing else."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dml_fast
from dml_fast import FusedMutualLoss

pytestmark = pytest.mark.compat

EXAMPLES = Path(__file__).parents[2] / "examples"
PAIRS = ("plain", "lightning", "huggingface")
PACKAGES = {"lightning": "lightning", "huggingface": "transformers"}
EPOCHS = 5  # a transformer drifts: in 12, rounding has grown to a hundredth of a probability
STUDENTS = 4


def lines(name: str) -> list[str]:
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()


def changes(before: list[str], after: list[str]) -> int:
    """Lines deleted, inserted or replaced: comments and blank lines count too."""
    blocks = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in blocks if tag != "equal")


@pytest.mark.parametrize("pair", PAIRS)
def test_at_most_ten_lines_change(pair: str) -> None:
    before, after = lines(f"{pair}_before"), lines(f"{pair}_after")
    assert not any("dml_fast" in line for line in before)
    assert any("FusedMutualLoss()" in line for line in after)
    assert changes(before, after) <= 10


def test_every_example_is_a_pair_that_the_readme_names() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {f"{pair}_{when}.py" for pair in PAIRS for when in ("before", "after")}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert not [name for name in names if name not in readme]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Iterator[str]:
    """One whose library is installed; no model hub is asked for anything."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setenv("HF_HUB_OFFLINE", "1")
        if name in PACKAGES:
            reason = f"{PACKAGES[name]} not installed: pip install 'dml_fast[examples]'"
            pytest.importorskip(PACKAGES[name], reason=reason)
        yield name


def example(pair: str, when: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{pair}_{when}.py"), run_name="example")


def networks(trained: Any) -> list[nn.Module]:
    """The students (or the only network) in what an example's train() returns."""
    if isinstance(trained, tuple):  # Lightning's model and its metrics
        model = getattr(trained[0], "nets", None) or trained[0].net
    else:  # a module, or Hugging Face's Trainer
        model = getattr(trained, "model", trained)
    return list(model) if isinstance(model, nn.ModuleList) else [model]


@torch.no_grad()
def log_probabilities(trained: Any) -> Tensor:
    """(K, N, C) on the CPU, for all digits."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    outputs = [net.cpu().eval()(images) for net in networks(trained)]
    logits = [output if isinstance(output, Tensor) else output.logits for output in outputs]
    return torch.stack(logits).log_softmax(-1)


def disagreement(log_p: Tensor) -> float:
    """The mean KL of two students."""
    kl = (log_p[:, None].exp() * (log_p[:, None] - log_p[None])).sum(-1).mean(-1)
    return float(kl.sum() / (len(log_p) * (len(log_p) - 1)))


@pytest.mark.slow
def test_nothing_changes_but_the_students_teaching_each_other(
    pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its divergence the loss leaves students alone: the first is the network before."""
    monkeypatch.chdir(tmp_path)  # the Trainer makes a folder
    alone = log_probabilities(example(pair, "before")["train"](EPOCHS))
    mutual = log_probabilities(example(pair, "after")["train"](EPOCHS))
    monkeypatch.setattr(dml_fast, "FusedMutualLoss", partial(FusedMutualLoss, kl_weight=0.0))
    independent = log_probabilities(example(pair, "after")["train"](EPOCHS))

    assert len(alone) == 1 and len(mutual) == len(independent) == STUDENTS
    torch.testing.assert_close(independent[0].exp(), alone[0].exp(), rtol=0, atol=1e-2)
    assert (mutual[0].exp() - alone[0].exp()).abs().max() > 0.1
    assert disagreement(mutual) < 0.75 * disagreement(independent)


@pytest.mark.parametrize(("when", "count"), [("before", 1), ("after", STUDENTS)])
def test_the_command_prints_what_was_learnt(
    pair: str,
    when: str,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = EXAMPLES / f"{pair}_{when}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--epochs", str(EPOCHS)])
    runpy.run_path(str(path), run_name="__main__")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("%")]
    accuracies = [float(line.split()[-1].rstrip("%")) for line in printed]
    assert len(accuracies) == count
    assert all(60 < accuracy <= 100 for accuracy in accuracies)  # chance is 10 %
