"""What a model folder or a file of weights holds; each must be whole."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lymphfeat.cohort.provenance import Provenance
from lymphfeat.errors import SettingsError
from lymphfeat.features.backbones import read_facts, read_provenance, read_weights
from lymphfeat.features.shipped_weights import find_shipped_weights
from lymphfeat.model.ensemble import MEMBERS_FILE, Ensemble
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE, Model
from lymphfeat.runtime.strict_json import parse_json

_LONG = ("provenance", "patients", "trained_on", "validated_on")  # lists of patients, counted here


def describe(path: Path) -> dict[str, Any]:
    """Describe a model folder or a file of weights, after checking its tensors.

    Raises ModelError or WeightsError for a damaged one, and SettingsError for any other folder.
    """
    if not path.is_dir():
        return _describe_weights(find_shipped_weights(str(path)) or path)
    if (path / FACTS_FILE).is_file():
        return _describe_model(path)
    if (path / FINAL_FILE).is_file():
        return _describe_final(path)
    if (path / MEMBERS_FILE).is_file():
        return _describe_members(path)
    raise SettingsError(
        f"path (={path}) must hold {FACTS_FILE} (a model) or config.json (a run); got neither. "
        "If the command that writes it was interrupted, run it again."
    )


def _describe_final(path: Path) -> dict[str, Any]:
    model = FinalModel.load(path)  # refuses a model that is not whole
    return {
        "kind": "final model",
        "whole": True,
        "path": str(path),
        "row": model.row,
        "reads": ["images", *model.attributes.names],
        "compares": list(model.compares),
        "members": len(model.members),
        "backbones": [source.to_json() for source in model.sources],
        "threshold": model.threshold,
        "threshold_from": model.threshold_from,
        "figures": dict(model.figures),
        **_counted(model.facts.provenance),
    }


def _describe_weights(path: Path) -> dict[str, Any]:
    tensors = read_weights(path)
    facts = read_facts(path)
    return {
        "kind": "weights",
        "whole": all(bool(tensor.isfinite().all()) for tensor in tensors.values()),
        "path": str(path),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **{name: value for name, value in facts.items() if name not in _LONG},
        **_counted(read_provenance(path)),
    }


def _counted(provenance: Provenance) -> dict[str, int]:
    return {
        "trained_on": len(provenance.labels),
        "pretrained_on": len([key for key in provenance.images if key.id]),
    }


def _describe_model(path: Path) -> dict[str, Any]:
    model = Model.load(path)  # refuses a model that is not whole
    facts = parse_json((path / FACTS_FILE).read_text(encoding="utf-8"))
    training = {name: value for name, value in facts["training"].items() if name not in _LONG}
    facts["training"] = training | _counted(model.facts.provenance)
    return {"kind": "model", "whole": True, "path": str(path), **facts}


def _describe_members(path: Path) -> dict[str, Any]:
    """Describe k-fold members; each must be whole."""
    model = Ensemble.load(path).models[0]
    return {
        "kind": "k-fold members",
        "whole": True,
        "path": str(path),
        **parse_json((path / MEMBERS_FILE).read_text(encoding="utf-8")),
        "recipe": asdict(model.recipe),
        "head": asdict(model.head_settings),
        "tta": model.tta,
    }
