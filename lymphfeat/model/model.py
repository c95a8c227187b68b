"""The portable model: backbone, head and everything needed to apply them to new patients.

A model folder holds `model.safetensors` (tensors) and `model.json` (everything else); no
pickle. `model.json` carries the hash of the tensors.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.images import VIEWS, Normalization
from lymphfeat.cohort.provenance import NOBODY, PatientKey, Provenance, keys_from_json, keys_to_json
from lymphfeat.errors import ModelError
from lymphfeat.evaluation.decision import Decision
from lymphfeat.features.backbones import Backbone, make_backbone, weights_sha256
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.head import Head
from lymphfeat.heads.registry import DistributionAggregator, find_aggregator
from lymphfeat.heads.stack import HeadStack
from lymphfeat.model.predictions import Predictions, image_table, measure_by_role, patient_table
from lymphfeat.model.scoring import CohortScorer, ModelRecipe
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.files import find_checkpoints, recover, replace_file
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.settings import HeadSettings, PredictSettings

FORMAT = "lymphfeat-model"
FORMAT_VERSION = 1
WEIGHTS_FILE, FACTS_FILE = "model.safetensors", "model.json"
_UNDECIDED = Decision()


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """The origin of a model."""

    trained_on: tuple[str, ...]  # ids of its own training patients
    validated_on: tuple[PatientKey, ...] = ()
    provenance: Provenance = NOBODY  # of everything in it, including its initial weights
    cohort: Mapping[str, Any] = field(default_factory=dict)  # its fingerprint
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    seed: int = 0
    initial_weights: str = "none"
    initial_weights_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    # "train", "validation" -> the metrics of those patients, as predicted by the final model
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


class Model:
    """A trained backbone and head; `predict` applies them to any cohort, with or without labels."""

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        recipe: ModelRecipe,
        facts: TrainingFacts,
        decision: Decision = _UNDECIDED,
        tta: bool = False,
    ) -> None:
        self.backbone = backbone.eval()
        self.head = head.eval()  # of one head
        self.recipe = recipe
        self.facts = facts
        self.decision = decision
        self.tta = tta  # whether `predict` averages over the four flips by default

    @property
    def head_settings(self) -> HeadSettings:
        """Return the settings of the head."""
        return self.head.settings[0]

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float | None]]:
        """Return how the final model predicts the patients it was trained and validated on."""
        return self.facts.metrics

    @property
    def threshold(self) -> float:
        """Return the probability above which a patient is called tumoral."""
        return self.decision.threshold

    @property
    def threshold_from(self) -> str:
        """Return what the threshold was chosen on."""
        return self.decision.threshold_from

    def at_sensitivity(self, target: float) -> "Model":
        """Return this model, deciding by its operating point for a sensitivity.

        Raises SettingsError when it has no such operating point.
        """
        model = copy.copy(self)
        model.decision = self.decision.at_sensitivity(target)
        return model

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `model.json` to a folder, creating it if needed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: value.detach().cpu().contiguous()
            for key, value in _network(self.backbone, self.head).state_dict().items()
        }
        replace_file(folder / WEIGHTS_FILE, lambda path: path.write_bytes(save(tensors)))
        text = json_text(self._to_json(), indent=2)
        replace_file(folder / FACTS_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "recipe": asdict(self.recipe),
            "head": asdict(self.head_settings),
            **self.decision.to_json(),
            "tta": self.tta,
            "weights_sha256": weights_sha256(_network(self.backbone, self.head)),
            "training": asdict(self.facts)
            | {
                "validated_on": keys_to_json(self.facts.validated_on),
                "provenance": self.facts.provenance.to_json(),
            },
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Model":
        """Read a model folder; raises ModelError, saying what to do, if it is incomplete."""
        folder = Path(folder)
        recover(folder)
        facts = _read_facts(folder)
        try:
            model = _build(facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{folder / FACTS_FILE}: is damaged ({type(error).__name__}: {error}); "
                "copy the model folder again or retrain the model."
            ) from None
        _load_tensors(model, folder, str(facts.get("weights_sha256")))
        return model

    def predict(
        self,
        cohort: Cohort,
        settings: PredictSettings | None = None,
        *,
        progress: Progress = silent,
    ) -> Predictions:
        """Predict every patient and image of a cohort, each only from its own images.

        With `settings.tta` everything is the mean over the four flips. Images are decoded and
        scored in batches; only what the head needs of them is kept. Only float32 gives the same
        probabilities on every machine, up to the order of summation. Raises ModelError for a score
        that is not finite.
        """
        settings = settings or PredictSettings()
        tta = self.tta if settings.tta is None else settings.tta
        views = VIEWS if tta else VIEWS[:1]
        with cpu_threads(settings.threads), whole_float32():
            scorer = CohortScorer(self.backbone, self.head, self.recipe, settings, views=views)
            return self._read_out(cohort, scorer.score(cohort, progress))

    def measure(self, patients: pd.DataFrame) -> dict[str, dict[str, float | None]]:
        """Measure predicted patients with a label, grouped by what the model has seen of them.

        The groups are "train" (the model, or what it was made from, learnt from their labels: how
        well it fits, not how well it predicts), "validation" and "new".
        """
        return measure_by_role(patients, self.threshold)

    def seen(self, patients: Sequence[PatientKey]) -> list[str]:
        """Return what the model has seen of each patient, as one of `SEEN`."""
        validated = Provenance(labels=self.facts.validated_on)

        def seen_of(patient: PatientKey) -> str:
            if self.facts.provenance.has_label_of(patient):
                return "label"
            if validated.has_label_of(patient):
                return "validation"
            return "images" if self.facts.provenance.has_images_of(patient) else "no"

        return [seen_of(patient) for patient in patients]

    def _read_out(self, cohort: Cohort, kept: Tensor) -> Predictions:
        images = Bags.of(cohort.n_images)
        read = [self.head.read_out(view, images) for view in kept]

        def mean(name: str) -> NDArray[np.float32]:
            return np.asarray(torch.stack([getattr(view, name) for view in read]).mean(0).numpy())

        return Predictions(
            patients=patient_table(
                cohort, self.seen(patient_keys(cohort)), mean("probability"), self.decision
            ),
            images=image_table(cohort, *map(mean, ("score", "weight", "contribution"))),
        )


def _network(backbone: Backbone, head: Head) -> nn.ModuleDict:
    """Name the tensors of a model file: backbone.<timm's key>, head.<key>."""
    return nn.ModuleDict({"backbone": backbone.model, "head": head})


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_FILE
    if not path.is_file():
        hint = "make one with `lymphfeat endtoend`"
        if find_checkpoints(folder):
            hint = "it holds an unfinished training: run the same `lymphfeat endtoend` again"
        elif models := sorted(folder.glob(f"*/{FACTS_FILE}")):
            hint = f"it holds several models: choose one of them, such as {models[0].parent}"
        raise ModelError(f"model (={folder}) must be a folder with {FACTS_FILE}; got none; {hint}.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path}: is not valid JSON ({error}); copy the model folder again."
        ) from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ModelError(f"{path}: is JSON but not a lymphfeat model.")
    version = facts.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelError(
            f"{path}: format_version (={version}) must be at most {FORMAT_VERSION}; "
            "update lymphfeat to read it."
        )
    return facts


