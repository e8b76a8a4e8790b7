"""Registration against an exhaustive search in numpy, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from dml_fast.errors import UserError
from dml_fast.eval.registration import climb, local_maxima, of_surface
from dml_fast.models.displacement import DisplacementNet
from dml_fast.register import Registration, register


def students(count: int = 2, search: int = 3) -> list[DisplacementNet]:
    """Students whose batch normalisation has seen something."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        net = DisplacementNet(search, width=3, dim=2)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
        nn.init.constant_(net.log_scale, 0.5 * seed)
        found.append(net.eval())
    return found


def images(height: int = 9, width: int = 12, search: int = 3, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = (height, width), (height + 2 * search, width + 2 * search)
    return [100 + 20 * random.normal(size=size) for size in sizes]


def encoded(encoder: Any, image: np.ndarray) -> np.ndarray:
    """The features (D, h, w) of a standardised image, by the definition of each layer."""
    x = ((image - image.mean()) / image.std())[None]
    for block in encoder[:2]:
        conv, norm, _ = block
        kernel = conv.weight.detach().double().numpy()
        windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
        x = np.einsum("oikl,ihwkl->ohw", kernel, windows)
        mean, var, weight, bias = (
            value.detach().double().numpy()[:, None, None]
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        x = np.maximum((x - mean) / np.sqrt(var + norm.eps) * weight + bias, 0)
    last = encoder[2]
    kernel, bias = last.weight.detach().double().numpy(), last.bias.detach().double().numpy()
    return np.einsum("oi,ihw->ohw", kernel[:, :, 0, 0], x) + bias[:, None, None]


def exhaustive(nets: list[DisplacementNet], a: np.ndarray, b: np.ndarray, search: int) -> Any:
    """The surface by the formula: each flip, each student, each displacement."""
    h, w = a.shape
    side = 2 * search + 1
    total = np.zeros((side, side))
    for axes in ((), (0,), (1,), (0, 1)):
        surface = np.zeros((side, side))
        for net in nets:
            f = encoded(net.encode_a, np.flip(a, axes))
            g = encoded(net.encode_b, np.flip(b, axes))
            for r in range(side):
                for c in range(side):
                    mean = (f * g[:, r : r + h, c : c + w]).sum(0).mean()
                    surface[r, c] += np.exp(net.log_scale.item()) * mean
        total += np.flip(surface, axes)
    return total / 4


@pytest.mark.parametrize("search", [3, 2])
def test_register_is_an_exhaustive_search(search: int) -> None:
    """Within the students' search, and within a smaller one."""
    nets = students()
    a, b = images(search=search)
    found = register(nets, a, b)
    expected = exhaustive(nets, a, b, search)
    assert isinstance(found, Registration) and found.logits.dtype == np.float64
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=2e-6)
    best = np.unravel_index(expected.argmax(), expected.shape)
    assert found.offset.tolist() == [int(x) - search for x in best]
    above = expected.max() - expected.mean()
    assert found.margin == pytest.approx(above / expected.std(), rel=1e-5)


@pytest.mark.parametrize("moved", [(0, 0), (3, -2), (-1, 3)])
def test_content_is_found_where_it_is(moved: tuple[int, int]) -> None:
    """With one encoder for both, an image is likest to itself: what is at u is at u + R + t."""
    nets = students()
    for net in nets:
        net.encode_b = net.encode_a
        net.train()
    scene = np.random.default_rng(0).normal(size=(40, 40))
    a, (row, column) = scene[10:26, 12:30], (10 - 3 - moved[0], 12 - 3 - moved[1])
    found = register(nets, a, scene[row : row + 22, column : column + 24])
    assert tuple(found.offset) == moved and found.margin > 4
    assert all(net.training for net in nets)  # as before


def test_flipped_images_have_the_flipped_surface() -> None:
    """In no single student, but in the mean over the flips."""
    nets = students()
    a, b = images()
    straight, flipped = register(nets, a, b), register(nets, a[::-1], b[::-1])
    np.testing.assert_allclose(flipped.logits[::-1], straight.logits, rtol=0, atol=1e-6)


def test_any_type_of_image_gives_the_same() -> None:
    nets = students()
    a, b = (image.round() for image in images())
    expected = register(nets, a, b).logits
    for one, other in (
        (a.astype(np.uint8), b.astype(np.int64)),
        (torch.from_numpy(a).float(), b.astype(">f4")),
        (a + 1e6, 1e-3 * b),  # centred before the step to float32
    ):
        np.testing.assert_allclose(register(nets, one, other).logits, expected, atol=1e-5)


def test_of_equal_logits_the_shortest_then_the_first() -> None:
    surface = np.zeros((5, 5))
    assert of_surface(surface).offset.tolist() == [0, 0]
    assert of_surface(surface).margin == 0.0
    surface[[0, 4, 1, 3], [4, 4, 1, 3]] = 1.0  # two of length 8, two of length 2
    assert of_surface(surface).offset.tolist() == [-1, -1]
    surface[0, 4] = 2.0
    assert of_surface(surface).offset.tolist() == [-2, 2]


NAN = images()[0]
NAN[2, 3] = np.nan


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (images(9, 12)[0], images(9, 13)[1], r"a is 9 x 12 and b 15 x 19 pixels: b must be wider"),
        (images()[0], images()[0], "on each side by the same number of pixels, 1 to 3"),
        (images(9, 12)[0], images(10, 13)[1], "on each side by the same number of pixels, 1 to 3"),
        (images()[0], images(search=4)[1], "on each side by the same number of pixels, 1 to 3"),
        (images(4, 9)[0], images(4, 9)[1], "a has 4 x 9 pixels: give at least 5"),
        (NAN, images()[1], "a is nan at row 2, column 3, and not finite in 1 of 108 pixels"),
        (images()[0], np.full((15, 18), 0.1), "b is 0.1 everywhere, so nothing in it can be found"),
        (np.zeros((2, 9, 12)), images()[1], r"a has 3 dimension\(s\): pass one channel"),
        (images()[0] + 1j, images()[1], "a has type complex128: pass float32 or float64"),
    ],
)
def test_images_that_cannot_be_registered(a: Any, b: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register(students(), a, b)


def test_students_that_cannot_register() -> None:
    a, b = images()
    with pytest.raises(UserError, match="there are no students"):
        register([], a, b)
    with pytest.raises(UserError, match="a student is a Linear, which compares no displacements"):
        register([nn.Linear(2, 3)], a, b)
    for wrong in (students()[0], (net for net in students())):
        with pytest.raises(UserError, match="give a list of students"):
            register(wrong, a, b)  # type: ignore[arg-type]
    for net in (DisplacementNet(3, channels=(2, 1)), DisplacementNet(3).double()):
        with pytest.raises(UserError, match="give students for one channel, in float32"):
            register([net], a, b)
    register(nn.ModuleList(students()), a, b)  # type: ignore[arg-type]
    nets = students()
    nn.init.constant_(nets[1].log_scale, np.nan)
    with pytest.raises(UserError, match="student 1 gives logits that are not finite"):
        register(nets, a, b)


def test_climbing_and_maxima() -> None:
    surface = np.array(
        [[0, 1, 2, 3, 9],
         [0, 5, 2, 4, 3],
         [0, 1, 1, 2, 3],
         [0, 0, 1, 1, 1],
         [7, 0, 0, 0, 0]]
    )  # fmt: skip
    assert local_maxima(surface).tolist() == [[-2, 2], [-1, -1], [2, -2]]
    assert climb(surface, (0, -2)) == (-1, -1)
    assert climb(surface, (0, 1)) == (-2, 2)  # by way of 4
    assert climb(surface, (1, -2)) == (2, -2)  # 7 is higher than what is above
    assert climb(surface, (2, -2)) == (2, -2)
    assert len(local_maxima(np.zeros((3, 3)))) == 9


def test_climbs_end_in_maxima() -> None:
    surface = np.random.default_rng(0).normal(size=(7, 7))
    ends = {climb(surface, (r, c)) for r in range(-3, 4) for c in range(-3, 4)}
    assert ends == set(map(tuple, local_maxima(surface).tolist()))
    whole, best = surface.max(), np.unravel_index(surface.argmax(), surface.shape)
    assert (int(best[0]) - 3, int(best[1]) - 3) in ends and whole > 0


@pytest.mark.parametrize("surface", [np.zeros((3, 5)), np.zeros((4, 4)), np.zeros(9)])
def test_what_is_no_surface(surface: np.ndarray) -> None:
    for call in (local_maxima, lambda x: climb(x, (0, 0))):
        with pytest.raises(UserError, match=r"the surface has shape .* give a number for each"):
            call(surface)


def test_a_climb_from_outside() -> None:
    with pytest.raises(UserError, match=r"start is \(0, 2\): give rows and columns from -1 to 1"):
        climb(np.zeros((3, 3)), (0, 2))
    with pytest.raises(UserError, match="not finite"):
        climb(np.full((3, 3), np.nan), (0, 0))
