"""The network for pairs against a loop over displacements in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dml_fast.errors import UserError
from dml_fast.models import InputSpec, create_model
from dml_fast.models.displacement import DisplacementNet, _correlation

PAIR = InputSpec("pair", (1, 1, 12, 3))


def network(search: int = 3, seed: int = 0, **options: object) -> DisplacementNet:
    torch.manual_seed(seed)
    net = DisplacementNet(search, width=4, dim=3, **options)  # type: ignore[arg-type]
    nn.init.constant_(net.log_scale, 0.3)
    return net.double().eval()


def crops(rows: int, height: int, width: int, search: int = 3, seed: int = 1) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    more = 2 * search
    sizes = (rows, 1, height, width), (rows, 1, height + more, width + more)
    return [torch.randn(size, generator=make, dtype=torch.float64) for size in sizes]


def by_loop(net: DisplacementNet, a: Tensor, b: Tensor) -> Tensor:
    """The formula of the docstring, one displacement after the other."""

    def standardised(x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=(2, 3), correction=0, keepdim=True)
        return (x - mean) / std

    f, g = net.encode_a(standardised(a)), net.encode_b(standardised(b))
    side, (h, w) = 2 * net.search + 1, a.shape[2:]
    found = [
        (f * g[:, :, r : r + h, c : c + w]).sum(1).mean((1, 2))
        for r, c in product(range(side), repeat=2)
    ]
    return net.log_scale.exp() * torch.stack(found, 1).reshape(-1, side, side)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14), (5, 67)])
def test_all_displacements_at_once_are_the_loop(height: int, width: int) -> None:
    """Odd and even sizes, and one that is cut into tiles."""
    net, (a, b) = network(), crops(2, height, width)
    torch.testing.assert_close(net.displacements(a, b), by_loop(net, a, b), rtol=0, atol=1e-12)


def test_the_gradient_is_the_loops() -> None:
    net, (a, b) = network(), crops(2, 7, 8)
    inputs = [a.requires_grad_(), b.requires_grad_(), *net.parameters()]
    weight = torch.randn(2, 7, 7, dtype=torch.float64)
    one, other = (
        torch.autograd.grad((logits * weight).sum(), inputs)
        for logits in (net.displacements(a, b), by_loop(net, a, b))
    )
    for got, expected in zip(one, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_float32_is_as_good_as_a_loop_in_float32() -> None:
    make = torch.Generator().manual_seed(0)
    f, g = torch.randn(8, 8, 24, 24, generator=make), torch.randn(8, 8, 40, 40, generator=make)

    def loop(f: Tensor, g: Tensor) -> Tensor:
        found = [
            (f * g[:, :, r : r + 24, c : c + 24]).sum(1).mean((1, 2))
            for r, c in product(range(17), repeat=2)
        ]
        return torch.stack(found, 1).reshape(-1, 17, 17)

    exact = loop(f.double(), g.double())
    plain = (loop(f, g) - exact).abs().max().item()
    assert (_correlation(f, g) - exact).abs().max().item() <= plain + 1e-6


def test_a_pair_as_one_tensor() -> None:
    """Only a's central square is read; the optimum is where b's content is."""
    net, (a, b) = network(), crops(2, 12, 12)
    x = torch.full((2, 2, 18, 18), 7.0, dtype=torch.float64)
    x[:, :1, 3:-3, 3:-3], x[:, 1:] = a, b
    torch.testing.assert_close(net(x), net.displacements(a, b).flatten(1), rtol=0, atol=1e-12)
    net.encode_b = net.encode_a  # the same features of the same content
    nn.init.constant_(net.log_scale, 5.0)
    x[0, :1, 3:-3, 3:-3] = b[0, :, 1:13, 5:17]
    assert net(x)[0].argmax() == (1 * 7 + 5)  # rows -2, columns 2


def test_brightness_and_contrast_do_not_matter() -> None:
    net, (a, b) = network(), crops(2, 12, 12)
    torch.testing.assert_close(net.displacements(5 * a - 9, b / 8), net.displacements(a, b))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 + 0.1])
def test_a_constant_crop_gives_numbers_and_no_gradient(value: float) -> None:
    net = network().float().train()
    a, b = (x.float() for x in crops(2, 12, 12))
    a[0] = value
    a.requires_grad_()
    logits = net.displacements(a, b)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert a.grad is not None and not a.grad[0].any() and a.grad[1].any()


def test_channels_are_standardised_each() -> None:
    net = network(channels=(2, 1))
    a, b = crops(2, 12, 12)
    one = net.displacements(torch.cat([a, a.flip(2)], 1), b)
    other = net.displacements(torch.cat([a, 1000 * a.flip(2) + 7], 1), b)
    torch.testing.assert_close(one, other)


def test_under_autocast_the_correlation_is_in_float32() -> None:
    net = network().float()
    a, b = (x.float() for x in crops(2, 12, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net.displacements(a, b)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, net.displacements(a, b), rtol=0.05, atol=0.02)


def test_by_name() -> None:
    net = create_model("displacement_6", num_classes=49, inputs=PAIR)
    assert isinstance(net, DisplacementNet) and net.search == 3
    assert net(torch.randn(2, *PAIR.tensor_shape)).shape == (2, 49)
    assert net.encode_a[0][0].out_channels == 6  # type: ignore[index, union-attr]
    two = create_model("displacement_6", num_classes=49, inputs=InputSpec("pair", (2, 1, 12, 3)))
    assert two.encode_a[0][0].in_channels == 2  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match="one logit for each of 49 displacements within 3 pixels"):
        create_model("displacement_6", num_classes=10, inputs=PAIR)


@pytest.mark.slow
def test_a_trace_takes_any_number_of_pairs() -> None:
    net = network().float()
    x = torch.randn(5, 2, 18, 18)
    program = torch.export.export(
        net, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    for count in (1, 5):
        torch.testing.assert_close(program(x[:count]), net(x[:count]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": 0}, "search is 0: give a whole number of at least 1"),
        ({"search": "8"}, "search is '8': give a whole"),
        ({"search": 8, "width": 0}, "width is 0: give a whole"),
        ({"search": 8, "dim": 2.5}, "dim is 2.5: give a whole"),
        ({"search": 8, "channels": 1}, "channels is 1: give those of a and of b"),
        ({"search": 8, "channels": (1, 0)}, "channels is 0: give a whole"),
    ],
)
def test_sizes_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DisplacementNet(**options)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit() -> None:
    net = network()
    a, b = crops(2, 12, 12)
    for x, message in (
        (b, r"the pairs have shape \(2, 1, 18, 18\): give \(N, 2, S, S\), with S above 6"),
        (b[0], "the pairs have shape"),
        (torch.zeros(2, 2, 6, 6), "with S above 6"),
    ):
        with pytest.raises(UserError, match=message):
            net(x)
    for one, other, message in (
        (a[0, 0], b, r"a has shape \(12, 12\): give \(N, 1, h, w\)"),
        (a, b.repeat(1, 2, 1, 1), "b has shape"),
        (b, a, "and b wider by 2R"),
        (a, b[:1], "give as many of both"),
    ):
        with pytest.raises(UserError, match=message):
            net.displacements(one, other)
