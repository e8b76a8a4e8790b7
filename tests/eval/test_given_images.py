"""Which files are predicted, what their names tell, and how other images are made to fit."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_cases import facts_of_three_classes

from dml_fast.config import TrainConfig
from dml_fast.errors import UserError
from dml_fast.eval.given_images import GivenImages, find_images, known_identities
from dml_fast.models import InputSpec


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process may have sent the logger's lines elsewhere."""
    monkeypatch.setattr(logging.getLogger("dml_fast"), "propagate", True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make an empty file in the present folder."""
    monkeypatch.chdir(tmp_path)

    def touched(name: str) -> Path:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
        return Path(name)

    return touched


def test_files_come_as_given_and_folders_are_walked(
    folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    inside = [folder(f"set/{name}") for name in ("b/2.png", "b/1.JPG", "a/deep/er/3.webp", "0.gif")]
    folder("set/notes.txt")
    photo = folder("photo")  # no suffix
    found = find_images([photo, Path("set")])
    expected = [photo, *sorted(inside, key=lambda path: (str(path.parent), path.name))]
    assert found == expected
    assert caplog.messages == ["in set was passed over: 1 of another kind (notes.txt)"]


def test_a_file_named_twice_is_taken_once(
    folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    one, two, other = folder("a/1.png"), folder("a/2.png"), folder("b/1.png")
    again = Path("b") / ".." / "a" / "1.png"
    assert find_images([two, one, again, Path("a"), other, two.absolute()]) == [two, one, other]
    assert caplog.messages == ["4 files were named more than once: each is predicted once"]


def test_what_is_no_file_is_refused(folder: Callable[[str], Path]) -> None:
    folder("empty/notes.txt")
    os.mkfifo("pipe.png")
    Path("lost.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"empty holds no image files \(\.bmp"):
        find_images([Path("empty")])
    for name in ("nothing", "pipe.png", "lost.png", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="is no file and no folder that can be read"):
            find_images([Path(name)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_refused(folder: Callable[[str], Path]) -> None:
    folder("set/below/1.png").parent.chmod(stat.S_IWUSR)
    with pytest.raises(UserError, match="cannot be listed"):
        find_images([Path("set")])


@pytest.mark.parametrize(
    ("data", "names", "expected", "missing"),
    [
        (
            "market1501:DIR",
            ["q/0007_c2s1_1.jpg", "-1_c3s1_000.jpg", "0000_c1_0.jpg"],
            {"pids": [7, -1, 0], "cams": [2, 3, 1]},
            [],
        ),
        ("market1501:DIR", ["12_1.jpg", "3_c1_.jpg"], {"pids": [12, 3]}, ["cams: 12_1.jpg"]),
        ("market1501:DIR", ["12_c1_1.jpg", "x.jpg"], {}, ["pids: x.jpg", "cams: x.jpg"]),
        ("folder:DIR", ["a/1.png", "x/b/deep/2.png", "a/c/3.png"], {"pids": ["a", "b", "c"]}, []),
        ("folder:DIR", ["a/1.png", "other/a.png"], {}, ["pids: other/a.png"]),
        ("shards:DIR", ["a/0007_c2s1_1.jpg"], {}, []),
        ("digits", ["a/0007_c2s1_1.jpg"], {}, []),
    ],
)
def test_names_tell_identities_as_in_the_runs_data(
    data: str,
    names: list[str],
    expected: dict[str, list[object]],
    missing: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, facts = TrainConfig(data=data), facts_of_three_classes()
    found = known_identities([Path(name) for name in names], config, facts)
    assert {name: array.tolist() for name, array in found.items()} == expected
    assert all(array.dtype.kind in "iU" for array in found.values())
    lines = [line.partition(" is not ")[0] for line in caplog.messages]
    assert lines == [text.replace(":", " are not known:") for text in missing]


def test_gray_and_size_are_the_students(tmp_path: Path) -> None:
    """Luma by ITU-R BT.601, the shorter side resized and the centre kept."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 10, 200, 90
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    facts = facts_of_three_classes(inputs=(InputSpec("image", (1, 4, 4)),))
    images = GivenImages.for_run([tmp_path / "wide.png"], TrainConfig(), facts)
    luma = round(0.299 * 10 + 0.587 * 200 + 0.114 * 90)
    np.testing.assert_array_equal(images.decoded(0), np.full((4, 4, 1), luma, np.uint8))
    assert images.shape == (1, 1, 4, 4) and images.other_sizes == [0]


def test_students_of_other_channels_take_no_files(tmp_path: Path) -> None:
    facts = facts_of_three_classes(inputs=(InputSpec("image", (2, 8, 8)),))
    with pytest.raises(UserError, match="take images of 2 channels, and image files have 1 or 3"):
        GivenImages.for_run([tmp_path], TrainConfig(), facts)
