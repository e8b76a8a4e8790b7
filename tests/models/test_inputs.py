"""What a student reads, and networks for vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dml_fast.errors import UserError
from dml_fast.foreign import Unfit
from dml_fast.models import InputSpec, check_model_name, create_model

VECTOR = InputSpec("vector", (7,))
IMAGE = InputSpec("image", (3, 16, 8))
PAIR = InputSpec("pair", (1, 2, 24, 8))


@pytest.mark.parametrize("spec", [VECTOR, IMAGE, PAIR])
def test_a_file_gives_back_what_it_was_given(spec: InputSpec) -> None:
    assert InputSpec.from_json(spec.to_json(), "it") == spec


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("vectr", (7,), "kind of an input is 'vectr', .* did you mean vector"),
        ("vector", (7, 2), r"input \(vector\) has 2 numbers: give \(size,\)"),
        ("image", (3, 8), r"input \(image\) has 2 numbers: give \(channels, height, width\)"),
        ("pair", (), r"input \(pair\) has 0 numbers: give \(channels of a, channels of b, patch"),
        ("pair", (1, 1, 24, 0), r"a size of an input \(pair\) is 0"),
        ("vector", (0,), r"a size of an input \(vector\) is 0"),
        ("vector", (2.5,), r"a size of an input \(vector\) is 2\.5"),
        ("vector", 7, "the shape of an input is 7: give a tuple"),
    ],
)
def test_what_is_no_input(kind: Any, shape: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InputSpec(kind, shape)


@pytest.mark.parametrize(
    "found",
    [None, {}, {"kind": "vector"}, {"kind": "vector", "shape": [0]},
     {"kind": "vector", "shape": [10**9]}, {"kind": "image", "shape": [7]},
     {"kind": "pair", "shape": [1, 1, 24]}, {"kind": "pair", "shape": [1, 1, 24, 10**6]},
     {"kind": "sound", "shape": [7]}, {"kind": "image", "shape": [3, 10**6, 8]}],
)  # fmt: skip
def test_damaged_files_have_no_input(found: Any) -> None:
    with pytest.raises(Unfit):
        InputSpec.from_json(found, "it")


def test_the_tensor_of_a_row() -> None:
    assert VECTOR.tensor_shape == (7,)
    assert IMAGE.tensor_shape == (3, 16, 8)
    assert PAIR.tensor_shape == (3, 40, 40)
    assert PAIR.words == "pairs of 24 x 24 pixels with a search of 8"


def test_a_perceptron_is_its_formula() -> None:
    """relu(x W + b) with dropout, then a classifier; the features are what the classifier gets."""
    net = create_model("mlp_5", num_classes=3, inputs=VECTOR).eval()
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    w1, b1, w2, b2 = net.parameters()
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 7), (5,), (3, 5), (3,)]
    hidden = (x @ w1.T + b1).clamp(min=0)
    torch.testing.assert_close(net(x), hidden @ w2.T + b2)
    torch.testing.assert_close(net.forward_features(x), hidden)  # type: ignore[operator]


@pytest.mark.parametrize(("name", "rate"), [("mlp_64", 0.2), ("mlp_9_drop0.5", 0.5)])
def test_a_perceptrons_dropout(name: str, rate: float) -> None:
    net = create_model(name, num_classes=3, inputs=VECTOR)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [rate]


def test_without_dropout_no_random_number_is_drawn() -> None:
    net = create_model("mlp_8_drop0", num_classes=3, inputs=VECTOR)
    before = torch.get_rng_state()
    net(torch.ones(2, 7))
    assert torch.equal(before, torch.get_rng_state())


def test_two_networks_of_one_name_are_equal_for_one_seed() -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(create_model("mlp_64", num_classes=3, inputs=VECTOR).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_an_image_by_its_spec_is_the_image_by_its_sizes() -> None:
    nets = []
    for sizes in ({"inputs": IMAGE}, {"in_channels": 3, "image_size": (16, 8)}):
        torch.manual_seed(0)
        nets.append(create_model("resnet8", num_classes=3, **sizes).state_dict())  # type: ignore[arg-type]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("mlp_64", IMAGE, "mlp_64 is a network for vectors and its inputs are images: .*resnet32"),
        ("resnet8", VECTOR, "resnet8 is a network for images and its inputs are vectors: .*mlp_64"),
        ("wrn_16_4_drop0.3", VECTOR, "is a network for images .* such as mlp_64"),
        ("sys:exit", VECTOR, "sys:exit is a network for images"),
        ("mlp_64", PAIR, "mlp_64 is a network for vectors and its inputs are pairs: .*lacement_16"),
        ("resnet8", PAIR, "for images and its inputs are pairs: .* such as displacement_16"),
        ("sys:exit", PAIR, "for images and its inputs are pairs: .* such as displacement_16"),
        ("displacement_4", IMAGE, "for pairs and its inputs are images: .* such as resnet32"),
        ("displacement_4", VECTOR, "for pairs and its inputs are vectors: .* such as mlp_64"),
    ],
)
def test_a_network_for_other_inputs_is_refused(name: str, spec: InputSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=3, inputs=spec)
    with pytest.raises(UserError, match=message):
        check_model_name(name, spec.kind)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp_0", "the width is a number from 1 to"),
        ("mlp_99999999999", "the width is a number from 1 to"),
        ("displacement_0", "the width is a number from 1 to 1024, as in displacement_16"),
        ("displacement_1025", "the width is a number from 1 to 1024"),
        ("displacement_16_drop0.1", "displacement_16 has no dropout"),
        ("mlp_64_drop2", r"in \[0, 1\), as in mlp_64_drop0\.3"),
        ("mlp", "the nearest are mlp_64"),
        ("mlp_", "the nearest are mlp_64"),
    ],
)
def test_bad_names_with_a_width(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model_name(name)


def test_inputs_must_be_a_spec() -> None:
    with pytest.raises(UserError, match="inputs is 7: give an InputSpec"):
        create_model("mlp_64", num_classes=3, inputs=7)  # type: ignore[arg-type]
