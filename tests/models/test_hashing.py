"""Codes of bits: how they are packed, and the networks that give them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dml_fast.errors import UserError
from dml_fast.eval import rank_features, rank_hamming
from dml_fast.models import InputSpec, create_model
from dml_fast.models.embedding import EmbeddingNet
from dml_fast.models.hashing import HashNet, pack_codes
from dml_fast.models.heads import LINEAR, MOST_BITS, Head, new_network

IMAGE, VECTOR = InputSpec("image", (1, 8, 8)), InputSpec("vector", (5,))


@pytest.mark.parametrize("bits", [1, 5, 8, 12, 64])
def test_codes_are_packed_as_numpy_packs(bits: int) -> None:
    u = torch.randn(9, bits, generator=torch.Generator().manual_seed(bits))
    u[0, 0], u[1, 0], u[2, 0] = 0.0, float("nan"), -0.0
    packed = pack_codes(u)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(u.numpy() > 0, axis=1))


@pytest.mark.parametrize("u", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), [[0.5]]])
def test_codes_of_something_else_are_refused(u: object) -> None:
    with pytest.raises(UserError, match=r"pack_codes got .* give a tensor \(N, b\) of floats"):
        pack_codes(u)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "spec"), [("resnet8", IMAGE), ("mlp_8", VECTOR)])
def test_codes_are_signs_of_what_the_classifier_reads(name: str, spec: InputSpec) -> None:
    torch.manual_seed(0)
    net = new_network(name, 4, spec, Head("hash", 12))
    assert isinstance(net, HashNet) and net.training
    x = torch.randn(16, *spec.shape)
    u, logits = net.features_and_logits(x)
    assert u.shape == (16, 12) and logits.shape == (16, 4)
    torch.testing.assert_close(u.mean(0), torch.zeros(12), atol=1e-5, rtol=0)  # over the batch
    net.eval()
    with torch.no_grad():
        u, logits = net.features_and_logits(x)
        torch.testing.assert_close(net(x), net.classifier(u.tanh()))
        assert (net.embed(x) == torch.where(u > 0, 1.0, -1.0)).all()
        np.testing.assert_array_equal(net.codes(x).numpy(), np.packbits(u > 0, axis=1))


def test_cosine_ranks_as_hamming_does() -> None:
    torch.manual_seed(1)
    net = new_network("mlp_8", 4, VECTOR, Head("hash", 16)).eval()  # 1 / 4 is exact: ties stay
    x, pids, cams = torch.randn(30, 5), np.arange(30) % 3, np.zeros(30, np.int64)
    with torch.no_grad():
        embedded, codes = net.embed(x).numpy(), net.codes(x).numpy()  # type: ignore[operator]
    how = (pids[:10], pids[10:], cams[:10], cams[10:])
    for ties in ("stable", "expected"):
        options = {"protocol": "all", "ties": ties}
        cosine = rank_features(embedded[:10], embedded[10:], *how, **options)
        hamming = rank_hamming(codes[:10], codes[10:], *how, **options)
        assert cosine.mAP == pytest.approx(hamming.mAP, abs=1e-12)


def test_numbers_that_are_not_finite_are_no_code() -> None:
    net = new_network("mlp_8", 4, VECTOR, Head("hash", 4)).eval()
    with torch.no_grad():
        net.norm.weight[1] = torch.nan  # type: ignore[index, union-attr]
        found = net.embed(torch.randn(3, 5))  # type: ignore[operator]
    assert found[:, 1].isnan().all() and (found[:, [0, 2, 3]].abs() == 1).all()


def test_each_head_is_built() -> None:
    kinds = {"linear": nn.Module, "bnneck": EmbeddingNet, "hash": HashNet}
    for kind, wanted in kinds.items():
        head = Head(kind, 8 if kind == "hash" else 0)  # type: ignore[arg-type]
        assert isinstance(new_network("resnet8", 4, IMAGE, head), wanted)
    assert type(new_network("resnet8", 4, IMAGE, LINEAR)) is type(
        create_model("resnet8", num_classes=4)
    )


@pytest.mark.parametrize("bits", [0, -8, 2.5, True, None, MOST_BITS + 1])
def test_lengths_that_cannot_be_ranked_are_refused(bits: object) -> None:
    with pytest.raises(UserError, match="give a whole number from 1 to 65472"):
        Head("hash", bits)  # type: ignore[arg-type]
    if bits != MOST_BITS + 1:
        with pytest.raises(UserError, match=r"bits is .* a whole number of at least 1"):
            HashNet(nn.Identity(), 3, bits, 2)  # type: ignore[arg-type]


def test_only_codes_have_bits() -> None:
    with pytest.raises(UserError, match="a head of kind linear has no bits and got 8: give 0"):
        Head("linear", 8)
