"""The two files of a model folder: facts in JSON, and tensors whose hash they carry."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lymphfeat.errors import ModelError
from lymphfeat.features.backbones import weights_sha256
from lymphfeat.runtime.files import replace_file
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.runtime.versions import refuse_newer


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
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path}: is not valid JSON ({error}); copy the model folder again."
        ) from None
    if not isinstance(facts, dict) or facts.get("format") != format:
        raise ModelError(f"{path}: is JSON but not a lymphfeat model.")
    refuse_newer(path, facts.get("format_version"), version, ModelError)
    return facts


def load_tensors(network: nn.Module, path: Path, sha256: str, *, facts: str) -> None:
    """Load a network's tensors and check them by the hash in the file of `facts` beside them.

    Raises ModelError.
    """
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path}: cannot be read as this model's tensors ({str(error).splitlines()[0]}); "
            "copy the model folder again or retrain the model."
        ) from None
    if weights_sha256(network) != sha256:
        raise ModelError(
            f"{path}: tensors must be those that {facts} was written with; got others. "
            "Copy both files of the model together."
        )
