"""What shards have beside samples is counted in one line; `folder:` and market1501: their tests."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest
from data_cases import picture
from PIL import Image
from shard_cases import both, opened, sample, write_tar

from dml_fast.data.__main__ import main as data_command
from dml_fast.errors import UserError


def _image() -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(1)).save(out, "JPEG")
    return out.getvalue()


def test_what_is_no_sample_is_counted_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dml_fast")
    _, shards = both(tmp_path)
    plain = opened(shards).fingerprint
    assert not [r for r in caplog.records if "passed over" in r.getMessage()]
    files = [f for i in range(20) for f in sample(f"{i}", _image(), i % 2)]
    files += [(f"{i}.json", b"{}") for i in range(9)] + [(".hidden.jpg", b""), ("no dot", b"")]
    write_tar(shards / "train-9.tar", files)
    with tarfile.open(shards / "train-9.tar", "a") as tar:
        for name, kind in (("20.jpg", tarfile.LNKTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg"
            tar.addfile(info)
    for name in ("train-8.tar.gz", "train-7.TGZ", "notes.txt", ".DS_Store"):
        (shards / name).write_bytes(b"")
    (shards / "more").mkdir()
    caplog.clear()
    data = opened(shards, image_size=24)
    assert data.fingerprint != plain and len(data.train) == 50 + 20
    lines = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(lines) == 1 and lines[0].startswith(f"in {shards} was passed over: ")
    expected = [
        "1 beside the parts (more)", "2 compressed (train-7.TGZ, train-8.tar.gz)",
        "11 of another kind (notes.txt, train-9.tar/0.json, train-9.tar/1.json, ...)",
        "2 hidden (.DS_Store, train-9.tar/.hidden.jpg)", "1 links or devices (train-9.tar/20.jpg)",
    ]  # fmt: skip
    assert sorted(lines[0].partition(" over: ")[2].split("; ")) == sorted(expected)
    assert data_command(["scan", f"shards:{shards}"]) == 0
    assert all(piece in capsys.readouterr().out for piece in expected[:1])
    assert data_command(["scan", f"shards:{shards}", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["passed_over"]
    assert counts["of another kind"] == 11 and sum(counts.values()) == 17


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.tar")
    with pytest.raises(UserError, match=r"train\.tar is damaged \(not a file\)"):
        opened(tmp_path)
