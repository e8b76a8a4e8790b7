"""The Hugging Face Trainer on scikit-learn's handwritten digits."""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from dml_fast import FusedMutualLoss


class Cohort(nn.ModuleList):
    def forward(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = [student(pixel_values).logits for student in self]
        return FusedMutualLoss()(logits, labels).sum(), *logits


def digits() -> list[list[dict[str, Tensor]]]:
    """Images (1, 8, 8) with labels: 898 to train on, 899 to test on."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    rows = [{"pixel_values": a, "labels": b} for a, b in zip(x, torch.tensor(labels), strict=True)]
    return train_test_split(rows, test_size=0.5, random_state=0)


def make_net() -> nn.Module:
    """A new network from its configuration; a pretrained one takes from_pretrained() here."""
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    size = {"hidden_size": 64, "intermediate_size": 128}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**image, **size, **depth))


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = prediction
    return {f"student {k}": (z.argmax(-1) == labels).mean() for k, z in enumerate(logits)}


def train(epochs: int) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir="runs/huggingface",
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        max_grad_norm=0.0,  # no clipping
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    model = Cohort(make_net() for _ in range(4))
    train_set, test_set = digits()
    trainer = Trainer(
        model, arguments, train_dataset=train_set, eval_dataset=test_set, compute_metrics=metrics
    )
    trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    for name, value in train(parser.parse_args().epochs).evaluate().items():
        if name.startswith(("eval_accuracy", "eval_student")):
            print(f"{name.removeprefix('eval_')} {value:.1%}")


if __name__ == "__main__":
    main()
