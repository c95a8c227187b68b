"""The two files of a model folder: facts in JSON, and tensors whose hash they carry."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lymphfeat.errors import ModelError, first_line
from lymphfeat.features.backbones import weights_sha256
from lymphfeat.runtime.files import replace_file
from lymphfeat.runtime.strict_json import json_text, parse_json
from lymphfeat.runtime.versions import refuse_newer

T = TypeVar("T")
_ROOM = 2**28  # bytes that a network may take in the making …
_TIMES = 4  # … besides so many times those of its file


def write_model(network: nn.Module, tensors: Path, content: Mapping[str, Any], facts: Path) -> None:
    """Write a network's tensors and the facts of a model to a folder, creating it if needed."""
    tensors.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    replace_file(tensors, lambda path: path.write_bytes(save(state)))
    text = json_text(content, indent=2)
    replace_file(facts, lambda path: path.write_text(text, encoding="utf-8"))


def read_facts(path: Path, format: str, version: int, *, hint: str) -> dict[str, Any]:
    """Read the facts of a model; `hint` says what to do where there are none.

    Raises ModelError for a missing or damaged file, one of another format, or of a later version.
    """
    if not path.is_file():
        raise ModelError(
            f"model (={path.parent}) must be a folder with {path.name}; got none; {hint}."
        )
    try:
        facts = parse_json(path.read_bytes())
    except ValueError as error:
        raise ModelError(
            f"{path}: is not valid JSON ({error}); copy the model folder again."
        ) from None
    if not isinstance(facts, dict) or facts.get("format") != format:
        raise ModelError(f"{path}: is JSON but not a lymphfeat model.")
    refuse_newer(path, facts.get("format_version"), version, ModelError)
    return facts


def build_blank(
    content: Mapping[str, Any], build: Callable[[Mapping[str, Any]], T], facts: Path, tensors: Path
) -> T:
    """Build a model from its facts, to be filled from its tensors, of which only the size is read.

    Raises ModelError for damaged facts, and for such as speak of a network that the tensors cannot
    fill: before it takes the memory.
    """
    if not tensors.is_file():
        raise ModelError(
            f"{tensors}: cannot be read as this model's tensors (there is no such file); copy the "
            "model folder again or retrain the model."
        )
    try:
        with _Limited(_ROOM + _TIMES * tensors.stat().st_size):
            return build(content)
    except Exception as error:  # damaged facts fail in as many ways as there are of them
        raise ModelError(
            f"{facts}: is damaged ({type(error).__name__}: {first_line(error)}); copy the model "
            "folder again or make the model again."
        ) from None


class _Limited(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ValueError where tensors are made that take more than so many bytes together."""

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shape = args[0] if args else None  # of what makes tensors; others begin with a tensor
        if isinstance(shape, (list, tuple)) and all(isinstance(side, int) for side in shape):
            self._left -= 4 * math.prod(shape)
            if self._left < 0:
                raise ValueError("its network is larger than its tensors")
        return func(*args, **(kwargs or {}))


def load_tensors(network: nn.Module, path: Path, sha256: str, *, facts: str) -> None:
    """Load a network's tensors and check them by the hash in the file of `facts` beside them.

    Raises ModelError.
    """
    try:
        network.load_state_dict(load_file(path))
    except Exception as error:  # damaged tensors fail in as many ways as there are libraries
        raise ModelError(
            f"{path}: cannot be read as this model's tensors ({first_line(error)}); "
            "copy the model folder again or retrain the model."
        ) from None
    if weights_sha256(network) != sha256:
        raise ModelError(
            f"{path}: tensors must be those that {facts} was written with; got others. "
            "Copy both files of the model together."
        )
