"""Lightning on scikit-learn's handwritten digits."""

from __future__ import annotations

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def digits() -> tuple[DataLoader, DataLoader]:
    """Images (N, 1, 8, 8) and labels (N,): 898 to train on, 899 to test on."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    parts = train_test_split(x, torch.tensor(labels), test_size=0.5, random_state=0)
    order = torch.Generator().manual_seed(0)
    train = DataLoader(TensorDataset(parts[0], parts[2]), 64, shuffle=True, generator=order)
    return train, DataLoader(TensorDataset(parts[1], parts[3]), 128)


def make_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self.net(x), y)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def train(epochs: int) -> tuple[Classifier, dict[str, float]]:
    torch.manual_seed(0)
    model = Classifier()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, enable_checkpointing=False, **quiet)
    train_loader, test_loader = digits()
    trainer.fit(model, train_loader)
    return model, trainer.test(model, test_loader, verbose=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    _, metrics = train(parser.parse_args().epochs)
    for name, value in metrics.items():
        print(f"{name} {value:.1%}")


if __name__ == "__main__":
    main()
