"""Weights that a model starts from fit it or are refused, and no file of them can do harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from configs.errors import TilefleetError, UsageError
from training import models
from training.weights import initialise


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_model_starts_from_the_weights_of_a_file_but_for_its_head(tmp_path: Path, ending: str) -> None:
    trained, model = models.build("tilenet", 10, 32), models.build("tilenet", 3, 64, dropout=0)
    head = [p.clone() for p in list(model.parameters())[-2:]]
    path = str(tmp_path / f"weights.{ending}")
    (torch.save if ending == "pth" else save_file)(trained.state_dict(), path)

    initialise("tilenet", model, path)

    theirs, ours = models.backbone(trained), models.backbone(model)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(head, list(model.parameters())[-2:], strict=True))


def test_vgg16_starts_from_a_file_of_torchvisions_format(tmp_path: Path) -> None:
    with torch.device("meta"):
        published, model = models.build("vgg16", 1000, 224), models.build("vgg16", 10, 32)
    model.to_empty(device="cpu")
    path = str(tmp_path / "vgg16.pth")
    one_number_each = {
        key: torch.full((), i / 100).expand(p.shape) for i, (key, p) in enumerate(published.state_dict().items())
    }
    torch.save(one_number_each, path)
    nn.init.constant_(model.classifier[-1].weight, -1)

    initialise("vgg16", model, path)

    backbone = models.backbone(model)
    assert [round(p.flatten()[0].item() * 100) for p in backbone] == list(range(30))
    assert all((p == p.flatten()[0]).all() for p in backbone[:20])
    assert (model.classifier[-1].weight == -1).all()


def test_published_weights_without_a_network_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with torch.device("meta"):
        model = models.build("vgg16", 10, 32)
    with pytest.raises(
        TilefleetError, match=r"IMAGENET1K_V1 cannot be fetched .*copy vgg16-397923af\.pth here and give"
    ):
        initialise("vgg16", model, "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("0.bias"), "0.bias is missing"),
        (lambda state: state.update({"0.scale": torch.ones(1)}), "which has no 0.scale"),
        (
            lambda state: state.update({"0.weight": torch.ones(16, 3, 5, 5)}),
            r"0.weight is \[16, 3, 5, 5\], not \[16, 3, 3",
        ),
        (lambda state: state["3.bias"].fill_(float("nan")), "3.bias holds values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_their_first_name(tmp_path: Path, change: object, says: str) -> None:
    model = models.build("cnn", 10, 32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "other.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TilefleetError, match=says):
        initialise("cnn", model, str(tmp_path / "other.pth"))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Hostile:
    """What a pickle can do: call anything when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return Path.touch, (self.trace,)


def test_no_file_of_weights_can_run_code(tmp_path: Path) -> None:
    torch.save({"0.weight": Hostile(tmp_path / "trace")}, tmp_path / "hostile.pth")
    with pytest.raises(TilefleetError, match=r"hostile\.pth: damaged, or holds more than tensors"):
        initialise("cnn", models.build("cnn", 10, 32), str(tmp_path / "hostile.pth"))
    assert not (tmp_path / "trace").exists()


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    model = models.build("cnn", 10, 32)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:200])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0")
    for name, says in [("list.pth", "not a state dict"), ("torn.pth", "damaged"), ("torn.safetensors", "damaged")]:
        with pytest.raises(TilefleetError, match=f"{name}: {says}"):
            initialise("cnn", model, str(tmp_path / name))


def test_weights_that_are_nowhere_are_a_wrong_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model.weights: \S+none.pth: no such file; it can be .*, or nothing else"):
        initialise("cnn", models.build("cnn", 10, 32), str(tmp_path / "none.pth"))
    with torch.device("meta"):
        vgg16 = models.build("vgg16", 10, 32)
    with pytest.raises(UsageError, match=r"IMAGENET: no such file.*torchvision knows for vgg16 \(IMAGENET1K_V1"):
        initialise("vgg16", vgg16, "IMAGENET")
