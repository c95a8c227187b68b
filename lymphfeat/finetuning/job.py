"""One end-to-end training: its patients, its initialised networks, its identity."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.model_selection import train_test_split

from lymphfeat import __version__
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import cohort_fingerprint, patient_keys
from lymphfeat.cohort.images import find_normalization
from lymphfeat.cohort.provenance import Provenance, refuse_seen_by_weights
from lymphfeat.cohort.splits import Split
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.features.backbones import LoadedWeights, build_backbone
from lymphfeat.finetuning.initial_head import read_initial_head
from lymphfeat.heads.stack import HeadStack, initial_scorer
from lymphfeat.model.model import Model, TrainingFacts
from lymphfeat.model.scoring import ModelRecipe
from lymphfeat.runtime.devices import choose_device, choose_precision, precision_name
from lymphfeat.settings import EndToEndSettings


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The labelled patients of a cohort."""

    train: Cohort
    validation: Cohort | None


def hold_out(cohort: Cohort, settings: EndToEndSettings) -> Parts:
    """Hold `settings.validation` of the labelled patients out of training, stratified.

    Raises CohortError unless training patients of both classes remain.
    """
    labelled = cohort.labelled()
    _check_classes(labelled)
    if not settings.validation:
        return Parts(train=labelled, validation=None)
    try:
        train, validation = train_test_split(
            np.array(labelled.ids),
            test_size=settings.validation,
            stratify=labelled.labels,
            random_state=settings.seed,
        )
    except ValueError as error:
        raise SettingsError(
            f"validation (={settings.validation}) must leave patients of both classes for both "
            f"training and validation; got {len(labelled.ids)} labelled patients ({error})."
        ) from None
    return Parts(train=labelled.select(train), validation=labelled.select(validation))


def parts_of(labelled: Cohort, split: Split) -> Parts:
    """Select a split's patients; raises CohortError unless both classes are in training."""
    train = labelled.select(split.train)
    _check_classes(train)
    validation = labelled.select(split.validation) if split.validation else None
    return Parts(train=train, validation=validation)


def _check_classes(labelled: Cohort) -> None:
    tumoral = int((labelled.labels == 1).sum())
    reactive = int((labelled.labels == 0).sum())
    if not tumoral or not reactive:
        raise CohortError(
            f"{labelled.root}: training needs labelled patients of both classes; got "
            f"{tumoral} tumoral (label 1) and {reactive} reactive (label 0)."
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training: an initialised model, its patients and its settings."""

    model: Model
    weights: LoadedWeights  # the initial weights of the backbone
    parts: Parts
    settings: EndToEndSettings
    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype
    identity: Mapping[str, Any]


def prepare(cohort: Cohort, parts: Parts, settings: EndToEndSettings) -> Job:
    """Initialise the networks of a training on `parts` of a cohort."""
    device = choose_device(settings.device)
    dtype = choose_precision(settings.precision, device)
    settings = replace(settings, precision=precision_name(dtype))
    backbone, weights = build_backbone(
        settings.backbone.backbone,
        weights=settings.backbone.weights,
        seed=settings.backbone.weights_seed,
        image_size=settings.backbone.crop,
        output_stride=settings.backbone.output_stride,
    )
    held_out = patient_keys(parts.validation) if parts.validation else ()
    refuse_seen_by_weights(weights.provenance.labelled(held_out), weights.source)
    generator = torch.Generator().manual_seed(settings.seed)
    weight, bias = initial_scorer(backbone.channels, generator)
    head = HeadStack([settings.head], weight[None], bias[None])
    provenance = weights.provenance | Provenance(labels=patient_keys(parts.train))
    if settings.init_head is not None:
        found = read_initial_head(Path(settings.init_head), held_out, weights.sha256)
        settings = replace(settings, head=replace(found.settings, lr=settings.head.lr))
        head = found.as_stack(settings.head)
        provenance |= found.provenance
    fingerprint = cohort_fingerprint(cohort)
    model = Model(
        backbone,
        head,
        recipe=ModelRecipe(
            backbone=settings.backbone.backbone,
            output_stride=settings.backbone.output_stride,
            crop=settings.backbone.crop,
            normalization=find_normalization(settings.backbone.normalization),
        ),
        facts=_facts(parts, settings, weights, fingerprint, provenance),
        tta=settings.tta,
    )
    return Job(
        model=model,
        weights=weights,
        parts=parts,
        settings=settings,
        generator=generator,
        device=device,
        dtype=dtype,
        identity=_identity(parts, settings, weights, fingerprint),
    )


def _facts(
    parts: Parts,
    settings: EndToEndSettings,
    weights: LoadedWeights,
    fingerprint: Mapping[str, Any],
    provenance: Provenance,
) -> TrainingFacts:
    return TrainingFacts(
        trained_on=parts.train.ids,
        validated_on=patient_keys(parts.validation) if parts.validation else (),
        provenance=provenance,
        cohort=fingerprint,
        settings=asdict(settings),
        epochs=settings.epochs,
        seed=settings.seed,
        initial_weights=weights.source,
        initial_weights_sha256=weights.sha256,
        versions={
            "lymphfeat": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    )


def _identity(
    parts: Parts,
    settings: EndToEndSettings,
    weights: LoadedWeights,
    fingerprint: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect what training depends on; where it runs may change."""
    fields = asdict(settings)
    for name in ("device", "threads", "tta", "threshold", "allow_shared_images"):
        del fields[name]
    fields["backbone"]["weights"] = weights.sha256
    return {**fields, "cohort": dict(fingerprint), "trained_on": parts.train.ids}
