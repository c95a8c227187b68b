"""Backbones: spatial maps from every family, weights files, and what is refused."""

import copy
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lymphfeat.cohort.images import NORMALIZATIONS, VIEWS
from lymphfeat.errors import SettingsError, WeightsError
from lymphfeat.features.backbones import (
    Backbone,
    build_backbone,
    folds_batchnorm,
    load_weights,
    read_facts,
    ready_to_run,
    weights_sha256,
)
from lymphfeat.features.shipped_weights import find_shipped_weights
from lymphfeat.features.views import flip_view, normalize, parse_views
from lymphfeat.runtime.devices import (
    autocast,
    choose_device,
    choose_precision,
    has_fast_bfloat16,
    precision_name,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    return build_backbone("test_resnet", image_size=32)[0]


# --- maps ----------------------------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("test_resnet", (96, 2, 2)),
        ("test_efficientnet", (256, 2, 2)),
        ("test_convnext", (64, 2, 2)),
        ("test_vit", (64, 4, 4)),
        ("test_vit2", (64, 4, 4)),
        ("swin_s3_tiny_224", (768, 2, 2)),
    ],
)
@torch.inference_mode()
def test_every_family_gives_maps(name: str, shape: tuple[int, int, int]) -> None:
    backbone, weights = build_backbone(name, image_size=64)
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert maps.shape == (2, *shape)
    assert backbone.channels == shape[0]
    assert not backbone.training
    assert weights.source == "none"
    assert weights.sha256 == weights_sha256(backbone.model)


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_vit"])
@torch.inference_mode()
def test_weights_rounded_once_give_the_maps_of_autocast(name: str) -> None:
    backbone, images = build_backbone(name, image_size=64)[0].eval(), torch.rand(2, 3, 64, 64)
    assert not folds_batchnorm(backbone)
    with autocast(CPU, torch.bfloat16):
        expected = backbone(images.contiguous(memory_format=torch.channels_last))
        ready = ready_to_run(copy.deepcopy(backbone), torch.bfloat16, CPU)
        assert torch.equal(ready(images.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.seconds
@pytest.mark.parametrize("name", ["test_resnet", "resnet18d", "seresnet18", "skresnet18"])
@torch.inference_mode()
def test_folded_batchnorms_change_rounding_alone(name: str) -> None:
    backbone, generator = (
        build_backbone(name, image_size=64)[0].eval(),
        torch.Generator().manual_seed(0),
    )
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):  # as after training
            for values in (part.running_var, part.weight, part.running_mean, part.bias):
                assert values is not None
                values.uniform_(0.5, 1.5, generator=generator)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    expected = backbone(images)
    ready = ready_to_run(copy.deepcopy(backbone), torch.float32, CPU)
    assert folds_batchnorm(backbone)
    norms = [
        sum(isinstance(part, nn.BatchNorm2d) for part in x.modules()) for x in (ready, backbone)
    ]
    assert norms[0] < norms[1]
    assert (ready(images) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_tokens_lie_where_their_patches_are() -> None:
    backbone, _ = build_backbone("test_vit", image_size=64)
    backbone.model.blocks = torch.nn.Identity()  # patches do not mix: each token is one place's
    plain = torch.zeros(1, 3, 64, 64)
    marked = plain.clone()
    marked[..., 16:32, 48:64] = 1  # row 1, column 3 of the 16-pixel grid
    changed = (backbone(marked) - backbone(plain)).abs().sum(1)[0]  # (h, w)
    assert changed.nonzero().tolist() == [[1, 3]]


def test_output_stride() -> None:
    backbone, _ = build_backbone("test_resnet", image_size=64, output_stride=8)
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 96, 8, 8)
    with pytest.raises(SettingsError, match=re.escape("output_stride (=8) and image size 64")):
        build_backbone("test_vit", image_size=64, output_stride=8)


def test_random_weights_come_from_their_seed() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_backbone("test_resnet", seed=s)[1].sha256 for s in (0, 0, 1))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_backbone_suggests() -> None:
    message = "backbone (=resnet81) must be a timm model; did you mean resnet"
    with pytest.raises(SettingsError, match=re.escape(message)):
        build_backbone("resnet81")
    with pytest.raises(SettingsError, match=re.escape("timm.list_models() names them")):
        build_backbone("#")


def test_crop_that_does_not_fit_the_grid() -> None:
    with pytest.raises(SettingsError, match=re.escape("backbone (=test_coatnet)")):
        build_backbone("test_coatnet", image_size=50)


# --- weights -------------------------------------------------------------------------------------


def as_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(state, path)
    return path


def as_pth(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".pth")
    torch.save(state, path)
    return path


def as_checkpoint(state: dict[str, Tensor], path: Path) -> Path:
    return as_pth({"state_dict": state, "epoch": 3}, path)  # type: ignore[dict-item]


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


@pytest.mark.parametrize("save", [as_safetensors, as_pth, as_checkpoint])
def test_loads_weights_without_their_classifier(
    save: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path
) -> None:
    trained: Any = timm.create_model("test_resnet", num_classes=7)
    state = trained.state_dict()
    assert "fc.weight" in state
    path = save(state, tmp_path / "cells")
    backbone, weights = build_backbone("test_resnet", weights=str(path), image_size=32)
    assert weights.source == path.name
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert weights.sha256 != build_backbone("test_resnet", image_size=32)[1].sha256
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(backbone(images), trained.eval().forward_features(images))


