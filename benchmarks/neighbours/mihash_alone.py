"""One network that learns codes of digits by `MIHashLoss` alone, with and without normalisation.

No option takes the batch normalisation before the sign away, so this trains with the library's
classes: ResNet-8, 32 bits, Adam at 0.003, 30 epochs of batches of 64, no augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.neighbours import harness
from benchmarks.neighbours.harness import Job, Lines
from dml_fast.data import ImageSet, open_dataset
from dml_fast.loss.mihash import mihash_loss
from dml_fast.models.hashing import HashNet
from dml_fast.models.heads import Head, new_network
from dml_fast.ranking.codes import rank_hamming
from dml_fast.rng import seed_everything

BITS, EPOCHS, BATCH, RATE = 32, 30, 64, 0.003
SETTINGS = {
    "16 bins": (16, True),
    "32 bins": (32, True),
    "8 bins": (8, True),
    "16 bins, no batch normalisation": (16, False),
    "32 bins, no batch normalisation": (32, False),
}


def jobs(seed: int) -> Iterator[Job]:
    """Yield the jobs of a seed."""
    for setting, (bins, normalised) in SETTINGS.items():
        options = (f"{bins} bins", f"{EPOCHS} epochs", f"normalised {normalised}")
        run = partial(measure, bins, normalised, seed)
        yield Job(f"MIHash alone, {setting}", seed, options, run)


def measure(bins: int, normalised: bool, seed: int, folder: Path) -> dict[str, float]:
    """Train on the training rows; the test rows search these and the validation rows."""
    seed_everything(seed)
    data = open_dataset("digits")
    parts = [_tensors(part) for part in (data.train, data.val, data.test)]
    mean, deviation = parts[0][0].mean(), parts[0][0].std()
    (x, y), val, test = [((images - mean) / deviation, labels) for images, labels in parts]
    network = new_network("resnet8", 10, data.inputs[0], head=Head("hash", BITS))
    assert isinstance(network, HashNet)
    if not normalised:  # the linear layer has no bias, since the normalisation adds one
        network.project, network.norm = nn.Linear(network.num_features, BITS), nn.Identity()
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    loss = torch.zeros(())
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH)[:-1]:
            loss = mihash_loss(network.features_and_logits(x[rows])[0], y[rows], bins=bins)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.inference_mode():
        queries = network.codes(test[0]).numpy()
        gallery = network.codes(torch.cat([x, val[0]])).numpy()
    labels = (test[1].numpy(), torch.cat([y, val[1]]).numpy())
    ranked = rank_hamming(queries, gallery, *labels, protocol="all", ties="expected")
    return {"mAP": 100 * ranked.mAP, "information": -loss.item()}


def _tensors(part: object) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 8, 8) from 0 to 1, and labels."""
    assert isinstance(part, ImageSet)
    images = torch.from_numpy(np.asarray(part.images, np.float32) / 255)
    return images, torch.from_numpy(part.labels)


def table_of(lines: Lines) -> str:
    """Return the table: each setting against 16 bins, and the seeds one by one."""
    settings = [f"MIHash alone, {setting}" for setting in SETTINGS]
    return harness.comparison(lines, settings, ("mAP",), lambda _: settings[0])
