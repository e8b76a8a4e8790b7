"""A plain PyTorch loop on scikit-learn's handwritten digits."""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dml_fast import FusedMutualLoss


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels (N,): 898 to train on, 899 to test on."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    parts = train_test_split(x, torch.tensor(labels), test_size=0.5, random_state=0)
    return parts[0], parts[2], parts[1], parts[3]


def make_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def train(epochs: int) -> nn.Module:
    x_train, y_train, _, _ = digits()
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(x_train, y_train), 64, shuffle=True, generator=order)
    torch.manual_seed(0)
    model = nn.ModuleList(make_net() for _ in range(4))
    criterion = FusedMutualLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in loader:
            # Peers are constants in a student's loss: the sum gives each its own gradient, no more.
            loss = criterion([student(x) for student in model], y).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    model = train(parser.parse_args().epochs).eval()
    _, _, x, y = digits()
    with torch.no_grad():
        for k, student in enumerate(model):
            print(f"student {k}: accuracy {(student(x).argmax(1) == y).float().mean():.1%}")


if __name__ == "__main__":
    main()