def test_the_hash_is_of_the_weights_not_the_file(tmp_path: Path, resnet: Backbone) -> None:
    state = resnet.model.state_dict()
    hashes = {
        build_backbone("test_resnet", weights=str(path), image_size=32)[1].sha256
        for path in (as_safetensors(state, tmp_path / "a"), as_pth(state, tmp_path / "b"))
    }
    assert hashes == {weights_sha256(resnet.model)}


def test_half_weights_become_float32(tmp_path: Path, resnet: Backbone) -> None:
    path = as_safetensors(half(resnet.model.state_dict()), tmp_path / "half")
    backbone, _ = build_backbone("test_resnet", weights=str(path), image_size=32)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_misfits_are_named(tmp_path: Path) -> None:
    backbone, _ = build_backbone("test_resnet", image_size=32)
    before = weights_sha256(backbone.model)
    state = dict(backbone.model.state_dict())
    first, second, *others = (key for key in state if key.endswith("weight"))
    del state[first]
    state[second] = state[second][:1].clone()
    state.update({f"extra.{n}": torch.zeros(1) for n in range(7)})
    path = as_safetensors(state, tmp_path / "misfit")
    with pytest.raises(WeightsError) as caught:
        load_weights(backbone, path)
    assert str(caught.value) == (
        f"{path}: keys must be those of timm's test_resnet; got 1 missing ({first}); "
        "7 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4, … 2 more); "
        f"1 reshaped ({second}). Choose the --backbone these weights were trained for."
    )
    assert weights_sha256(backbone.model) == before
    assert others


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"no weights", "cannot be read as weights (no state dict of tensors alone); it"),
        ("w.safetensors", b"no weights", "cannot be read as weights ("),
        ("w.pth", b"", "cannot be read as weights ("),
        ("w.pth", None, "must be bloodcells, none, imagenet or an existing file; got no such file"),
    ],
)
def test_unreadable_weights(tmp_path: Path, name: str, content: Any, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        build_backbone("test_resnet", weights=str(tmp_path / name), image_size=32)
    assert str(tmp_path / name) in str(caught.value)


def test_weights_that_are_no_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "settings.pth")
    for name in ("list.pth", "settings.pth"):
        with pytest.raises(WeightsError, match="must hold a state dict of tensors"):
            build_backbone("test_resnet", weights=str(tmp_path / name), image_size=32)


def test_imagenet_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, *, pretrained: bool, **options: Any) -> Any:
        if pretrained:
            raise OSError("We couldn't connect to the hub.\nTraceback and more")
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    message = "weights (=imagenet) of test_resnet could not be loaded (We couldn't connect to the"
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        build_backbone("test_resnet", weights="imagenet")
    assert "--weights PATH" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- pixels, views, devices ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalize_is_the_formula(name: str) -> None:
    constants = NORMALIZATIONS[name]
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    before = pixels.clone()
    mean, std = np.array(constants.mean), np.array(constants.std)
    expected = (pixels.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(normalize(pixels, constants), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pixels, before)


def test_views_flip_the_right_axes() -> None:
    image = torch.tensor([[1, 2], [3, 4]])
    flipped = {view: flip_view(image, view).tolist() for view in VIEWS}
    assert flipped == {
        "identity": [[1, 2], [3, 4]],
        "hflip": [[2, 1], [4, 3]],
        "vflip": [[3, 4], [1, 2]],
        "both": [[4, 3], [2, 1]],
    }


def test_views_are_counted() -> None:
    assert parse_views(3) == ("identity", "hflip", "vflip")
    for count in (0, 5):
        with pytest.raises(SettingsError, match=re.escape(f"views (={count}) must be 1 to 4")):
            parse_views(count)


def test_devices_and_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == choose_device("cpu") == cpu
    with pytest.raises(
        SettingsError, match=re.escape("device (=cuda) must be available; got none")
    ):
        choose_device("cuda")
    assert choose_precision("float32", cpu) == torch.float32
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(SettingsError, match=re.escape("precision (=float16) must be auto")):
        choose_precision("float16", cpu)


def test_auto_is_bfloat16_where_the_processor_computes_it(
    auto_precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert precision_name(choose_precision("auto", cpu)) == auto_precision
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=there: there)
        assert has_fast_bfloat16(cpu) == there


# --- shipped weights -----------------------------------------------------------------------------

VERSIONS = ("bloodcells-v1", "bloodcells-v2")  # the last is the default


def test_shipped_weights_are_the_default_of_resnet18() -> None:
    _, default = build_backbone("resnet18")
    _, named = build_backbone("resnet18", weights="bloodcells")
    assert default == named
    assert default.source == VERSIONS[-1]
    assert build_backbone("test_resnet")[1].source == "none"


@pytest.mark.parametrize("version", VERSIONS)
def test_shipped_weights_are_what_their_card_says(version: str) -> None:
    path = find_shipped_weights(version)
    assert path is not None
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() in card
    _, loaded = build_backbone("resnet18", weights=version)
    assert loaded.source == version
    assert loaded.sha256 in card
    assert len(content) <= 24e6
    assert path.with_suffix(".csv").is_file()
    assert read_facts(path)["recipe"]["method"] in card.lower()


def test_shipped_weights_for_another_backbone() -> None:
    with pytest.raises(WeightsError, match=re.escape("must be used with backbone resnet18")):
        build_backbone("resnet34", weights="bloodcells")
