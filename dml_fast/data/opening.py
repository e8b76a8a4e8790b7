"""From a data spec such as ``cifar10:DIR`` to a `DataSet`."""

from __future__ import annotations

from dml_fast.data.digits import read_digits
from dml_fast.data.sets import DataSet, build_dataset
from dml_fast.errors import UserError


def check_data_spec(spec: str) -> None:
    """Checks what can be checked without reading images."""
    if spec != "digits":
        raise UserError(f"unknown data {spec!r}: choose digits")


def open_dataset(
    spec: str,
    *,
    download: bool = False,
    val_fraction: float | None = None,
    train_fraction: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
    image_size: int = 0,
    skip_corrupt: bool = False,
) -> DataSet:
    """Reads a data set into memory."""
    check_data_spec(spec)
    return build_dataset(
        read_digits(),
        val_fraction=0.15 if val_fraction is None else val_fraction,
        train_fraction=train_fraction,
        label_noise=label_noise,
        seed=seed,
    )
