"""A feature store, extracted again and compared by patient."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from lymphfeat.cohort.csv_rows import name_some
from lymphfeat.cohort.splits import Split
from lymphfeat.errors import LymphfeatError, SettingsError, StoreError
from lymphfeat.extraction import INCIDENTAL, backbones_of, extract
from lymphfeat.features.store import FeatureSet, FeatureStore
from lymphfeat.finetuning.backbones import BACKBONE
from lymphfeat.repetition.comparison import Repetition, check_circumstances, list_changes
from lymphfeat.repetition.place import Here, ReadAs
from lymphfeat.runtime.differences import FileDifference, Values, largest_difference
from lymphfeat.runtime.files import check_file, check_folder
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.progress import Progress
from lymphfeat.settings import BackboneSettings, EndToEndSettings, ExtractSettings, HeadSettings

_SHOWN = 5


def repeat_store(
    path: Path, out: Path, here: Here, *, force: bool, progress: Progress
) -> Repetition:
    """Extract the maps of the same images with the same weights, fine-tuned again if they were."""
    store = FeatureStore.open(path)
    if store.is_imported:
        raise SettingsError(
            f"store (={path}) must be one of `lymphfeat extract`; imported features are made again "
            "by `lymphfeat import`, with another --out."
        )
    check_file(out, force=force)
    recorded = _Recorded.read(store, here)
    settings = replace(
        recorded.settings,
        backbone=here.weights_of(
            recorded.settings.backbone, recorded.weights, recorded.weights_sha256, path
        ),
        **here.computing(recorded.computed, recorded.settings),
    )
    cohort = here.load_cohort(path, recorded.cohort, settings.backbone.crop, progress)
    if out.exists():
        _forget_backbones(out, recorded.splits)
    again = extract(cohort, out, settings, splits=recorded.splits, force=force, progress=progress)
    return Repetition(
        result=path,
        out=out,
        files=tuple(compare_stores(store, again)),
        changed=tuple(list_changes(recorded.computed, again.origin["computed"])),
    )


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a store says of how it was made."""

    settings: ExtractSettings
    weights: str  # their name
    weights_sha256: str
    splits: Sequence[Split]
    cohort: ReadAs
    computed: Mapping[str, Any]

    @classmethod
    def read(cls, store: FeatureStore, here: Here) -> "_Recorded":
        """Read it; raises StoreError for a damaged store, SettingsError for one of old versions."""
        recipe, origin = store.recipe, store.origin
        try:
            return cls(
                weights=str(recipe["weights"]),
                weights_sha256=str(recipe["weights_sha256"]),
                settings=ExtractSettings(
                    backbone=_backbone(store, here),
                    views=len(recipe["views"]),
                    precision=recipe["precision"],
                    batch_size=recipe["batch_size"],
                    finetune=_finetuning(recipe["finetune"]) if "finetune" in recipe else None,
                    device=recipe["device"],
                    deterministic=recipe.get("deterministic", False),
                ),
                splits=_splits(store),
                cohort=ReadAs.of(
                    store.ids,
                    dict(origin.get("reading", {})),
                    recipe["cohort"],
                    left_out="left_out" in recipe,
                ),
                computed=check_circumstances(_computed(store)),
            )
        except LymphfeatError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{store.path}: is damaged ({error}); extract it again with --force."
            ) from None


def _backbone(store: FeatureStore, here: Here) -> BackboneSettings:
    recipe = store.recipe
    seed = store.origin.get("weights_seed") if here.seed is None else here.seed
    if seed is None and recipe["weights"] == "none":
        raise SettingsError(
            f"store (={store.path}) has random weights, and does not say of which seed; name it "
            "with --seed (0 unless you chose another)."
        )
    field = recipe.get("field_um")
    return BackboneSettings(
        backbone=recipe["backbone"],
        weights=recipe["weights"],
        crop=recipe["crop"],
        field_um=field,
        um_per_px=field and field / recipe["crop"],
        normalization=recipe["normalization"]["name"],
        stain_normalization=recipe.get("stain_normalization", "none"),
        output_stride=recipe["output_stride"],
        weights_seed=seed or 0,
        **recipe.get("layout", {}),
    )


def _finetuning(recipe: Mapping[str, Any]) -> EndToEndSettings:
    own = {name: value for name, value in recipe.items() if not name.startswith("splits")}
    return EndToEndSettings(**{**own, "head": HeadSettings(**recipe["head"])})


def _splits(store: FeatureStore) -> list[Split]:
    """Return the splits that backbones were fine-tuned for, in their order."""
    splits = {split.id: split for split in store.splits}
    if splits and "splits" not in store.origin:
        raise SettingsError(
            f"store (={store.path}) must say in which order its backbones were fine-tuned; earlier "
            "versions did not. Extract it again with the same --splits, to another --out."
        )
    return [splits[id] for id in store.origin["splits"]] if splits else []


