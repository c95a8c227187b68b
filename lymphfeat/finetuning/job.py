"""One end-to-end training: its patients, its initialised networks, its identity."""

import platform
from collections.abc import Mapping, Sequence
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
from lymphfeat.cohort.provenance import NOBODY, PatientKey, Provenance, refuse_seen_by_weights
from lymphfeat.cohort.splits import Split
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.features.backbones import build_from_settings
from lymphfeat.finetuning.initial_head import read_initial_head
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.head import Head
from lymphfeat.heads.registry import (
    DistributionAggregator,
    LinearAggregator,
    NetworkAggregator,
    find_aggregator,
)
from lymphfeat.heads.stack import HeadStack, NetworkHead, initial_scorer
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.model import Model
from lymphfeat.model.scoring import ModelRecipe
from lymphfeat.runtime.devices import choose_device, choose_precision, precision_name
from lymphfeat.settings import EndToEndSettings, require


def hold_out(cohort: Cohort, settings: EndToEndSettings) -> Split:
    """Hold `settings.validation` of the labelled patients out of training, stratified.

    Raises CohortError unless training patients of both classes remain.
    """
    labelled = cohort.labelled()
    _check_classes(labelled)
    held_out = _draw(labelled, settings) if settings.validation else set()
    return Split(
        id="validation",
        seed=settings.seed,
        repeat=0,
        train=tuple(id for id in labelled.ids if id not in held_out),
        validation=tuple(id for id in labelled.ids if id in held_out),
    )


def _draw(labelled: Cohort, settings: EndToEndSettings) -> set[str]:
    try:
        _, held_out = train_test_split(
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
    return set(held_out.tolist())


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
    split: Split
    train: Cohort
    validation: Cohort | None  # the patients held out
    settings: EndToEndSettings
    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype
    identity: Mapping[str, Any]


def prepare(cohort: Cohort, split: Split, settings: EndToEndSettings) -> Job:
    """Initialise the networks of a training on a split of a cohort; the seed is the split's.

    Raises CohortError unless both classes are in training, and LeakageError when what training
    starts from has seen the label of a patient held out.
    """
    device = choose_device(settings.device)
    dtype = choose_precision(settings.precision, device)
    settings = replace(settings, seed=split.seed, precision=precision_name(dtype))
    labelled = cohort.labelled()
    train = labelled.select(split.train)
    _check_classes(train)
    validation = labelled.select(split.validation) if split.validation else None
    held_out = patient_keys(validation) if validation else ()
    backbone, weights = build_from_settings(settings.backbone)
    refuse_seen_by_weights(weights.provenance.labelled(held_out), weights.source)
    generator = torch.Generator().manual_seed(split.seed)
    head, origin = _initial_head(settings, backbone.channels, generator, weights.sha256, held_out)
    settings = replace(settings, head=head.settings[0])
    facts = TrainingFacts(
        trained_on=train.ids,
        validated_on=held_out,
        provenance=weights.provenance | Provenance(labels=patient_keys(train)) | origin,
        cohort=cohort_fingerprint(cohort),
        settings=asdict(settings),
        epochs=settings.epochs,
        seed=settings.seed,
        initial_weights=weights.source,
        initial_weights_sha256=weights.sha256,
        versions=_versions(),
    )
    return Job(
        model=Model(
            backbone, head, recipe=ModelRecipe.of(settings.backbone), facts=facts, tta=settings.tta
        ),
        split=split,
        train=train,
        validation=validation,
        settings=settings,
        generator=generator,
        device=device,
        dtype=dtype,
        identity=_identity(facts),
    )


def _initial_head(
    settings: EndToEndSettings,
    channels: int,
    generator: torch.Generator,
    weights_sha256: str,
    held_out: Sequence[PatientKey],
) -> tuple[Head, Provenance]:
    """Make the head that training starts from, and say whose labels went into it."""
    aggregator = find_aggregator(settings.head)
    require(
        settings.init_head is None or isinstance(aggregator, LinearAggregator),
        f"init_head (={settings.init_head}) must not go with agg (={settings.head.agg}): its head "
        "starts from the features alone. Leave out one of the two.",
    )
    if isinstance(aggregator, DistributionAggregator):
        return DistributionHead.empty(settings.head, channels), NOBODY
    if isinstance(aggregator, NetworkAggregator):
        zeros = torch.zeros(channels)  # standardised on the features that training starts from
        return NetworkHead.initial(settings.head, zeros, zeros.clone(), generator), NOBODY
    weight, bias = initial_scorer(channels, generator)
    if settings.init_head is None:
        return HeadStack([settings.head], weight[None], bias[None]), NOBODY
    found = read_initial_head(Path(settings.init_head), held_out, weights_sha256)
    return found.as_stack(replace(found.settings, lr=settings.head.lr)), found.provenance


def _versions() -> dict[str, str]:
    return {
        "lymphfeat": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def _identity(facts: TrainingFacts) -> dict[str, Any]:
    """Collect what training depends on; where it runs may change."""
    incidental = {"device", "threads", "tta", "threshold", "allow_shared_images"}
    incidental |= {"fusion", "attributes", "log_attributes", "evaluate_every"}
    fields = {name: value for name, value in facts.settings.items() if name not in incidental}
    fields["backbone"] = {**fields["backbone"], "weights": facts.initial_weights_sha256}
    return {**fields, "cohort": dict(facts.cohort), "trained_on": facts.trained_on}
