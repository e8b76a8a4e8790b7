"""Networks for retrieval, and weights to start from."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from run_cases import facts_of_three_classes
from torch import nn

from dml_fast.errors import UserError
from dml_fast.models import create_model, model_names
from dml_fast.models.embedding import EmbeddingNet, create_embedding_net
from dml_fast.models.pretrained import check_pretrained, load_pretrained
from dml_fast.runs.weights import save_student

SHAPE = {"num_classes": 7, "in_channels": 3}


@pytest.mark.parametrize("name", model_names())
def test_a_neck_takes_the_place_of_every_networks_classifier(name: str) -> None:
    if name.startswith("wrn_28"):
        pytest.skip("as wrn_16_4, and seconds slower")
    torch.manual_seed(0)
    net = create_embedding_net(name, image_size=(32, 16), **SHAPE)
    x = torch.randn(4, 3, 32, 16)
    features, logits = net.features_and_logits(x)
    assert features.shape == (4, net.num_features) and logits.shape == (4, 7)
    assert net.training and all(m.training for m in net.modules())
    assert net.classifier.bias is None
    assert not net.neck.bias.requires_grad and not net.neck.bias.any()
    plain = create_model(name, image_size=(32, 16), **SHAPE)
    shared = sum(p.numel() for p in plain.parameters()) - sum(
        p.numel() for p in net.backbone.parameters()
    )
    assert shared == 7 * net.num_features + 7  # the classifier, and nothing else


def test_embeddings_are_what_the_classifier_sees() -> None:
    torch.manual_seed(0)
    net = create_embedding_net("resnet8", image_size=16, **SHAPE).eval()
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.embed(x) @ net.classifier.weight.T)
        features = net.features_and_logits(x)[0]
        torch.testing.assert_close(net.neck(features), net.embed(x))


def test_building_one_changes_no_statistics() -> None:
    net = create_embedding_net("resnet8", image_size=16, **SHAPE)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 0


class Odd(nn.Module):
    """Ends in something that is not a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x).mean((2, 3))
        return out


def odd(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> Odd:
    return Odd()


def test_a_network_without_a_classifier_is_refused() -> None:
    with pytest.raises(UserError, match="cannot embed: its last linear layer is not a classifier"):
        create_embedding_net(f"{__name__}:odd", image_size=8, **SHAPE)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


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
    save_student(path, first.state_dict(), "resnet8", facts_of_three_classes(retrieval=True))
    torch.manual_seed(9)
    second = create_embedding_net("resnet8", image_size=16, num_classes=3, in_channels=3)
    load_pretrained(second, str(path), "resnet8")
    assert states_equal(first.backbone, second.backbone)


def test_unused_tensors_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, net = networks()
    torch.save(source.state_dict() | {"other.weight": torch.ones(2)}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "dml_fast"):
        load_pretrained(net, str(tmp_path / "w.pth"), "resnet8")
    assert "3 tensors of" in caplog.text  # and the old classifier's two


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    source, _ = networks()
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path)
    other = create_embedding_net("resnet14", image_size=16, **SHAPE)
    with pytest.raises(UserError, match=r"w.pth does not fit resnet14: \d+ of \d+ tensors"):
        load_pretrained(other, str(path), "resnet14")


class Code:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run!",)


def test_bad_files_are_refused_and_run_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, net = networks()
    with pytest.raises(UserError, match=r"none.pth does not exist: give timm, or a file"):
        check_pretrained(str(tmp_path / "none.pth"), ["resnet8"])
    (tmp_path / "w.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"of no known kind: give timm, or a file that ends in"):
        check_pretrained(str(tmp_path / "w.h5"), ["resnet8"])
    with pytest.raises(UserError, match="has no weights for resnet8: give --arch timm:NAME"):
        check_pretrained("timm", ["resnet50", "resnet8"])
    attack = tmp_path / "attack.pth"
    torch.save({"x": Code()}, attack)
    with pytest.raises(UserError, match="objects that could run code"):
        load_pretrained(net, str(attack), "resnet8")
    assert "run!" not in capsys.readouterr().out
    for name, content in (("a.pth", b"nonsense"), ("a.safetensors", b"nonsense"), ("b.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"damaged|could run code"):
            load_pretrained(net, str(tmp_path / name), "resnet8")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_pretrained(net, str(tmp_path / "list.pt"), "resnet8")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(UserError, match=r"p.pt"):
        load_pretrained(net, str(tmp_path / "p.pt"), "resnet8")
    assert "run!" not in capsys.readouterr().out


@pytest.mark.zoo
def test_timms_networks_embed_and_resnet50_is_timms() -> None:
    net = create_embedding_net("resnet50", image_size=(64, 32), **SHAPE)
    assert net.num_features == 2048
    assert net.features_and_logits(torch.randn(2, 3, 64, 32))[1].shape == (2, 7)
    small = create_embedding_net("timm:mobilenetv3_small_050", image_size=64, **SHAPE)
    assert small(torch.randn(2, 3, 64, 64)).shape == (2, 7)
