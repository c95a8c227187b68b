"""The portable model: backbone, head and everything needed to apply them to new patients.

A model folder holds `model.safetensors` (tensors) and `model.json` (everything else); no
pickle. `model.json` carries the hash of the tensors.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.images import VIEWS
from lymphfeat.cohort.provenance import PatientKey
from lymphfeat.evaluation.decision import Decision
from lymphfeat.features.backbones import Backbone, weights_sha256
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.blank import empty_head
from lymphfeat.heads.head import Head
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.folder import build_blank, load_tensors, read_facts, write_model
from lymphfeat.model.predictions import Predictions, image_table, measure_by_role, patient_table
from lymphfeat.model.scoring import CohortScorer, ModelRecipe
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.files import find_checkpoints, recover
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import HeadSettings, PredictSettings

FORMAT = "lymphfeat-model"
FORMAT_VERSION = 1
WEIGHTS_FILE, FACTS_FILE = "model.safetensors", "model.json"
FINAL_FILE = "final.json"  # of a `FinalModel`
_UNDECIDED = Decision()


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
        network = _network(self.backbone, self.head)
        write_model(network, Path(folder, WEIGHTS_FILE), self._to_json(), Path(folder, FACTS_FILE))

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "recipe": asdict(self.recipe),
            "head": asdict(self.head_settings),
            **self.decision.to_json(),
            "tta": self.tta,
            "weights_sha256": weights_sha256(_network(self.backbone, self.head)),
            "training": self.facts.to_json(),
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Model":
        """Read a model folder; raises ModelError, saying what to do, if it is incomplete."""
        folder = Path(folder)
        recover(folder)
        facts = _read_facts(folder)
        model = build_blank(facts, _build, folder / FACTS_FILE, folder / WEIGHTS_FILE)
        network = _network(model.backbone, model.head)
        sha256 = str(facts.get("weights_sha256"))
        load_tensors(network, folder / WEIGHTS_FILE, sha256, facts=FACTS_FILE)
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
        return self.facts.seen(patients)

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
    hint = "make one with `lymphfeat endtoend`"
    if find_checkpoints(folder):
        hint = "it holds an unfinished training: run the same `lymphfeat endtoend` again"
    elif (folder / FINAL_FILE).is_file():
        hint = "it holds a final model, which `lymphfeat predict` and `explain` read"
    elif models := sorted(folder.glob(f"*/{FACTS_FILE}")):
        hint = f"it holds several models: choose one of them, such as {models[0].parent}"
    return read_facts(folder / FACTS_FILE, FORMAT, FORMAT_VERSION, hint=hint)


def _build(facts: Mapping[str, Any]) -> Model:
    recipe = ModelRecipe.from_json(facts["recipe"])
    backbone = recipe.make_backbone()
    return Model(
        backbone,
        empty_head(HeadSettings(**facts["head"]), backbone.channels),
        recipe=recipe,
        facts=TrainingFacts.from_json(facts["training"]),
        decision=Decision.from_json(facts),
        tta=bool(facts["tta"]),
    )
