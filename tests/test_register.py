"""Arguments of ``python -m dml_fast.register`` that are refused before the run is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_cases import refusal_of

from dml_fast.register import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run", "give two images, A.npy and B.npy, or --training-pairs"),
        ("run a.npy", "give two images, A.npy and B.npy, or --training-pairs"),
        ("run a.npy b.npy --search -1", "--search is -1: give a whole number of at least 0"),
        ("run a.npy b.npy --surface s.txt", "--surface s.txt does not end in .npz"),
        ("run a.npy b.npy --picture p.jpg", "--picture p.jpg does not end in .png"),
        ("run a.npy b.npy --picture /proc/x/p.png", "/proc/x/p.png cannot be written"),
        ("run a.npy b.npy --out o.tsv", "--out goes with --training-pairs: add that, or leave"),
        ("run a.npy b.npy --keep 0.7", "--keep goes with --training-pairs: add that, or leave"),
        ("run a.npy b.npy --training-pairs --out o", "takes no images: leave out a.npy"),
        ("run --training-pairs", "give --out FILE.tsv for the offsets of the training pairs"),
        ("run --training-pairs --out o --search 2", "--search means nothing with --training-pairs"),
        ("run --training-pairs --out o --keep 0", "--keep is 0.0: give a share above 0"),
        ("run --training-pairs --out o --keep 1.5", "--keep is 1.5: give a share above 0"),
        ("run --training-pairs --out o --keep nan", "--keep is nan: give a share above 0"),
        ("nowhere a.npy b.npy", "nowhere"),
    ],
)
def test_arguments_that_are_refused(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal_of(main, capsys, *arguments.split())
    assert not [*tmp_path.iterdir()]