def _build(facts: Mapping[str, Any]) -> Model:
    recipe = _parse_recipe(facts["recipe"])
    backbone = make_backbone(
        recipe.backbone, image_size=recipe.crop, output_stride=recipe.output_stride
    )
    training = facts["training"]
    return Model(
        backbone,
        _empty_head(HeadSettings(**facts["head"]), backbone.channels),
        recipe=recipe,
        facts=TrainingFacts(
            **training
            | {
                "trained_on": tuple(training["trained_on"]),
                "validated_on": keys_from_json(training["validated_on"]),
                "provenance": _provenance_of(training),
            }
        ),
        decision=Decision.from_json(facts),
        tta=bool(facts["tta"]),
    )


def _empty_head(settings: HeadSettings, channels: int) -> Head:
    if isinstance(find_aggregator(settings), DistributionAggregator):
        return DistributionHead.empty(settings, channels)
    return HeadStack([settings], torch.zeros(1, channels), torch.zeros(1))


def _provenance_of(training: Mapping[str, Any]) -> Provenance:
    if "provenance" in training:
        return Provenance.from_json(training["provenance"])
    return Provenance.of_ids(labels=training["trained_on"])  # models of earlier versions


def _parse_recipe(content: Mapping[str, Any]) -> ModelRecipe:
    constants = content["normalization"]
    normalization = Normalization(
        name=constants["name"], mean=tuple(constants["mean"]), std=tuple(constants["std"])
    )
    return ModelRecipe(**{**content, "normalization": normalization})


def _load_tensors(model: Model, folder: Path, sha256: str) -> None:
    path = folder / WEIGHTS_FILE
    network = _network(model.backbone, model.head)
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path}: cannot be read as this model's tensors ({str(error).splitlines()[0]}); "
            "copy the model folder again or retrain the model."
        ) from None
    if weights_sha256(network) != sha256:
        raise ModelError(
            f"{path}: tensors must be those that {FACTS_FILE} was written with; got others. "
            "Copy both files of the model together."
        )
