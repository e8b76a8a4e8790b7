"""The resident loader against per-image references, and without any state."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from data_cases import MEAN, STD, batch_of, normalized, random_images

from dml_fast.data.loaders import evaluation_batches, train_loader
from dml_fast.data.loaders.assemble import TrainBatch
from dml_fast.data.loaders.resident import ResidentLoader
from dml_fast.data.plan import Augmentation
from dml_fast.data.sets import DataSet, ImageSet
from dml_fast.errors import UserError


def make_loader(data: ImageSet, **changes: object) -> ResidentLoader:
    channels = data.images.shape[1]
    kinds = fields(Augmentation)
    drawn = {"pad": 2, "flip": True} | {
        field.name: changes.pop(field.name) for field in kinds if field.name in changes
    }
    whole = DataSet(
        "x", tuple("abcdefg"), data, data, None, MEAN[:channels], STD[:channels], 2, True, ""
    )
    options: dict = {"batch_size": 4, "seed": 3, "device": "cpu"}
    loader = train_loader(whole, Augmentation(**drawn), **(options | changes))
    assert isinstance(loader, ResidentLoader)
    return loader


def same(a: TrainBatch, b: TrainBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_sample_at_most_once_an_epoch_and_epochs_differ() -> None:
    data = random_images(23)
    loader = make_loader(data)
    assert loader.steps_per_epoch == 5
    orders = []
    for epoch in range(3):
        ids = torch.cat([batch.ids for batch in loader.epoch(epoch)])
        assert len(ids) == 20 == len(set(ids.tolist()))
        orders.append(ids.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_targets_and_inputs_belong_to_the_ids() -> None:
    data = random_images(23)
    for batch in make_loader(data, pad=0, flip=False).epoch(1):
        ids = batch.ids.numpy()
        np.testing.assert_array_equal(batch.target.numpy(), data.labels[ids])
        for row, index in enumerate(ids):
            expected = normalized(data.images[index])
            np.testing.assert_allclose(batch.inputs[row].numpy(), expected, atol=2e-5)


def test_classes_are_balanced_where_there_are_classes() -> None:
    data = random_images(40)
    data = data.subset(np.sort(np.r_[np.arange(32), 7 * np.arange(5)]))  # more of class 0
    targets = [batch.target for batch in make_loader(data, balance=True, batch_size=10).epoch(0)]
    counts = np.bincount(torch.cat(targets).numpy())
    counts = counts[counts > 0]
    assert counts.max() - counts.min() <= 1 < np.ptp(np.bincount(data.labels))
    with pytest.raises(UserError, match="balance is on and identities are equally frequent"):
        make_loader(data, balance=True, num_instances=1)


def test_random_access_equals_iteration_in_a_fresh_loader() -> None:
    data = random_images(23)
    walked = [[*make_loader(data).epoch(epoch)] for epoch in range(3)]
    fresh = make_loader(data)
    for epoch, step in [(2, 3), (0, 1), (2, 0), (1, 4), (0, 1)]:
        assert same(batch_of(fresh, epoch, step), walked[epoch][step])
    resumed = [*fresh.epoch(1, start_step=3)]
    assert len(resumed) == 2
    assert same(resumed[0], walked[1][3]) and same(resumed[1], walked[1][4])


def test_seed_epoch_and_step_each_change_the_augmentation() -> None:
    data = ImageSet(np.repeat(random_images(1).images, 32, axis=0), np.zeros(32, dtype=np.int64))
    batches = [
        batch_of(make_loader(data, seed=seed, batch_size=16), epoch, step).inputs
        for seed, epoch, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({batch.numpy().tobytes() for batch in batches}) == 4


def test_global_generators_are_neither_read_nor_changed() -> None:
    data = random_images(23)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first = batch_of(make_loader(data), 0, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # type: ignore[index]
    torch.manual_seed(2)
    np.random.seed(2)
    assert same(first, batch_of(make_loader(data), 0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "trivial"])
def test_cuda_makes_the_same_batches_without_waiting(policy: str) -> None:
    data = random_images(23)
    on_cpu, on_gpu = (make_loader(data, device=name, policy=policy) for name in ("cpu", "cuda"))
    batch_of(on_gpu, 0, 0)  # allocations and the order of the epoch
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [*on_gpu.epoch(0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, reference in zip(batches, on_cpu.epoch(0), strict=True):
        assert torch.equal(ours.ids.cpu(), reference.ids)
        assert torch.equal(ours.target.cpu(), reference.target)
        torch.testing.assert_close(ours.inputs.cpu(), reference.inputs, rtol=0, atol=2e-6)


def test_the_batch_does_not_alias_the_images() -> None:
    data = random_images(8)
    loader = make_loader(data, pad=0, flip=False)
    first = batch_of(loader, 0, 0)
    kept = first.inputs.clone()
    first.inputs.zero_()
    assert torch.equal(batch_of(loader, 0, 0).inputs, kept)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_and_dtypes(channels_last: bool) -> None:
    data = random_images(9)
    batch = batch_of(make_loader(data, channels_last=channels_last), 0, 0)
    options = {"mean": MEAN, "std": STD, "device": "cpu", "channels_last": channels_last}
    held_out = next(evaluation_batches(data, batch_size=4, **options))
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for inputs, target, ids in (batch, held_out):
        assert inputs.shape == (4, 3, 6, 5) and inputs.dtype == torch.float32
        assert inputs.is_contiguous(memory_format=wanted)
        assert target.dtype == ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (0, "^batch_size is 0: give a whole number of at least 1$"),
        (-1, "^batch_size is -1: give a whole number of at least 1$"),
        (24, "batch size 24 .* 23 .*--batch-size"),
    ],
)
def test_a_batch_that_does_not_fit_the_data_is_refused(batch_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loader(random_images(23), batch_size=batch_size)


def test_a_step_outside_the_epoch_is_refused() -> None:
    loader = make_loader(random_images(23))
    with pytest.raises(IndexError, match="-1"):
        batch_of(loader, 0, -1)
    assert [*loader.epoch(0, 5)] == []  # where a run that ended with the epoch resumes
