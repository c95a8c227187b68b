"""What a path holds: a store, a run, a model or weights, and whether it is whole."""

from pathlib import Path
from typing import Any

from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.run_provenance import CONFIG_FILE, RUN_FILES, SUMMARY_FILE, check_version
from lymphfeat.features.shipped_weights import find_shipped_weights
from lymphfeat.features.store import FeatureStore
from lymphfeat.runtime.files import find_checkpoints, find_kept, recover, unfinished_folder
from lymphfeat.runtime.strict_json import parse_json


def inspect(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Describe what is at `path`; raises LymphfeatError when it is nothing of lymphfeat's.

    Of a store, the mark of completeness, the recipe, the sizes and the first and last map are
    checked; with `verify` every map is. A model's tensors are always checked by their hash.
    """
    recover(path)
    if path.suffix == ".safetensors" or find_shipped_weights(str(path)):
        return _describe_network(path)
    if path.is_file() or path.suffix in (".h5", ".hdf5"):
        return _describe_store(path, verify)
    if not path.is_dir():
        unfinished = unfinished_folder(path)
        hint = ""
        if unfinished.is_dir():
            hint = f"; found an unfinished one, {unfinished.name}, which the same command finishes"
        raise SettingsError(
            f"path (={path}) must be a feature store, a run or a model folder{hint}."
        )
    if path.suffix == ".partial":
        return _describe_unfinished(path.with_suffix(""))
    if (path / CONFIG_FILE).is_file():
        return _describe_run(path)
    return _describe_network(path)


def _describe_network(path: Path) -> dict[str, Any]:
    from lymphfeat.model.descriptions import describe  # torch takes seconds; stores need none

    return describe(path)


def _describe_store(path: Path, verify: bool) -> dict[str, Any]:
    store = FeatureStore.open(path)
    if verify:
        store.verify()
    else:
        store.check()
    return {"kind": "feature store", "whole": True, "verified": verify, **store.describe()}


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
        config = parse_json((path / CONFIG_FILE).read_text(encoding="utf-8"))
        check_version(path, config)
        summary = parse_json((path / SUMMARY_FILE).read_text(encoding="utf-8"))
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
    except SettingsError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is a damaged run ({error}); fit it again.") from None
