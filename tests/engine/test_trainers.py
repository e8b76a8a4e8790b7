"""Loops of Lightning and of Hugging Face, with the loss alone and with the engine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast import FusedMutualLoss
from dml_fast.engine import Cohort, Engine

pytestmark = pytest.mark.compat

STEPS = 25
REASON = "not installed: pip install 'dml_fast[examples]'"


def nets() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)) for _ in range(2)]


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 6, generator=g), torch.randint(5, (16,), generator=g))
        for _ in range(STEPS)
    ]


def by_hand(outputs: list[Tensor], target: Tensor) -> list[Tensor]:
    """Zhang et al. 2018, equations 5 and 6, for two students."""
    a, b = outputs
    return [
        F.cross_entropy(z, target)
        + F.kl_div(z.log_softmax(1), peer.detach().softmax(1), reduction="batchmean")
        for z, peer in ((a, b), (b, a))
    ]


def assert_close(mine: nn.Module, theirs: nn.Module) -> None:
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("how", ["loss", "engine"])
def test_lightning_with_manual_optimization(how: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason=REASON)

    class Students(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, how: str) -> None:
            super().__init__()
            self.students, self.how = nn.ModuleList(nets()), how
            self.automatic_optimization = False
            self.engine: Engine | None = None

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.Adam(net.parameters(), lr=0.01) for net in self.students]

        def on_train_start(self) -> None:
            if self.how == "engine":
                own = [one.optimizer for one in self.optimizers()]
                self.engine = Engine(Cohort([*self.students], optimizers=own))

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            x, y = batch
            if self.engine is not None:
                self.engine.step(x, y)
                return
            outputs = [net(x) for net in self.students]
            losses = (
                by_hand(outputs, y)
                if self.how == "by hand"
                else FusedMutualLoss()(outputs, y, separate=True)
            )
            for loss, optimizer in zip(losses, self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    found = {}
    for one in (how, "by hand"):
        module = Students(one)
        trainer = lightning.Trainer(
            max_steps=-1,
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
        found[one] = module
    assert_close(found[how].students, found["by hand"].students)
    assert not torch.equal(found[how].students[0][0].weight, nets()[0][0].weight)


class Both(nn.Module):
    """Two students as one model, as Hugging Face's Trainer wants it."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.students, self.fused = nn.ModuleList(nets()), fused

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = [net(x) for net in self.students]
        if self.fused:
            losses = FusedMutualLoss()(outputs, labels)
        else:
            losses = torch.stack(by_hand(outputs, labels))
        return {"loss": losses.sum(), "logits": torch.stack(outputs).mean(0)}


def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=REASON)
    pytest.importorskip("accelerate", reason=REASON)
    rows = [{"x": x, "labels": y} for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]
    found = []
    for fused in (True, False):
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=16,
            max_steps=STEPS,
            learning_rate=0.01,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        model = Both(fused)
        transformers.Trainer(model=model, args=options, train_dataset=rows).train()
        found.append(model)
    assert_close(*found)
    assert not torch.equal(found[0].students[0][0].weight, nets()[0][0].weight)  # type: ignore[union-attr,index]


def test_hugging_face_models_are_students() -> None:
    transformers = pytest.importorskip("transformers", reason=REASON)
    torch.manual_seed(0)

    def make(width: int) -> Any:
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=12,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForSequenceClassification(config)

    models = [make(16), make(24)]
    theirs = copy.deepcopy(models)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01) for one in theirs]
    engine = Engine(
        Cohort(models, optimizers=lambda one: torch.optim.AdamW(one.parameters(), lr=0.01))
    )
    ids, y = torch.randint(50, (8, 12)), torch.randint(3, (8,))
    inputs = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones(8, 12)})
    for _ in range(5):
        engine.step(inputs, y)
        for loss, optimizer in zip(
            by_hand([one(**inputs).logits for one in theirs], y), optimizers, strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for one, other in zip(models, theirs, strict=True):
        assert_close(one, other)
