"""Weights to start from: where they are found, and what is refused."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import facts_of_three_classes
from torch import Tensor, nn
from weights_cases import small, states_equal

from dml_fast import train
from dml_fast.errors import UserError
from dml_fast.models import create_model
from dml_fast.models.embedding import EmbeddingNet, create_embedding_net
from dml_fast.models.heads import Head
from dml_fast.models.pretrained import check_pretrained, load_pretrained
from dml_fast.runs.weights import save_student

SHAPE = {"num_classes": 7, "in_channels": 3}


def networks(name: str = "resnet8") -> tuple[nn.Module, EmbeddingNet]:
    """Return a plain network to start from, and an embedding one with other weights."""
    torch.manual_seed(1)
    source = create_model(name, num_classes=10, in_channels=3, image_size=16)
    return source, create_embedding_net(name, image_size=16, **SHAPE)


@pytest.mark.parametrize("form", ["bare", "state_dict", "model", "module.", "safetensors"])
def test_weights_of_a_file_are_taken_over(form: str, tmp_path: Path) -> None:
    source, net = networks()
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_student(path, state, "resnet8", facts_of_three_classes())
    elif form == "module.":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    else:
        torch.save(state if form == "bare" else {form: state, "epoch": 3}, path)
    before = net.classifier.weight.clone()
    check_pretrained(str(path), ["resnet8"])
    load_pretrained(net, str(path), "resnet8")
    for name, tensor in net.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(net.classifier.weight, before)  # the classifier is new
    plain = create_model("resnet8", image_size=16, **SHAPE)
    load_pretrained(plain, str(path), "resnet8")  # also with another number of classes
    assert torch.equal(next(plain.parameters()), next(source.parameters()))


def test_a_student_that_embeds_is_a_start_for_another(tmp_path: Path) -> None:
    _, first = networks()
    path = tmp_path / "student.safetensors"
    facts = facts_of_three_classes(retrieval=True, head=Head("bnneck"))
    save_student(path, first.state_dict(), "resnet8", facts)
    torch.manual_seed(9)
    second = create_embedding_net("resnet8", image_size=16, num_classes=3, in_channels=3)
    load_pretrained(second, str(path), "resnet8")
    assert states_equal(first.backbone, second.backbone)


def test_unused_tensors_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, net = networks()
    torch.save(source.state_dict() | {"other.weight": torch.ones(2)}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "dml_fast"):
        load_pretrained(net, str(tmp_path / "w.pth"), "resnet8")
    assert "resnet8: 42 tensors are those of" in caplog.text
    assert "new: neck.*, classifier.*" in caplog.text
    assert "not used: classifier.weight, classifier.bias, other.weight" in caplog.text


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source, _ = networks()
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path)
    other = create_embedding_net("resnet14", image_size=16, **SHAPE)
    message = (
        r"w.pth does not fit resnet14: 50 of 78 tensors differ \(blocks.1.conv1.weight is .*\); "
        r"not used: classifier.weight, classifier.bias: give weights of this architecture"
    )
    with pytest.raises(UserError, match=message):
        load_pretrained(other, str(path), "resnet14")


class Code:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run!",)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_bad_files_are_refused_and_run_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, net = networks()
    with pytest.raises(UserError, match=r"none.pth does not exist: give timm, a run or a file"):
        check_pretrained(str(tmp_path / "none.pth"), ["resnet8"])
    with pytest.raises(UserError, match="is a folder, and not one of a run"):
        check_pretrained(str(tmp_path), ["resnet8"])
    with pytest.raises(UserError, match="has no weights for resnet8: give --arch timm:NAME"):
        check_pretrained("timm", ["resnet50", "resnet8"])
    for name in ("attack.pth", "legacy.pth"):
        attack = tmp_path / name
        torch.save({"x": Code()}, attack, _use_new_zipfile_serialization=name == "attack.pth")
        with pytest.raises(UserError, match="holds no state dict"):
            load_pretrained(net, str(attack), "resnet8")
    for name, content in (
        *(("w.h5", b"x"), ("b.pt", b""), ("a.pth", b"nonsense"), ("a.safetensors", b"nonsense")),
        ("p.pt", pickle.dumps(Code(), protocol=2)),
        ("z.pth", b"PK\x03\x04"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"no file of weights|damaged"):
            load_pretrained(net, str(tmp_path / name), "resnet8")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(networks()[0], tmp_path / "network.pt")
    for name in ("list.pt", "network.pt"):
        with pytest.raises(UserError, match=r"holds no state dict: give one, such as torch.save"):
            load_pretrained(net, str(tmp_path / name), "resnet8")
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "script.pt")
    with pytest.raises(UserError, match="is a TorchScript program: give its state_dict"):
        load_pretrained(net, str(tmp_path / "script.pt"), "resnet8")
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    with pytest.raises(UserError, match="is a zip file of another program"):
        load_pretrained(net, str(tmp_path / "w.npz"), "resnet8")
    assert "run!" not in capsys.readouterr().out


def trained(net: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state after a step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


class AttributeDict(dict[str, Any]):
    """A dictionary of a class that is not here, as Lightning's."""


