"""The model registry, and weights that a model starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import TilefleetError, UsageError
from training import models

LEAST = {"cnn": 8, "cnn2": 2, "customnet": 22, "folder_cnn": 4, "lenet": 16, "tilenet": 8, "vgg16": 32}


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters() if p.ndim > 1]


def test_every_model_is_tested_at_its_least_tile_size() -> None:
    assert LEAST.keys() == models.BUILDERS.keys()


@pytest.mark.parametrize("classes", [2, 43])
@pytest.mark.parametrize("name", LEAST)
def test_any_tile_size_and_class_count(name: str, classes: int) -> None:
    for size in (LEAST[name], LEAST[name] + 1, 32, 64, 100, 224):
        with torch.device("meta"):
            model = models.build(name, classes, size)
            assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)


@pytest.mark.parametrize("name", LEAST)
def test_tiles_that_are_too_small_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: tiles of {LEAST[name] - 1} pixels are too small, {LEAST[name]} is"):
        models.build(name, 10, LEAST[name] - 1)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("cnn", 32, [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (500, 1024), (10, 500)]),
        ("cnn2", 32, [(32, 3, 3, 3), (32, 32, 3, 3), (512, 8192), (10, 512)]),
        ("lenet", 32, [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]),
        ("folder_cnn", 100, [(16, 3, 3, 3), (32, 16, 3, 3), (128, 20_000), (10, 128)]),
        (
            "customnet",
            64,
            [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (2048, 9216), (512, 2048), (128, 512), (10, 128)],
        ),
    ],
)
def test_layers_are_the_published_ones(name: str, size: int, expected: list[tuple[int, ...]]) -> None:
    with torch.device("meta"):
        assert shapes(models.build(name, 10, size)) == expected


def test_dropout_is_where_it_was_published() -> None:
    def rates(name: str, **arguments: float) -> list[float]:
        with torch.device("meta"):
            model = models.build(name, 10, 32, **arguments)
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    assert rates("cnn") == [0.25, 0.25]
    assert rates("cnn2") == [0.3, 0.5]
    assert rates("customnet") == [0.25, 0.5, 0.5, 0.5]
    assert rates("folder_cnn", dropout=0.8) == [0.8]
    assert rates("lenet") == []


def test_tilenet_is_as_small_as_it_says() -> None:
    model = models.build("tilenet", 10, 64)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 64))
    assert round(counter.get_total_flops() / 1e6) == 208
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 1.6
    assert shapes(models.build("tilenet", 10, 64, width=16))[0] == (16, 3, 3, 3)


def test_tilenet_learns_a_handful_of_tiles() -> None:
    torch.manual_seed(0)
    model, tiles, labels = models.build("tilenet", 4, 8, width=8), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(tiles), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(
    ("name", "size", "arguments", "says"),
    [
        ("resnet", 64, {}, "no model 'resnet'; there are cnn, cnn2, customnet, folder_cnn, lenet, tilenet, vgg16"),
        ("cnn", 64, {"depth": 3}, "model.arguments"),
        ("cnn", 64, {"dropout": 2}, "model.arguments: cnn does not take them .*dropout"),
        ("tilenet", 64, {"width": 1.5}, "width is a number of channels, not 1.5"),
        ("tilenet", 64, {"width": 0}, "width is a number of channels, not 0"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, size: int, arguments: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says), torch.device("meta"):
        models.build(name, 10, size, **arguments)


@pytest.mark.parametrize("name", sorted(set(LEAST) - {"vgg16"}))
def test_the_backbone_is_all_but_the_head(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name, 7, 32)
    head = list(model.parameters())[-2:]
    backbone = models.backbone(model)
    assert [p.shape[0] for p in head] == [7, 7]
    assert not any(p is h for p in backbone for h in head)
    assert len(backbone) == len(list(model.parameters())) - 2


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_model_starts_from_the_weights_of_a_file_but_for_its_head(tmp_path: Path, ending: str) -> None:
    trained, model = models.build("tilenet", 10, 32), models.build("tilenet", 3, 64, dropout=0)
    head = [p.clone() for p in list(model.parameters())[-2:]]
    path = str(tmp_path / f"weights.{ending}")
    (torch.save if ending == "pth" else save_file)(trained.state_dict(), path)

    models.initialise("tilenet", model, path)

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

    models.initialise("vgg16", model, path)

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
        models.initialise("vgg16", model, "IMAGENET1K_V1")


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
        models.initialise("cnn", model, str(tmp_path / "other.pth"))
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
        models.initialise("cnn", models.build("cnn", 10, 32), str(tmp_path / "hostile.pth"))
    assert not (tmp_path / "trace").exists()


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    model = models.build("cnn", 10, 32)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:200])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0")
    for name, says in [("list.pth", "not a state dict"), ("torn.pth", "damaged"), ("torn.safetensors", "damaged")]:
        with pytest.raises(TilefleetError, match=f"{name}: {says}"):
            models.initialise("cnn", model, str(tmp_path / name))


def test_weights_that_are_nowhere_are_a_wrong_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model.weights: \S+none.pth: no such file; it can be .*, or nothing else"):
        models.initialise("cnn", models.build("cnn", 10, 32), str(tmp_path / "none.pth"))
    with torch.device("meta"):
        vgg16 = models.build("vgg16", 10, 32)
    with pytest.raises(UsageError, match=r"IMAGENET: no such file.*torchvision knows for vgg16 \(IMAGENET1K_V1"):
        models.initialise("vgg16", vgg16, "IMAGENET")
