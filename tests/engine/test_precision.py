"""Which type `--amp` takes."""

from __future__ import annotations

import pytest
import torch

from dml_fast import _native
from dml_fast.engine.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_without_bf16_instructions_computes_in_fp32_unless_told_otherwise(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_native, "has_fast_bf16", lambda: fast)
    with caplog.at_level("INFO", "dml_fast"):
        chosen = Precision.choose(True, "auto", CPU)
    assert chosen.dtype is (torch.bfloat16 if fast else None)
    assert ("no bf16 instructions" in caplog.text) is not fast
    assert Precision.choose(True, "bf16", CPU).dtype is torch.bfloat16
    assert Precision.choose(False, "auto", CPU).dtype is None
