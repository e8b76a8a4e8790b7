"""Batches for evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import (
    MEAN,
    STD,
    STREAMING,
    normalized,
    opened,
    pieces,
    random_images,
)
from PIL import Image

from dml_fast.data.loaders import evaluation_batches


@pytest.mark.parametrize("count", [8, 10, 3])
def test_evaluation_sees_every_image_once_in_order_and_unchanged(count: int) -> None:
    data = random_images(count)
    batches = [*evaluation_batches(data, batch_size=4, mean=MEAN, std=STD, device="cpu")]
    assert [len(batch.ids) for batch in batches] == [4] * (count // 4) + [count % 4] * (
        count % 4 > 0
    )
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(count))
    assert torch.cat([batch.target for batch in batches]).tolist() == data.labels.tolist()
    inputs = torch.cat([batch.inputs for batch in batches]).numpy()
    expected = np.stack([normalized(image) for image in data.images])
    np.testing.assert_allclose(inputs, expected, atol=2e-5)


@pytest.mark.parametrize("name", STREAMING)
def test_evaluation_is_resize_and_centre_crop(name: str, tmp_path: Path) -> None:
    pieces(tmp_path, 3, [(112, 160)], parts=("train", "val"))
    data = opened(tmp_path, name, image_size=70, resized=True)
    options = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "device": "cpu", "batch_size": 16}
    (batch,) = evaluation_batches(data.val, **options)
    for row, path in enumerate(sorted((tmp_path / "val").rglob("*.jpg"))):
        image = Image.open(path).resize((round(160 * 80 / 112), 80), Image.Resampling.BILINEAR)
        left = (image.width - 70) // 2
        expected = np.asarray(image.crop((left, 5, left + 70, 75))).astype(np.float32)
        difference = np.abs(batch.inputs[row].permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= (1.01 if name == "dali" else 1e-3)
