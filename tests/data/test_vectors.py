"""Batches of vectors: each row once, the same whatever the start and the number of ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from data_cases import batch_of, tensors

from dml_fast.data import DataSet, VectorSet
from dml_fast.data.loaders import evaluation_batches, train_loader
from dml_fast.data.loaders.assemble import Loader
from dml_fast.data.plan import Augmentation
from dml_fast.errors import UserError

WIDTHS = (3, 5)


def rows(count: int = 23, widths: tuple[int, ...] = WIDTHS, unlabelled: int = 0) -> VectorSet:
    rng = np.random.default_rng(count)
    views = tuple(rng.normal(size=(count, width)).astype(np.float32) for width in widths)
    labels = np.arange(count, dtype=np.int64) % 3
    labels[: 3 * unlabelled : 3] = -1
    return VectorSet(views, labels, names=tuple(f"row {i}" for i in range(count)))


def loader_of(part: VectorSet, **options: object) -> Loader:
    data = DataSet("x", ("a", "b", "c"), part, part, None, (), (), 0, False, "")
    usual: dict = {"batch_size": 4, "seed": 3, "device": "cpu", "students": 4}
    return train_loader(data, Augmentation(), **(usual | options))


def test_inputs_and_targets_belong_to_the_ids_and_student_k_reads_view_k_mod_v() -> None:
    part = rows(unlabelled=6)
    for batch in loader_of(part, unlabelled_share=0.25).epoch(1):
        ids = batch.ids.numpy()
        assert isinstance(batch.inputs, tuple) and len(batch.inputs) == 4
        for k, inputs in enumerate(batch.inputs):
            np.testing.assert_array_equal(inputs.numpy(), part.views[k % 2][ids])
        wanted = [-100 if label < 0 else label for label in part.labels[ids]]
        assert batch.target.tolist() == wanted and wanted.count(-100) == 1


def test_one_view_is_one_tensor() -> None:
    part = rows(widths=(3,))
    batch = batch_of(loader_of(part), 0, 0)
    assert isinstance(batch.inputs, torch.Tensor) and batch.inputs.shape == (4, 3)
    held_out = next(evaluation_batches(part, batch_size=9, mean=(), std=(), device="cpu"))
    np.testing.assert_array_equal(held_out.inputs, part.views[0][:9])


def test_each_row_at_most_once_an_epoch_and_epochs_differ() -> None:
    loader = loader_of(rows())
    assert loader.steps_per_epoch == 5
    epochs = [torch.cat([b.ids for b in loader.epoch(e)]).tolist() for e in range(3)]
    assert all(len(set(ids)) == 20 for ids in epochs)
    assert all(a != b for a, b in pairwise(epochs))


@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_start_within_the_epoch_gives_the_same_batches(start: int) -> None:
    walked = [*loader_of(rows()).epoch(2)][start:]
    begun = [*loader_of(rows()).epoch(2, start)]
    assert len(begun) == len(walked) == 5 - start
    for a, b in zip(begun, walked, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_two_ranks_together_have_the_batch_of_one() -> None:
    alone = batch_of(loader_of(rows()), 1, 2)
    halves = [batch_of(loader_of(rows(), batch_size=2, rank=r, ranks=2), 1, 2) for r in range(2)]
    for whole, *parts in zip(tensors(alone), *map(tensors, halves), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_ranks_evaluate_each_row_once_each_student_its_view() -> None:
    part, seen = rows(), []
    options: dict = {"mean": (), "std": (), "device": "cpu", "students": (2, 3, 1)}
    for rank in range(2):
        for batch in evaluation_batches(part, batch_size=5, rank=rank, ranks=2, **options):
            for k, inputs in zip((2, 3, 1), batch.inputs, strict=True):
                np.testing.assert_array_equal(inputs, part.views[k % 2][batch.ids])
            seen += batch.ids.tolist()
    assert sorted(seen) == [*range(23)]


def test_a_subset_keeps_names_and_labels() -> None:
    part = rows().subset(np.array([7, 2]))
    assert part.names == ("row 7", "row 2") and part.labels.tolist() == [1, 2]
    assert part.widths == WIDTHS and len(part) == 2
    assert VectorSet(part.views, part.labels).names == ("0", "1")


def test_global_generators_are_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = batch_of(loader_of(rows()), 0, 0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = batch_of(loader_of(rows()), 0, 0)
    assert torch.equal(first.ids, again.ids)


@pytest.mark.gpu
def test_cuda_makes_the_same_batches_without_waiting() -> None:
    on_cpu, on_gpu = loader_of(rows()), loader_of(rows(), device="cuda")
    batch_of(on_gpu, 0, 0)  # allocations
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [*on_gpu.epoch(0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, reference in zip(batches, on_cpu.epoch(0), strict=True):
        for mine, wanted in zip(tensors(ours), tensors(reference), strict=True):
            assert torch.equal(mine.cpu(), wanted)


def test_a_batch_or_a_step_outside_the_rows_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch size 24 .* 23 .*--batch-size"):
        loader_of(rows(), batch_size=24)
    with pytest.raises(IndexError, match="-1"):
        batch_of(loader_of(rows()), 0, -1)