def prefixed(state: dict[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def lightning(state: dict[str, Tensor], optimizer: Any) -> Any:
    """Follow lightning.pytorch.trainer.connectors.checkpoint_connector."""
    return {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed(state, "model."),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {
                "best_model_score": torch.tensor(0.5),
                "dirpath": PurePosixPath("/x"),
            }
        },
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(lr=0.1, widths=[1, 2]),
    }


def timm(state: dict[str, Tensor], optimizer: Any) -> Any:
    """Follow timm.utils.checkpoint_saver."""
    return {
        "epoch": 3,
        "arch": "small",
        "state_dict_ema": {name: torch.zeros_like(tensor) for name, tensor in state.items()},
        "state_dict": state,
        "optimizer": optimizer,
        "version": 2,
        "args": argparse.Namespace(lr=0.1, out=PurePosixPath("/x")),
        "metric": np.float64(0.7),
    }


def fast_reid(state: dict[str, Tensor], optimizer: Any) -> Any:
    """Follow fastreid.utils.checkpoint."""
    own = {"pixel_mean": torch.zeros(1, 3, 1, 1), "heads.weight": torch.zeros(5, 72)}
    backbone = {name: t for name, t in state.items() if not name.startswith("fc.")}
    return {
        "model": {**own, **prefixed(backbone, "backbone.")},
        "optimizer": optimizer,
        "scheduler": {"base_lrs": [0.1], "last_epoch": 3},
        "iteration": 9,
    }


def torchreid(state: dict[str, Tensor], optimizer: Any) -> Any:
    """Follow torchreid.utils.torchtools."""
    return {
        "state_dict": prefixed(state, "module."),
        "epoch": 60,
        "rank1": np.float64(0.9),
        "optimizer": optimizer,
        "scheduler": {"milestones": defaultdict(int, {20: 1})},
    }


WILD: dict[str, Callable[[dict[str, Tensor], Any], Any]] = {
    "last.ckpt": lightning,
    "checkpoint-3.pth.tar": timm,
    "model_final.pth": fast_reid,
    "model.pth.tar-60": torchreid,
    "ddp.pt": lambda s, o: {"model_state_dict": prefixed(s, "module."), "optimizer": o},
    "compiled.bin": lambda s, _: prefixed(s, "_orig_mod."),
    "both.pth": lambda s, _: {"net": prefixed(s, "_orig_mod.module.")},
    "reversed.pth": lambda s, _: {"model": prefixed(s, "module._orig_mod.model.module.")},
    "layer.pth": lambda s, _: {n.replace("conv.", "conv._orig_mod."): t for n, t in s.items()},
    "student": lambda s, _: {"student": s, "acc": np.float32(0.5), "when": np.datetime64("2020")},
    "list.pth": lambda s, _: {"models": [prefixed(s, "net.backbone.")]},
    "array.pth": lambda s, _: s | {"history": np.arange(3.0)},
    "parameters.pth": lambda s, _: {n: nn.Parameter(t) for n, t in s.items() if "tracked" not in n},
    "params.pkl": lambda s, _: {"a": {"b": {"params": s}}},
}


@pytest.mark.compat
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4"])
@pytest.mark.parametrize("name", WILD)
def test_checkpoints_of_other_programs_load(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small(0)
    optimizer = trained(source)
    state = dict(source.state_dict())
    path = tmp_path / name
    torch.save(
        WILD[name](state, optimizer),
        path,
        _use_new_zipfile_serialization=form != "legacy",
        pickle_protocol=4 if form == "protocol 4" else 2,
    )
    monkeypatch.delattr(f"{__name__}.AttributeDict")  # it cannot be imported
    net = small(1)
    head = net.fc.weight.clone()  # type: ignore[union-attr, operator]
    check_pretrained(str(path), ["small"])
    load_pretrained(net, str(path), "small")
    for key, tensor in net.state_dict().items():
        if key.startswith("fc."):
            assert key != "fc.weight" or torch.equal(tensor, head)
        elif "tracked" not in key:
            assert torch.equal(tensor, state[key]), key


def test_the_log_says_what_is_taken_and_from_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = small(0).state_dict()
    path = tmp_path / "w.pth"
    torch.save({"epoch": 1, "net": prefixed(state, "a.") | prefixed(state, "teacher.")}, path)
    with caplog.at_level(logging.INFO, "dml_fast"):
        load_pretrained(small(1, classes=9), str(path), "small")
    [record] = caplog.records
    assert record.message == (
        f"small: 7 tensors are those of {path} under net [a.*] (also under net [teacher.*]); "
        "new: fc.*; not used: a.fc.weight, a.fc.bias, teacher.conv.weight and 8 more"
    )


class TwoHeads(nn.Module):
    """A network with a further classifier, as some vision transformers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.aux = nn.Linear(5, classes)
        self.head = nn.Linear(5, classes)


def test_a_further_head_of_another_size_is_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    source, net, same = TwoHeads(3), TwoHeads(4), TwoHeads(3)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "dml_fast"):
        load_pretrained(net, str(tmp_path / "w.pth"), "x")
        load_pretrained(same, str(tmp_path / "w.pth"), "x")
    assert torch.equal(net.body.weight, source.body.weight)
    assert torch.equal(same.aux.weight, source.aux.weight)
    assert not torch.equal(same.head.weight, source.head.weight)
    assert "x: 2 tensors" in caplog.text and "new: head.*, aux.*" in caplog.text


def test_no_network_is_half_loaded(tmp_path: Path) -> None:
    """Each tensor but the classifier's must be there; one that is not leaves all as they were."""
    state = small(0).state_dict()
    for key in state:
        torch.save({n: t for n, t in state.items() if n != key}, tmp_path / "w.pth")
        net = small(1)
        if key.startswith("fc.") or "tracked" in key:
            load_pretrained(net, str(tmp_path / "w.pth"), "small")
            continue
        before = {n: t.clone() for n, t in net.state_dict().items()}
        with pytest.raises(UserError, match=rf"1 of 7 tensors differ \({key} is missing\)"):
            load_pretrained(net, str(tmp_path / "w.pth"), "small")
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_run_continues_without_the_weights_that_it_began_with(tmp_path: Path) -> None:
    source = create_model("resnet8", num_classes=10, in_channels=1, image_size=8)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    run, weights = str(tmp_path / "run"), str(tmp_path / "w.pth")
    options = ["--arch", "resnet8", "--epochs", "1", "--train-fraction", "0.1", "--device", "cpu"]
    assert train.main([*options, "--pretrained", weights, "--out", run]) == 0
    Path(weights).unlink()
    assert train.main(["--resume", run]) == 0
    for checkpoint in Path(run).glob("*.pt"):
        checkpoint.unlink()
    with pytest.raises(UserError, match=r"w.pth does not exist"):
        train.main(["--resume", run])  # it begins anew, and needs them
