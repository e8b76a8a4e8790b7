"""The built-in networks and the registry of names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml_fast.errors import UserError
from dml_fast.models import InputSpec, check_model_name, create_model, model_names, registry
from dml_fast.models.base import FeatureNet
from dml_fast.models.resnet import BasicBlock

FAMILIES = ["resnet8", "wrn_10_1", "mobilenet_v1", "inception_v1"]
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 64, 32)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Such small work is slower on more threads, and much slower on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str, shape: tuple[int, int, int], classes: int = 7, seed: int = 0) -> FeatureNet:
    torch.manual_seed(seed)
    net = create_model(name, num_classes=classes, in_channels=shape[0], image_size=shape[1:])
    assert isinstance(net, FeatureNet)
    return net


def images(shape: tuple[int, int, int], count: int = 4) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


# Exact counts by hand from the networks' own papers; `millions` is Table 1 of the DML paper.
@pytest.mark.parametrize(
    ("name", "count", "millions"),
    [
        ("resnet32", 470_004, 0.5),
        ("wrn_28_10", 36_536_884, 36.5),
        ("mobilenet_v1", 3_309_476, 3.3),
        ("inception_v1", 7_786_596, 7.8),
    ],
)
def test_parameter_counts_are_the_papers(name: str, count: int, millions: float) -> None:
    with torch.device("meta"):
        net = create_model(name, num_classes=100)
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == count
    assert round(parameters / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "convolutions"),
    # The names count weighted layers: those on the main path, and for wide ResNets 3 shortcuts.
    [(f"resnet{d}", d - 1) for d in (8, 14, 20, 32, 44, 56, 110)]
    + [("wrn_28_10", 28), ("wrn_16_4", 16), ("wrn_40_2", 40)],
)
def test_depth_is_the_number_of_layers(name: str, convolutions: int) -> None:
    with torch.device("meta"):
        net = create_model(name, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == convolutions


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradient(name: str, shape: tuple[int, int, int]) -> None:
    net = build(name, shape)
    features = net.forward_features(images(shape))
    assert features.shape == (4, net.num_features)
    logits = net.classifier(features)
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    if name == "resnet8":  # its blocks start as shortcuts, and learn from the second step on
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        net.zero_grad()
        F.cross_entropy(net(images(shape)), torch.arange(4)).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_classifier_of_the_features(name: str) -> None:
    net = build(name, (3, 8, 8)).eval()
    x = images((3, 8, 8))
    assert torch.equal(net(x), net.classifier(net.forward_features(x)))
    assert net.classifier.in_features == net.num_features


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 9, 11), (3, 96, 96), (3, 256, 128), (3, 224, 224)], ids=str
)
def test_any_image_size(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        net = build(name, shape)
        assert net(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "side", "last_map"),
    [
        ("mobilenet_v1", 32, 4),
        ("mobilenet_v1", 63, 8),
        ("mobilenet_v1", 64, 2),
        ("mobilenet_v1", 224, 7),
        ("inception_v1", 32, 4),
        ("inception_v1", 63, 8),
        ("inception_v1", 64, 2),
        ("inception_v1", 224, 7),
    ],
)
def test_strides_follow_the_image_size(name: str, side: int, last_map: int) -> None:
    with torch.device("meta"):
        net = build(name, (3, side, side))
        layers = net.get_submodule("layers")
        assert layers(torch.zeros(2, 3, side, side)).shape == (2, 1024, last_map, last_map)
    small_inception = name == "inception_v1" and side < 64
    assert net.num_features == 1024 * (last_map**2 if small_inception else 1)


def test_large_rule_needs_both_sides() -> None:
    with torch.device("meta"):
        net = build("mobilenet_v1", (3, 256, 63))
        assert net.get_submodule("layers")(torch.zeros(2, 3, 256, 63)).shape[2:] == (32, 8)


def test_option_a_shortcut_has_zeros_and_no_parameters() -> None:
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = images((4, 5, 5)).abs()
    y = block(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 4:], torch.zeros(4, 4, 3, 3))


def test_resnet_starts_as_its_shortcuts() -> None:
    net = build("resnet8", (3, 8, 8))
    x = images((3, 8, 8))
    stem = F.relu(net.get_submodule("bn")(net.get_submodule("conv")(x)))
    shortcuts = F.pad(stem[:, :, ::4, ::4], (0, 0, 0, 0, 0, 48)).mean(dim=(2, 3))
    assert torch.allclose(net.forward_features(x), shortcuts, atol=1e-6)


def test_initialisation_is_he_fan_out() -> None:
    net = build("mobilenet_v1", (3, 32, 32))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2 / module.groups
            expected = (2 / fan_out) ** 0.5
            spread = float(module.weight.detach().std(correction=0))
            error = expected / (2 * module.weight.numel()) ** 0.5  # standard error of the deviation
            assert abs(spread - expected) < 5 * error
    assert not net.classifier.bias.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_training_and_evaluation_modes(name: str) -> None:
    net = build(name, (3, 8, 8))
    x = images((3, 8, 8))
    net.eval()
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-4), "a batch's rows are independent"
    assert all(int(b) == 0 for n, b in net.named_buffers() if n.endswith("num_batches_tracked"))
    before = net(x)
    net.train()
    assert not torch.allclose(net(x)[:2], net(x[:2]), atol=1e-4), "statistics are the batch's"
    assert all(int(b) == 2 for n, b in net.named_buffers() if n.endswith("num_batches_tracked"))
    net.eval()
    assert not torch.equal(net(x), before), "training moved the running statistics"


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_autocast(name: str) -> None:
    net = build(name, (3, 8, 8))
    x = images((3, 8, 8), 8)
    net.eval()  # a batch's own statistics would amplify the rounding
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(x)
    assert rounded.dtype == torch.bfloat16
    exact = net(x)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    F.cross_entropy(logits.float(), torch.arange(8) % 7).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_last_gives_the_same(name: str) -> None:
    net = build(name, (3, 8, 8))
    x = images((3, 8, 8))
    plain = net(x)
    net.to(memory_format=torch.channels_last)
    assert torch.allclose(net(x.contiguous(memory_format=torch.channels_last)), plain, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_students_differ_through_the_generator_alone(name: str) -> None:
    first, again, other = (build(name, (1, 8, 8), seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = [key for key, value in first.items() if key.endswith("weight") and value.dim() > 1]
    assert weights
    assert not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", ["wrn_10_1_drop0.5", "inception_v1_drop.5"])
def test_dropout_suffix(name: str) -> None:
    net = build(name, (1, 8, 8))
    x = images((1, 8, 8))
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_dropout_by_default(name: str) -> None:
    net = build(name, (1, 8, 8))
    state = torch.get_rng_state()
    x = images((1, 8, 8))
    assert torch.equal(net(x), net(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_name_builds() -> None:
    assert {"resnet32", "wrn_28_10", "mobilenet_v1", "inception_v1"} <= set(model_names())
    for name in model_names():
        check_model_name(name)
        spec = InputSpec("image", (1, 8, 8))
        if name == "mlp_64":
            spec = InputSpec("vector", (5,))
        elif name == "displacement_16":
            spec = InputSpec("pair", (1, 1, 6, 1))
        with torch.device("cpu" if spec.kind == "pair" else "meta"):  # meta has no autocast
            net = create_model(name, num_classes=9, inputs=spec)
            assert net(torch.zeros(2, *spec.tensor_shape)).shape == (2, 9), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resent32", r"unknown architecture 'resent32': the nearest are resnet32, .*timm:NAME"),
        ("ResNet-32", "the nearest are resnet32"),
        ("resnet152", "unknown architecture 'resnet152'"),  # 6n + 2, but an ImageNet name
        ("", "the built-in ones are resnet8, "),
        ("wrn_27_10", r"depth is 6n \+ 4"),
        ("wrn_4_1", r"depth is 6n \+ 4"),
        ("wrn_28_0", "width at least 1"),
        ("resnet32_drop0.1", "resnet32 has no dropout"),
        ("wrn_28_10_drop1.5", r"'1.5' must be in \[0, 1\)"),
        ("timm:", "as timm:NAME"),
        ("a.b:c d", "not of the form package.module:function"),
        ("no_such_package_at_all.x:f", "there is no module 'no_such_package_at_all'"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model_name(name)
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=10)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_missing_zoo(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'dml_fast\[zoo\]'"):
        check_model_name(f"{package}:resnet18")


@pytest.mark.parametrize("name", FAMILIES)
def test_too_small_image(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} needs images of at least 8 x 8 .* are 32 x 7"):
        create_model(name, num_classes=10, image_size=(32, 7))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0: give a whole number of at least 1"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"image_size": 0}, r"image_size \(height\) is 0"),
        ({"image_size": (8, -1)}, r"image_size \(width\) is -1"),
    ],
)
def test_bad_numbers(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("resnet8", **{"num_classes": 10, **bad})


def test_names_are_checked_without_torch() -> None:
    code = (
        "import sys; from dml_fast.models import check_model_name, model_names\n"
        "for n in [*model_names(), 'wrn_16_8_drop0.3', 'sys:exit']: check_model_name(n)\n"
        "try: check_model_name('resent32')\n"
        "except ValueError as e: print(e)\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resnet32" in done.stdout


CUSTOM = """
import torch
from torch import nn

