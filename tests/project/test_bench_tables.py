"""What stands in the benchmarks' tables: the best baseline, kinds of kernels, one student."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import bench_linear_loss
from benchmarks.common import kinds, tables
from benchmarks.peers import loss as peers


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize", "conv"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NHWC<__nv_bfloat16, int>", "norm"),
        ("triton_poi_fused__native_batch_norm_legit_functional_relu_3", "norm"),
        ("triton_red_fused_add_convolution_backward_7", "pointwise"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
            "pointwise",
        ),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>",
            "copy",
        ),
        ("Memset (Device)", "copy"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedOptimizer, FusedSgdMathFunctor>",
            "optimizer",
        ),
        ("one_pass", "loss"),
        ("who_knows", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(name: str, kind: str) -> None:
    assert kinds.kind_of(name) == kind
    assert kinds.by_kind([(name, 2.0), (name, 3.0)])[kind] == {"time": 5.0, "count": 2.0}


def test_the_best_baseline_is_the_fastest_that_is_not_ours() -> None:
    rows: list[tables.Row] = [
        {"name": "naive", "median_ms": 8.0, "graph_ms": 4.0},
        {"name": "careful + max-autotune", "median_ms": 3.0, "graph_ms": 2.0},
        {"name": "careful + compile", "left_out": "absent"},
        {"name": "closed_form + compile", "median_ms": 1.0},
        {"name": "triton", "median_ms": 2.0, "graph_ms": 0.5},
    ]
    found = {row["name"]: row for row in tables.compared(rows, peers.is_baseline)}
    assert found["triton"]["best_over_this"] == 1.5
    assert found["triton"]["best_over_this_in_graph"] == 4.0
    assert "best_over_this" not in found["careful + compile"]
    assert "\n+" not in tables.prose("careful + compile, " * 40)  # Markdown would make a list of it
    heading = tables.describe(list(found.values()), [tables.BEST, tables.NAIVE]).splitlines()[0]
    assert "best/this" in heading and "naive/this" not in heading


def test_one_student_has_a_loss_in_every_way() -> None:
    z, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, 2, 2])
    expected = torch.nn.functional.cross_entropy(z, target)
    for losses in (peers.naive, peers.careful):
        torch.testing.assert_close(losses([z], target), expected.view(1))
    with pytest.raises(peers.AbsentError, match="one student"):
        peers.contestant("quack", torch.device("cpu"), 2)
    with pytest.raises(peers.AbsentError, match="need a GPU"):
        peers.contestant("quack", torch.device("cpu"), 1)


def test_who_could_disturb_the_others_has_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        if "--json" not in command:  # of git, or of the resident set
            return SimpleNamespace(stdout="1000\n")
        assert command[command.index("--shape") + 1] == "2x4x8x4"
        name = command[command.index("--contestants") + 1]
        started.append(name)
        if name == "careful":
            return SimpleNamespace(stderr="Traceback\nKilled\n")
        row = {"name": name, "median_ms": 6.0, "grad_error": 0.0}
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"contestants": [row]}))
        return SimpleNamespace(stderr="")

    monkeypatch.setattr(bench_linear_loss, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_linear_loss, "predicted", lambda *_: 5)
    monkeypatch.setattr(subprocess, "run", run)
    threads = torch.get_num_threads()
    file = tmp_path / "report.json"
    command = ["--shape", "2x4x8x4", "--dtype", "float32", "--budget", "0", "--json", str(file)]
    names = ["naive", "careful", "mutual_loss"]
    status = bench_linear_loss.main(
        [*command, "--contestants", *names, "--alone", "naive", "careful"]
    )
    torch.set_num_threads(threads)
    assert started == ["naive", "careful"]
    assert status == 1 and "- careful: FAILED, its process ended: Killed" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(file.read_text())["contestants"]}
    assert rows["naive"]["median_ms"] == 6 and rows["mutual_loss"]["rounds"] >= 3
