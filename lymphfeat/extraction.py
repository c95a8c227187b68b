"""Extraction: images into a store of feature maps, by one backbone or one per split."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import cohort_fingerprint, image_hashes, patient_keys
from lymphfeat.cohort.image_checks import check_images
from lymphfeat.cohort.image_statistics import NAMES
from lymphfeat.cohort.images import Crop, crop_decoder, find_normalization
from lymphfeat.cohort.provenance import refuse_seen_by_weights
from lymphfeat.cohort.splits import Split
from lymphfeat.cohort.stains import stain_normaliser
from lymphfeat.errors import CohortError, SettingsError, StoreError
from lymphfeat.features.backbones import (
    Backbone,
    LoadedWeights,
    build_from_settings,
    folds_batchnorm,
)
from lymphfeat.features.map_encoder import MapEncoder
from lymphfeat.features.pipeline import encode_files
from lymphfeat.features.store import FORMAT_VERSION, FROZEN, FeatureSet, FeatureStore, Recipe
from lymphfeat.features.store_writer import StoreWriter, clear_leavings
from lymphfeat.features.views import parse_views
from lymphfeat.finetuning.backbones import fine_tune
from lymphfeat.runtime.circumstances import circumstances
from lymphfeat.runtime.devices import (
    available_memory,
    choose_device,
    choose_precision,
    cpu_threads,
    deterministic,
    precision_name,
    whole_float32,
)
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.processes import count, from_first, is_first, join_processes, rank, to_first
from lymphfeat.runtime.progress import Progress, RateMeter, silent
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.settings import AS_IT_IS, EndToEndSettings, ExtractSettings

_BESIDE_TRAINING = (
    *("validation", "evaluate_every", "tta", "fusion", "attributes", "log_attributes"),
)
_WHERE = ("device", "deterministic", "threads")
_FINETUNED = "finetuned_sha256"  # in the recipe: the fine-tuned weights, by split
# Fields of the recipe by which maps differ in rounding alone; `weights` is a name of those hashed.
INCIDENTAL = ("weights", "batch_size", *_WHERE, "batchnorm", "versions")


def extract(
    cohort: Cohort,
    out: str | os.PathLike[str],
    settings: ExtractSettings | None = None,
    *,
    splits: Sequence[Split] = (),
    force: bool = False,
    progress: Progress = silent,
) -> FeatureStore:
    """Write the feature maps of all of a cohort's images to the store `out` and open it.

    With `settings.finetune` a backbone is first trained for each of `splits` on its training
    patients, and every image's maps by it are stored under the split's id. The backbones stay in
    the folder `<out>.backbones`: nothing is trained twice. Under torchrun the blocks are shared out
    over the processes, and the first one writes.

    A complete store is left as it is if its recipe differs only in what changes rounding (batch
    size, device, threads, versions), which `FeatureStore.notes` then names. An unfinished one is
    finished if its whole recipe is the same, and ends with the same bytes as an uninterrupted run.
    What `force` overwrites stays until the new store is finished.

    The images that `leave_out_unusable` left out of the cohort are named in the recipe.

    Raises StoreError when `out` holds a store of another recipe and `force` is not set, and
    CohortError for images that cannot be read, nearly always before the first is encoded.

    >>> settings = lf.ExtractSettings(backbone=lf.BackboneSettings(crop=64))
    >>> lf.extract(lf.Cohort.load("cohort"), "features.h5", settings).shape
    """
    out, settings = Path(out), settings or ExtractSettings()
    if out.is_dir():
        raise StoreError(f"out (={out}) must be a file; got a folder. Choose another --out.")
    device = choose_device(settings.device)
    join_processes()
    with (
        cpu_threads(settings.threads),
        whole_float32(),
        deterministic(device, wanted=settings.deterministic),
    ):
        backbone, weights = build_from_settings(settings.backbone)
        dtype = choose_precision(settings.precision, device)
        recipe = make_recipe(cohort, settings, splits, backbone, weights, dtype, device)
        if from_first(out.exists()) and not force:
            return _reuse(out, recipe)
        check_images([path for own in cohort.images for path in own], recipe["crop"])
        if settings.finetune is None:
            networks = {_frozen(settings, weights): backbone}
        else:
            _refuse_seen(cohort, splits, weights)
            networks = _fine_tuned(cohort, splits, settings, out, force, progress)
            recipe[_FINETUNED] = {each.name: each.weights_sha256 for each in networks}
        encoders = _encoders(networks, settings, dtype, device)
        origin = _origin(cohort, settings, splits, device)
        open_writer = partial(_open_writer, out, recipe, cohort, encoders, origin, force)
        _write_rows(cohort, settings, encoders, device, open_writer, progress)
    return FeatureStore.open(out)


def backbones_of(store: Path) -> Path:
    """Return the folder of the backbones that were fine-tuned for a store."""
    return store.with_name(f"{store.name}.backbones")


def _refuse_seen(cohort: Cohort, splits: Sequence[Split], weights: LoadedWeights) -> None:
    """Refuse to fine-tune weights that have seen the label of a patient held out."""
    held_out = {id for split in splits for id in split.validation}
    seen = weights.provenance.labelled(patient_keys(cohort))
    refuse_seen_by_weights(held_out.intersection(seen), weights.source)


def _frozen(settings: ExtractSettings, weights: LoadedWeights) -> FeatureSet:
    return FeatureSet(
        name=FROZEN,
        backbone=settings.backbone.backbone,
        weights_sha256=weights.sha256,
        provenance=weights.provenance,
    )


def _fine_tuned(
    cohort: Cohort,
    splits: Sequence[Split],
    settings: ExtractSettings,
    out: Path,
    force: bool,
    progress: Progress,
) -> dict[FeatureSet, Backbone]:
    assert settings.finetune is not None
    folder = backbones_of(out)
    paths = fine_tune(
        cohort, splits, _finetune_settings(settings), folder, force=force, progress=progress
    )
    found = {}
    for split in splits:
        tuned = replace(settings.backbone, weights=str(paths[split.id]))
        backbone, weights = build_from_settings(tuned)
        feature_set = FeatureSet.of_split(
            split,
            backbone=tuned.backbone,
            weights_sha256=weights.sha256,
            provenance=weights.provenance,
        )
        found[feature_set] = backbone
    return found


def _finetune_settings(settings: ExtractSettings) -> EndToEndSettings:
    assert settings.finetune is not None
    return replace(
        settings.finetune,
        backbone=settings.backbone,
        precision=settings.precision,
        device=settings.device,
        deterministic=settings.deterministic,
        threads=settings.threads,
    )


def make_recipe(
    cohort: Cohort,
    settings: ExtractSettings,
    splits: Sequence[Split],
    backbone: Backbone,
    weights: LoadedWeights,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Collect all that determines a store's bytes."""
    if bool(splits) != bool(settings.finetune):
        raise SettingsError(
            f"splits (={len(splits)}) and fine-tuning must be given together: use both "
            "--splits and --finetune-epochs, or neither."
        )
    recipe = _frozen_recipe(cohort, settings, weights, dtype, device)
    if folds_batchnorm(backbone):
        recipe["batchnorm"] = "folded"
    if splits:
        recipe["finetune"] = _finetune_recipe(settings, splits)
    # Convolutions on a CPU sum in another order with another number of threads: training takes
    # all of them, encoding one for each batch.
    if device.type == "cpu":
        recipe["threads"] = torch.get_num_threads() if splits else 1
    return recipe