def good(num_classes, in_channels, image_size):
    height, width = image_size
    net = nn.Sequential(nn.BatchNorm2d(in_channels), nn.Dropout(0.5), nn.Flatten(),
                        nn.Linear(in_channels * height * width, num_classes))
    net[1].eval()
    return net

def loose(**anything):
    return good(**anything)

def old_style(classes):
    return nn.Identity()

def not_a_module(num_classes, in_channels, image_size):
    return 3

def wrong_logits(num_classes, in_channels, image_size):
    return nn.Flatten()

def tuple_out(num_classes, in_channels, image_size):
    return nn.LSTM(image_size[1], num_classes)

def misfit(num_classes, in_channels, image_size):
    return nn.Conv2d(in_channels + 1, num_classes, 1)

def raises(num_classes, in_channels, image_size):
    raise RuntimeError("no weights here")

answer = 42
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "models_of_a_user").mkdir()
    (tmp_path / "models_of_a_user" / "nets.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "models_of_a_user", raising=False)
    monkeypatch.delitem(sys.modules, "models_of_a_user.nets", raising=False)
    return "models_of_a_user.nets"


def test_custom_function_is_left_as_it_was_built(custom: str) -> None:
    for function in ("good", "loose"):
        torch.manual_seed(3)
        net = create_model(f"{custom}:{function}", num_classes=5, in_channels=2, image_size=(4, 6))
        state = torch.get_rng_state()
        torch.manual_seed(3)
        module = sys.modules[custom]
        plain = module.good(num_classes=5, in_channels=2, image_size=(4, 6))
        assert torch.equal(torch.get_rng_state(), state)
        for key, value in plain.state_dict().items():
            assert torch.equal(net.state_dict()[key], value), key
        assert [m.training for m in net.modules()] == [m.training for m in plain.modules()]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "has no function 'missing'"),
        ("answer", "has no function 'answer'"),
        ("old_style", r"must accept the keywords \(num_classes: int, in_channels: int"),
        ("not_a_module", "returned a int, not a torch.nn.Module"),
        ("wrong_logits", r"a batch of 2 gives \(2, 192\), and must give .* \(2, 5\)"),
        ("misfit", "with images of 3 x 8 x 8: its forward pass failed: "),
        ("tuple_out", "its forward pass failed|gives tuple"),
        ("raises", "cannot be built: no weights here"),
    ],
)
def test_custom_function_mistakes(custom: str, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(f"{custom}:{function}", num_classes=5, image_size=8)


def test_custom_module_that_is_not_there(custom: str) -> None:
    with pytest.raises(UserError, match=r"cannot import models_of_a_user\.absent"):
        create_model("models_of_a_user.absent:f", num_classes=5)
