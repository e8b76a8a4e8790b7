"""TrivialAugment: its operations are Pillow's, bit for bit, and come before all else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from data_cases import MEAN, STD, loader_of, normalized, random_images
from PIL import Image, ImageEnhance, ImageOps

from dml_fast.data.loaders.policy import Policy
from dml_fast.data.plan import LEVELS, OPERATIONS, Augmentation, Plan
from dml_fast.data.sampling import ShuffledOrder
from dml_fast.data.sets import DataSet, ImageSet
from dml_fast.errors import UserError

Pixels = np.ndarray
# (H, W, C) of any values, of few, of one, and of many at both ends
SIZES = [(16, 12, 3), (33, 40, 1), (2, 5, 3)]


def by_pillow(pixels: Pixels, name: str, level: int) -> Pixels:
    """One operation as torchvision's TrivialAugmentWide has Pillow do it, (H, W, C)."""
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    share, affine = level / 30, Image.Transform.AFFINE
    matrices = {
        "shear_x": (1, 0.99 * share, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.99 * share, 1, 0),
        "translate_x": (1, 0, math.trunc(32 * share), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, math.trunc(32 * share)),
    }
    if name in matrices:
        image = image.transform(image.size, affine, matrices[name])
    elif name == "rotate":
        image = image.rotate(135 * share)
    elif name == "posterize":
        image = ImageOps.posterize(image, 8 - round(abs(level) / 5))
    elif name == "solarize":
        image = ImageOps.solarize(image, 255 - 8.5 * abs(level))
    elif name in ("autocontrast", "equalize"):
        image = getattr(ImageOps, name)(image)
    elif name != "identity":
        image = getattr(ImageEnhance, name.capitalize())(image).enhance(
            1 + float(np.float32(0.99 * share))
        )
    return np.asarray(image).reshape(pixels.shape)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_operation_and_strength_is_pillows(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    images = np.stack(
        [
            rng.integers(0, 256, shape),
            rng.integers(0, 256, shape) // 9 + 100,
            np.full(shape, 77),
            np.clip(rng.normal(200, 60, shape), 0, 255),
        ]
    ).astype(np.uint8)
    levels = np.arange(-LEVELS, LEVELS + 1)
    drawn = np.stack(np.meshgrid(np.arange(14), levels, indexing="ij")).reshape(2, -1)
    policy = Policy(shape[:2], torch.device("cpu"))
    for row, pixels in enumerate(images):
        rows = np.full(drawn.shape[1], row)
        found = policy(torch.from_numpy(images), rows, drawn).numpy()
        for (which, level), ours in zip(drawn.T.tolist(), found, strict=True):
            np.testing.assert_array_equal(
                ours, by_pillow(pixels, OPERATIONS[which], level), f"{OPERATIONS[which]} {level}"
            )


def test_operations_strengths_and_signs_are_equally_likely() -> None:
    order = ShuffledOrder(20_000, 20_000, 1)
    how = Augmentation(pad=3, flip=True, policy="trivial")
    plan = Plan(order, how, size=(8, 8), seed=5, views=2)(0, 0)
    assert plan.policy is not None and plan.policy.shape == (2, 2, 20_000)
    for (which, level), crops in zip(plan.policy, plan.crops, strict=True):
        counts = np.bincount(which, minlength=14) / 20_000
        np.testing.assert_allclose(counts, 1 / 14, atol=0.006)
        strengths = np.bincount(level + 30, minlength=61) / 20_000
        np.testing.assert_allclose(strengths[[*range(30), *range(31, 61)]], 1 / 62, atol=0.004)
        assert strengths[30] == pytest.approx(1 / 31, abs=0.006)
        together = np.corrcoef(np.stack([which, level, abs(level), *crops]))
        assert (abs(together - np.diag(np.diag(together)))[[0, 1]] < 0.03).all()
    assert (plan.policy[0] != plan.policy[1]).any()


def data_of(images: ImageSet) -> DataSet:
    count = images.images.shape[1]
    return DataSet(
        "x", tuple("abcdefg"), images, images, None, MEAN[:count], STD[:count], 2, True, ""
    )


def test_images_of_other_channels_are_refused_and_of_few_pixels_spoken_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    how = Augmentation(policy="trivial")
    with pytest.raises(UserError, match="policy is trivial and images have 2 channels, where"):
        loader_of(data_of(random_images(20, 2)), how)
    caplog.set_level("INFO")
    loader_of(data_of(random_images(20)), how)
    assert "policy: moves are of up to 32 pixels, which leaves nothing" in caplog.text
    with pytest.raises(UserError, match="policy is 'random'"):
        Augmentation(policy="random")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("jitter", [0.0, 1e-9])  # with which batches are made by other code
def test_a_batch_is_changed_and_then_shifted(channels: int, jitter: float) -> None:
    images = random_images(20, channels, 9, 12)
    how = Augmentation(pad=2, flip=True, policy="trivial", jitter=jitter)
    loader = loader_of(data_of(images), how, batch_size=20, seed=3, views=2)
    batch = next(loader.epoch(1))
    plan = Plan(ShuffledOrder(20, 20, 3), how, size=(9, 12), seed=3, views=2)(1, 0)
    assert plan.policy is not None
    for view, inputs in enumerate(batch.inputs):
        for k, index in enumerate(batch.ids.tolist()):
            pixels = images.images[index].transpose(1, 2, 0)
            which, level = plan.policy[view, :, k].tolist()
            changed = normalized(by_pillow(pixels, OPERATIONS[which], level).transpose(2, 0, 1))
            top, left, mirrored = plan.crops[view, :, k].tolist()
            expected = np.pad(changed, ((0, 0), (2, 2), (2, 2)))
            expected = expected[:, top : top + 9, left : left + 12]
            expected = expected[:, :, ::-1] if mirrored else expected
            np.testing.assert_allclose(inputs[k].numpy(), expected, atol=2e-5)
