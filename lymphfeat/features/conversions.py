"""Weights of other makers as state dicts with timm's keys.

`CONVERSIONS` is the table: each knows its keys and changes them, or leaves them to the next and at
last to timm's own conversion of the architecture (DINOv2, DINOv3, CLIP, …), which also interpolates
position embeddings to the size asked for. What is dropped is named here; any other key that timm
does not have is an error of whoever loads the result.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """How one maker's keys become timm's, or nearer to them."""

    knows: Callable[[State], bool]
    convert: Callable[[State, nn.Module], State]


def as_timm(state: State, model: nn.Module) -> State:
    """Convert a state dict for a timm model, unless it already fits."""
    if _fits(state, model):
        return state
    for conversion in CONVERSIONS:
        if conversion.knows(state):
            state = conversion.convert(state, model)
    return state if _fits(state, model) else _as_timm_does(state, model)


def _fits(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    expected = model.state_dict()
    return set(state) == set(expected) and all(
        value.shape == expected[key].shape for key, value in state.items()
    )


# --- networks inside others: DinoBloom, DINO, distributed training --------------------------------

_WRAPPERS = ("module.", "backbone.")  # DinoBloom's teacher, DataParallel
_HEADS = ("dino_head.", "ibot_head.", "head.", "projector.")  # of self-supervision


def _is_wrapped(state: State) -> bool:
    return any(key.startswith(_WRAPPERS) for key in state)


def _unwrap(state: State, model: nn.Module) -> State:
    """Take the network out of its wrappers; drop what self-supervision put beside it."""
    for prefix in _WRAPPERS:
        if any(key.startswith(prefix) for key in state):
            state = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if not key.startswith(_HEADS)
            }
    return state


# --- DINOv2: blocks in chunks ---------------------------------------------------------------------

_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")  # blocks.<chunk>.<block, counted from the first>.


def _is_chunked(state: State) -> bool:
    return "cls_token" in state and any(map(_CHUNKED.match, state))


def _join_chunks(state: State, model: nn.Module) -> State:
    return {_CHUNKED.sub(r"blocks.\1.", key): value for key, value in state.items()}


# --- EfficientNet: the keys of the PyTorch port that the Lite weights were made with --------------

_LITE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}


def _is_efficientnet_port(state: State) -> bool:
    return "_conv_stem.weight" in state


def _from_efficientnet_port(state: State, model: nn.Module) -> State:
    """Number blocks by stage; the first stage's, without expansion, have names of their own."""
    stages: Any = model.blocks
    places = [(i, j) for i, stage in enumerate(stages) for j in range(len(stage))]

    def renamed(key: str) -> str:
        parts = key.split(".")
        if parts[0] != "_blocks":
            return ".".join([_LITE.get(parts[0], parts[0]), *parts[1:]])
        stage, place = places[int(parts[1])]
        names = _FIRST if stage == 0 else _OTHER
        return ".".join([f"blocks.{stage}.{place}", names[parts[2]], *parts[3:]])

    return {renamed(key): value for key, value in state.items() if not key.startswith("_fc.")}


# --- timm's own -----------------------------------------------------------------------------------


def _as_timm_does(state: State, model: nn.Module) -> State:
    """Apply the conversion that timm has for the architecture, if it has one."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it skips
        try:
            converted: State = dict(convert(dict(state), model))
        except (KeyError, AttributeError, RuntimeError, ValueError, TypeError):
            return state  # not what it knows: the keys will be named
    return converted


CONVERSIONS = (
    Conversion(_is_wrapped, _unwrap),
    Conversion(_is_chunked, _join_chunks),
    Conversion(_is_efficientnet_port, _from_efficientnet_port),
)
