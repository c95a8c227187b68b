"""What a path holds: a store, a run, a model or weights, and whether it is whole."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lymphfeat.cohort.provenance import Provenance
from lymphfeat.errors import SettingsError
from lymphfeat.features.backbones import (
    SHIPPED,
    SHIPPED_PATH,
    read_facts,
    read_provenance,
    read_weights,
)
from lymphfeat.features.store import FeatureStore
from lymphfeat.fitting import RUN_FILES
from lymphfeat.model.ensemble import MEMBERS_FILE, Ensemble
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE, Model
from lymphfeat.runtime.files import find_checkpoints, find_kept, recover, unfinished_folder

_LONG = ("provenance", "patients", "trained_on", "validated_on")  # lists of patients, counted here


def inspect(path: Path) -> dict[str, Any]:
    """Describe what is at `path`; raises LymphfeatError when it is nothing of lymphfeat's.

    A store's rows and a model's tensors are read and checked against their checksums.
    """
    recover(path)
    if path.suffix == ".safetensors" or str(path) == SHIPPED:
        return _describe_weights(SHIPPED_PATH if str(path) == SHIPPED else path)
    if path.is_file() or path.suffix in (".h5", ".hdf5"):
        store = FeatureStore.open(path)
        store.verify()
        return {"kind": "feature store", "whole": True, **store.describe()}
    if not path.is_dir():
        unfinished = unfinished_folder(path)
        hint = f"; found an unfinished one: {unfinished.name}" if unfinished.is_dir() else ""
        raise SettingsError(
            f"path (={path}) must be a feature store, a run or a model folder{hint}."
        )
    if path.suffix == ".partial":
        return _describe_unfinished(path.with_suffix(""))
    if (path / FACTS_FILE).is_file():
        return _describe_model(path)
    if (path / FINAL_FILE).is_file():
        return _describe_final(path)
    if (path / MEMBERS_FILE).is_file():
        return _describe_members(path)
    if (path / "config.json").is_file():
        return _describe_run(path)
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
        "backbones": [asdict(source.recipe) for source in model.sources],
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
    facts = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
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
        **json.loads((path / MEMBERS_FILE).read_text(encoding="utf-8")),
        "recipe": asdict(model.recipe),
        "head": asdict(model.head_settings),
        "tta": model.tta,
    }


def _describe_unfinished(out: Path) -> dict[str, Any]:
    return {
        "kind": "unfinished result",
        "whole": False,
        "path": str(unfinished_folder(out)),
        "of": str(out),
        "checkpoints": [path.name for path in (*find_checkpoints(out), *find_kept(out))],
        "to finish it": "run the same command again",
    }


def _accuracy(row: dict[str, Any]) -> str:
    """Write a row's balanced accuracy with its corrected 95 % interval, if it has one."""
    ba = float(row["ba"])
    # Runs of older versions have no ends; under `report` the corrected width had its own name.
    half = row.get("ba_half_width_corrected", row["ba_half_width"])
    if half is None:
        return f"{ba:.3f}"
    low, high = row.get("ba_low", max(ba - half, 0)), row.get("ba_high", min(ba + half, 1))
    return f"{ba:.3f} ({low:.3f} to {high:.3f})"


def _describe_run(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        missing = [name for name in RUN_FILES if not (path / name).is_file()]
        return {
            "kind": "run",
            "whole": not missing,
            **({"missing": missing} if missing else {}),
            "path": str(path),
            "settings": config["settings"],
            "store": config["store"]["path"],
            "balanced accuracy": {row["head"]: _accuracy(row) for row in summary},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is a damaged run ({error}); fit it again.") from None
