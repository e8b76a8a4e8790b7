"""Specs and options of data sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dml_fast.data import check_data_spec, open_dataset
from dml_fast.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction 0.0"),
        ({"val_fraction": 1.0}, "val_fraction 1.0"),
        ({"train_fraction": 0.0}, "train_fraction 0.0"),
        ({"train_fraction": 1.5}, "train_fraction is 1.5"),
        ({"train_fraction": float("nan")}, "train_fraction is nan"),
        ({"label_noise": -0.1}, "label_noise is -0.1"),
        ({"label_noise": 1.0}, "label_noise 1.0"),
        ({"image_size": 16}, r"--image-size 16 .* 8 pixels"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset("digits", **options)


def test_importing_the_package_loads_no_torch_and_no_decoder() -> None:
    code = (
        "import sys, dml_fast.data; dml_fast.data.check_data_spec('digits'); "
        "print([m for m in ('torch', 'sklearn', 'PIL', 'simplejpeg') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar11:x", "unknown data 'cifar11:x': did you mean .*cifar10"),
        ("Digits", "did you mean digits"),
        ("zzz", "did you mean digits or cifar10 or cifar100 or folder"),
        ("{tmp}", "or folder:{tmp}"),
        ("digits:x", "should be 'digits' alone"),
        ("cifar10", "write cifar10:DIR"),
        ("folder:", "write folder:DIR"),
        ("cifar10:{tmp}", "has no CIFAR files: add --download, or put cifar-10-python.tar.gz"),
        ("cifar100:{tmp}/no", "does not exist: add --download, or put cifar-100-python.tar.gz"),
    ],
)
def test_specs_are_refused_with_a_remedy(spec: str, message: str, tmp_path: Path) -> None:
    spec, message = (text.replace("{tmp}", str(tmp_path)) for text in (spec, message))
    for refuse in (check_data_spec, open_dataset):
        with pytest.raises(UserError, match=message) as caught:
            refuse(spec)
        assert "\n" not in str(caught.value)


def test_a_folder_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --download"):
        check_data_spec(f"folder:{tmp_path}", download=True)