def _finetune_recipe(settings: ExtractSettings, splits: Sequence[Split]) -> dict[str, Any]:
    fields = asdict(_finetune_settings(settings))
    for name in ("backbone", "precision", "seed", *_WHERE, *_BESIDE_TRAINING):
        del fields[name]
    # What the backbones learn from: not which split serves which.
    learnt = [
        {name: value for name, value in asdict(split).items() if name != "parents"}
        for split in splits
    ]
    digest = hashlib.sha256(json_text(learnt).encode())
    return {**fields, "splits": len(splits), "splits_sha256": digest.hexdigest()}


def _frozen_recipe(
    cohort: Cohort,
    settings: ExtractSettings,
    weights: LoadedWeights,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    layout, stains = settings.backbone.layout, settings.backbone.stain_normalization
    return {
        "backbone": settings.backbone.backbone,
        "output_stride": settings.backbone.output_stride,
        # Recipes of earlier versions have neither.
        **({} if layout == AS_IT_IS else {"layout": asdict(layout)}),
        **({"field_um": settings.backbone.field_um} if settings.backbone.field_um else {}),
        **({} if stains == "none" else {"stain_normalization": stains}),
        "weights": weights.source,
        "weights_sha256": weights.sha256,
        "crop": settings.backbone.crop,
        "normalization": asdict(find_normalization(settings.backbone.normalization)),
        "views": list(parse_views(settings.views)),
        "precision": precision_name(dtype),
        "batch_size": settings.batch_size,
        "device": device.type,
        **({"deterministic": True} if settings.deterministic and device.type != "cpu" else {}),
        "threads": None,
        "versions": {
            "format": FORMAT_VERSION,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "cohort": cohort_fingerprint(cohort),
        **({"left_out": _left_out(cohort)} if cohort.left_out else {}),
    }


def _origin(
    cohort: Cohort, settings: ExtractSettings, splits: Sequence[Split], device: torch.device
) -> dict[str, Any]:
    """Return what else a store must say to be repeated, and where it was computed."""
    return {
        "reading": dict(cohort.reading),
        "weights_seed": settings.backbone.weights_seed,
        **({"splits": [split.id for split in splits]} if splits else {}),  # in their order
        "computed": circumstances(device),
    }


def _left_out(cohort: Cohort) -> dict[str, list[str]]:
    """Return the images that were left out, by patient, below the cohort's folder."""
    return {
        id: [path.relative_to(cohort.root).as_posix() for path in paths]
        for id, paths in cohort.left_out.items()
    }


def _reuse(out: Path, recipe: dict[str, Any]) -> FeatureStore:
    store = FeatureStore.open(out)
    clear_leavings(out)
    differences = differing_fields(_decisive(recipe), _decisive(store.recipe))
    if differences:
        raise StoreError(
            f"{out} already holds a store with a different recipe: {'; '.join(differences)}. "
            "Choose another --out, or overwrite it with --force."
        )
    incidental = differing_fields(_incidental(recipe), _incidental(store.recipe))
    if not incidental:
        return store
    note = (
        f"{out} is reused although {'; '.join(incidental)}. This affects only rounding; "
        "extract again with --force if that matters."
    )
    return replace(store, notes=(note,))


def _decisive(recipe: Recipe) -> dict[str, Any]:
    # Which weights came of fine-tuning is known only when it is done.
    return {key: recipe[key] for key in recipe if key not in (*INCIDENTAL, _FINETUNED)}


def _incidental(recipe: Recipe) -> dict[str, Any]:
    return {key: recipe[key] for key in recipe if key in INCIDENTAL}


def _encoders(
    networks: Mapping[FeatureSet, Backbone],
    settings: ExtractSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[FeatureSet, MapEncoder]:
    return {
        each: MapEncoder(
            network,
            normalization=find_normalization(settings.backbone.normalization),
            views=parse_views(settings.views),
            dtype=dtype,
            device=device,
        )
        for each, network in networks.items()
    }


def _open_writer(
    out: Path,
    recipe: Recipe,
    cohort: Cohort,
    encoders: Mapping[FeatureSet, MapEncoder],
    origin: Mapping[str, Any],
    force: bool,
) -> StoreWriter:
    first = next(iter(encoders.values()))
    return StoreWriter(
        out,
        recipe=recipe,
        cohort=cohort,
        shape=first.map_shape(recipe["crop"]),
        feature_sets=list(encoders),
        image_hashes=[hash for hashes in image_hashes(cohort) for hash in hashes],
        statistics=NAMES,
        origin=origin,
        force=force,
    )


def _write_rows(
    cohort: Cohort,
    settings: ExtractSettings,
    encoders: Mapping[FeatureSet, MapEncoder],
    device: torch.device,
    open_writer: Callable[[], StoreWriter],
    progress: Progress,
) -> None:
    """Encode the blocks that are not yet written; the first process opens the store and writes."""
    paths, size = [path for images in cohort.images for path in images], settings.batch_size
    with ExitStack() as stack:
        writer = stack.enter_context(open_writer()) if is_first() else None
        starts = from_first(_waiting(writer, len(paths), size) if writer else [])
        blocks = [(start, paths[start : start + size]) for start in starts]
        done = len(paths) - sum(len(block) for _, block in blocks)
        meter = RateMeter(progress, len(paths), done=done)
        own = _encoded(blocks[rank() :: count()], cohort, settings, encoders, device)
        for round_ in _rounds(own, len(blocks)):
            for block in to_first(round_):
                if writer and block:
                    start, rows = block
                    writer.write(start, rows.maps, rows.crc32, rows.statistics)
                    meter.add(len(rows.crc32))
        if writer:
            writer.finish()
    from_first(None)  # the others wait until the store is complete


def _waiting(writer: StoreWriter, rows: int, size: int) -> list[int]:
    """Return the first rows of the blocks that are not yet written."""
    starts = range(0, rows, size)
    return [start for start in starts if not writer.finished(start, min(start + size, rows))]


@dataclass(frozen=True)
class _Rows:
    """What a store holds of some images."""

    maps: dict[str, NDArray[np.float32]]  # by feature set: (n, V, C, h, w)
    crc32: NDArray[np.uint32]  # (n,)
    statistics: NDArray[np.float32]  # (n, S)


_Block = tuple[int, _Rows]  # from which row on


def _rounds(own: Iterator[_Block], blocks: int) -> Iterator[_Block | None]:
    """Yield a process's blocks, and None in the last round if it has one fewer."""
    for _ in range(-(-blocks // count())):
        yield next(own, None)


def _encoded(
    blocks: Sequence[tuple[int, Sequence[Path]]],
    cohort: Cohort,
    settings: ExtractSettings,
    encoders: Mapping[FeatureSet, MapEncoder],
    device: torch.device,
) -> Iterator[_Block]:
    how, crop = settings.backbone.stain_normalization, settings.backbone.crop
    normalise = stain_normaliser(how, cohort.images, crop)

    def encode(crops: Sequence[Crop]) -> _Rows:
        pixels = np.stack([crop.pixels for crop in crops])  # (n, 3, H, W)
        return _Rows(
            maps={each.name: encoder.encode(pixels) for each, encoder in encoders.items()},
            crc32=np.array([crop.crc32 for crop in crops], np.uint32),
            statistics=np.array([crop.statistics for crop in crops], np.float32),
        )

    encoded = encode_files(
        [paths for _, paths in blocks],
        crop_decoder(crop, measured=True, normalise=normalise),
        encode,
        device=device,
        threads=_threads(encoders, settings, device),
    )
    for start, _ in blocks:
        try:
            yield start, next(encoded)
        except CohortError as error:
            raise CohortError(
                f"{error} The images before it are kept: with this one restored, removed or left "
                "out, the same command goes on from here."
            ) from None


def _threads(
    encoders: Mapping[FeatureSet, MapEncoder], settings: ExtractSettings, device: torch.device
) -> int:
    """Return how many threads to use: on a CPU each holds a block's maps of all backbones."""
    threads = settings.threads or torch.get_num_threads()
    if device.type != "cpu":
        return threads
    shape = next(iter(encoders.values())).map_shape(settings.backbone.crop)
    values: int = len(encoders) * math.prod(shape.rows(settings.batch_size))
    # Of float32, copied once; half of what is free is left to the activations.
    most = available_memory(device) // (2 * 2 * 4 * values)
    return max(1, min(threads, most))