def _computed(store: FeatureStore) -> Mapping[str, Any]:
    """Return where and with what it was computed; stores of earlier versions say little."""
    if "computed" in store.origin:
        return cast(Mapping[str, Any], store.origin["computed"])
    recipe = store.recipe
    versions = {name: recipe["versions"].get(name) for name in ("torch", "timm")}
    threads = recipe.get("threads")
    return {
        "device": recipe["device"],
        **({} if threads is None else {"threads": threads}),
        "versions": versions,
    }


def _forget_backbones(out: Path, splits: Sequence[Split]) -> None:
    """Remove what an earlier repeat has trained: it would be taken as it is."""
    folders = [backbones_of(out) / split.id for split in splits]
    for folder in folders:
        check_folder(folder, BACKBONE, force=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


# --- comparison ----------------------------------------------------------------------------------


def compare_stores(first: FeatureStore, second: FeatureStore) -> list[FileDifference]:
    """Compare the parts of two stores, by patient.

    Of a part that differs, `where` names the patients, that with the largest difference first.
    Where and with what they were computed does not count, nor what an old store does not hold.
    """
    both = (first, second)
    hashed = all(store.image_hashes for store in both)
    measured = all(store.statistic_names for store in both)
    parts = {
        "patients": [(_numbered(store), _clinical(store)) for store in both],
        "images": [(_rows(store), _of_images(store, hashed, measured)) for store in both],
        **{
            f"features/{name}": [(_rows(store), _maps(store, name)) for store in both]
            for name in first.feature_sets
            if name in second.feature_sets
        },
    }
    return [
        _compare_recipes(first, second),
        *(_compare_part(name, then, now) for name, (then, now) in parts.items()),
    ]


def _compare_recipes(first: FeatureStore, second: FeatureStore) -> FileDifference:
    then, now = (
        {name: value for name, value in store.recipe.items() if name not in INCIDENTAL}
        for store in (first, second)
    )
    lines = differing_fields(now, then)
    for name in sorted({*first.feature_sets, *second.feature_sets}):
        pair = [store.feature_sets.get(name) for store in (first, second)]
        lines += [f"{name}: {field}" for field in _differing_facts(*pair)]
    if first.submission_ids != second.submission_ids:
        lines.append("the order of the submission")
    return FileDifference(name="recipe", same=not lines, where="; ".join(lines))


def _differing_facts(first: FeatureSet | None, second: FeatureSet | None) -> list[str]:
    """Name what is known otherwise about the maps of one name."""
    if first is None or second is None:
        return ["only one has it"]
    pairs = {
        field.name: (getattr(first, field.name), getattr(second, field.name))
        for field in fields(FeatureSet)
    }
    return [name for name, (then, now) in pairs.items() if then is not None and then != now]


Part = tuple[Mapping[str, slice], Values]  # the rows of each patient, and what is in the rows


def _compare_part(name: str, then: Part, now: Part) -> FileDifference:
    wrong: dict[str, float | None] = {}
    for id in dict.fromkeys((*then[0], *now[0])):
        largest = None  # differs in more than numbers
        if id in then[0] and id in now[0]:
            largest, _ = largest_difference(_of_patient(then, id), _of_patient(now, id))
        if largest != 0:
            wrong[id] = largest
    sizes = [np.inf if size is None else size for size in wrong.values()]
    order = [list(wrong)[place] for place in np.argsort(-np.array(sizes), kind="stable")]
    unlike = None in wrong.values()
    return FileDifference(
        name=name,
        same=not wrong,
        largest=None if unlike or not wrong else max(sizes),
        where=name_some(order, shown=_SHOWN),
    )


def _of_patient(part: Part, id: str) -> Values:
    rows, values = part
    return {name: each[rows[id]] for name, each in values.items()}


def _numbered(store: FeatureStore) -> dict[str, slice]:
    return {id: slice(number, number + 1) for number, id in enumerate(store.ids)}


def _rows(store: FeatureStore) -> dict[str, slice]:
    return {id: slice(*ends) for id, ends in zip(store.ids, pairwise(store.offsets), strict=True)}


def _clinical(store: FeatureStore) -> Values:
    return {
        str(name): column.to_numpy()
        if pd.api.types.is_numeric_dtype(column)
        else column.astype(object).fillna("").to_numpy()
        for name, column in store.table.items()
    }


def _of_images(store: FeatureStore, hashed: bool, measured: bool) -> Values:
    texts = {"name": store.image_names, **({"hash": store.image_hashes} if hashed else {})}
    statistics = store.image_statistics if measured else None
    return {
        "crc32": store.crc32,
        **{name: np.array(values, object) for name, values in texts.items()},
        **({} if statistics is None else {"statistics": statistics.to_numpy()}),
    }


def _maps(store: FeatureStore, name: str) -> Values:
    return {"map": store.features(name), "pooled": store.pooled(name)}
