"""Students as one network: what `evaluate` combines in numpy and in torch, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from run_cases import facts_of_three_classes, facts_of_vectors
from torch import Tensor, nn

from dml_fast.eval.retrieval import concatenate
from dml_fast.models.heads import Head, new_network
from dml_fast.runs.facts import DataFacts
from dml_fast.runs.weights import ensemble_of


def networks(facts: DataFacts, count: int, arch: str = "mlp_4") -> list[nn.Module]:
    found = []
    for k in range(count):
        torch.manual_seed(k)
        net = new_network(arch, 3, facts.input_of(k), facts.head)
        for name, value in net.named_buffers():
            if name.endswith("running_mean"):
                value.normal_()
        found.append(net.eval())
    return found


def vectors(rows: int = 6, **changes: Any) -> tuple[DataFacts, list[Tensor]]:
    facts = facts_of_vectors()
    facts = DataFacts(**(vars(facts) | changes))
    g = torch.Generator().manual_seed(9)
    return facts, [torch.randn(rows, *spec.shape, generator=g) for spec in facts.inputs]


@torch.no_grad()
def test_probabilities_are_the_mean_of_students_with_their_own_inputs() -> None:
    facts, inputs = vectors()
    nets = networks(facts, 4)  # the fourth reads the first view
    found = ensemble_of(nets, facts)(*inputs)
    each = [nets[k](inputs[k % 3]).softmax(1) for k in range(4)]
    assert torch.allclose(found, sum(each) / 4, rtol=0, atol=1e-6)
    assert not torch.allclose(found, each[0])


@torch.no_grad()
def test_labels_that_do_not_exclude_each_other_have_a_probability_each() -> None:
    facts, inputs = vectors(several_labels=True)
    nets = networks(facts, 3)
    each = [1 / (1 + (-net(x)).exp()) for net, x in zip(nets, inputs, strict=True)]
    found = ensemble_of(nets, facts)(*inputs)
    assert torch.allclose(found, sum(each) / 3, rtol=0, atol=1e-6)


@torch.no_grad()
def test_embeddings_lie_side_by_side_at_length_1() -> None:
    facts, inputs = vectors(retrieval=True, head=Head("bnneck"))
    nets = networks(facts, 3)
    features = [net.embed(x) for net, x in zip(nets, inputs, strict=True)]  # type: ignore[operator]
    expected = concatenate([f.numpy() for f in features])
    found = ensemble_of(nets, facts)(*inputs)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    # of a row of zeros there is no direction
    zeros = nn.Linear(5, 4, bias=False)
    nn.init.zeros_(zeros.weight)
    both = ensemble_of([zeros, *nets[1:]], facts)(*inputs)
    assert both[:, :4].eq(0).all() and torch.equal(both[:, 4:], found[:, 4:])


@pytest.mark.parametrize("retrieval", [False, True])
@torch.no_grad()
def test_bits_of_codes_lie_side_by_side(retrieval: bool) -> None:
    """Of 5 bits each, so that a student's code does not begin with a byte."""
    facts, inputs = vectors(retrieval=retrieval, head=Head("hash", 5))
    nets = networks(facts, 3)
    bits = [net.embed(x).numpy() > 0 for net, x in zip(nets, inputs, strict=True)]  # type: ignore[operator]
    probabilities, codes = ensemble_of(nets, facts)(*inputs)
    assert np.array_equal(codes.numpy(), np.packbits(np.concatenate(bits, 1), axis=1))
    each = [net(x).softmax(1) for net, x in zip(nets, inputs, strict=True)]
    assert torch.allclose(probabilities, sum(each) / 3, rtol=0, atol=1e-6)


def test_one_view_is_read_by_all() -> None:
    facts = facts_of_three_classes()
    nets = networks(facts, 2, "resnet8")
    with torch.no_grad():
        x = torch.randn(2, 1, 8, 8)
        expected = (nets[0](x).softmax(1) + nets[1](x).softmax(1)) / 2
        assert torch.allclose(ensemble_of(nets, facts)(x), expected, rtol=0, atol=1e-6)
