"""Everything a report shows about a model on a cohort, as arrays and tables."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.explanation.faithfulness import Deletion, Overlap, delete_images, measure_overlap
from lymphfeat.explanation.findings import Findings
from lymphfeat.explanation.scores import Decisions, decide, ranks, score_cohort
from lymphfeat.explanation.wording import Wording
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.model import Model
from lymphfeat.model.predictions import ROLE_OF
from lymphfeat.runtime.arrays import Float32s
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import ExplainSettings

ROLES = {"train": "trained on", "validation": "validation", "new": "new"}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a model saw in a cohort.

    maps (N, h, w) are pixel logits. Images are grouped by patient, in the cohort's order.
    """

    model: Model
    cohort: Cohort
    maps: Float32s
    decisions: Decisions
    predicted: (
        Float32s  # (P,) probability as `Model.predict` gives it; with TTA not the explained one
    )
    deletion: Deletion | None  # None where no patient has enough images
    findings: Findings | None = None  # of heads of the family `distribution` alone
    truth: Truth | None = None
    overlap: Overlap | None = None  # of maps with rendered cells; synthetic cohorts only

    @cached_property
    def logit(self) -> Float32s:
        """Return the images' logits, (N,): the means of their maps."""
        return self.decisions.score

    @property
    def distance(self) -> NDArray[np.float64] | None:
        """Return how far each image is from its patient's average cell, (N,); see `Findings`."""
        return None if self.findings is None else self.findings.distance

    @cached_property
    def rank(self) -> NDArray[np.int64]:
        """Return each image's rank within its patient, 0 for the highest: (N,)."""
        return ranks(self.logit, self.cohort.n_images)

    @cached_property
    def patient(self) -> NDArray[np.int64]:
        """Return the patient of each image, (N,)."""
        return np.repeat(np.arange(len(self.cohort.ids)), self.cohort.n_images)

    @cached_property
    def images(self) -> pd.DataFrame:
        """Tabulate the images: patient, image, rank, logit, probability, weight, contribution, …

        `distance` from the patient's average cell, in units of its mean, is missing where the head
        does not read how much cells differ.
        """
        paths = [path for paths in self.cohort.images for path in paths]
        return pd.DataFrame(
            {
                "patient": np.array(self.cohort.ids)[self.patient],
                "image": [path.name for path in paths],
                "rank": self.rank + 1,
                "logit": self.logit,
                "probability": expit(self.logit),
                "weight": self.decisions.weight,
                "contribution": self.decisions.contribution,
                "mark": self.decisions.mark,
                "distance": np.nan if self.distance is None else self.distance,
            }
        )

    @cached_property
    def patients(self) -> pd.DataFrame:
        """Tabulate the patients: id, label (missing where unknown), role, n_images, probability, …

        `calibrated` is missing where the model has no calibration; `predicted` is 1 above its
        threshold; `error` is missing where the label is.
        """
        seen = self.model.seen(patient_keys(self.cohort))
        labels = pd.Series(self.cohort.labels, dtype="Int64")
        labels = labels.mask(labels < 0)
        calibration = self.model.decision.calibration
        raw = self.predicted.astype(np.float64)
        predicted = pd.Series(raw > self.model.threshold).astype("Int64")
        return pd.DataFrame(
            {
                "id": self.cohort.ids,
                "label": labels,
                "seen": seen,
                "role": [ROLE_OF[each] for each in seen],
                "n_images": self.cohort.n_images,
                "probability": self.predicted,
                "calibrated": np.nan if calibration is None else calibration.apply(raw),
                "predicted": predicted,
                "error": predicted != labels,
                "total": self.decisions.total,
                "rest": self.decisions.rest,
                "without_top": self.decisions.without_top,
            }
        )

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Measure the labelled patients, separately for training, validation and new patients."""
        return self.model.measure(self.patients)

    def truth_scores(self) -> dict[str, float]:
        """Score the images' ranking, and patients whose label was hidden, against the truth."""
        if self.truth is None:
            return {}
        return self.truth.score(self.images, self.patients, self.model.threshold)


def explain(
    model: Model | Ensemble | FinalModel,
    cohort: Cohort,
    settings: ExplainSettings | None = None,
    *,
    truth: Truth | None = None,
    progress: Progress = silent,
) -> Explanation:
    """Explain a model's decisions on a cohort.

    The unflipped images are explained; where the model predicts the mean over four flips,
    `predicted` holds that mean. `truth` is used only for scoring. Raises SettingsError for an
    ensemble, whose members are explained one at a time, and for a final model, whose predictions
    say what speaks for them.

    >>> lf.explain(lf.load_model("models/endtoend"), lf.Cohort.load("cohort")).images
    """
    if isinstance(model, Ensemble):
        raise SettingsError(
            f"model must be a single model; got {len(model.models)} members. Explain one of them, "
            "such as model.models[0]."
        )
    if isinstance(model, FinalModel):
        raise SettingsError(
            f"model must be a single model of `endtoend`; got the final model of {model.row}. Its "
            "predictions already say what images and attributes add: see the columns from_… of "
            "`predict`."
        )
    settings = settings or ExplainSettings()
    scored = score_cohort(model, cohort, settings.scoring, progress=progress)
    decisions = decide(model, scored.kept, cohort.n_images)
    predicted = decisions.probability
    if model.tta:
        flipped = model.predict(cohort, settings.scoring, progress=progress)
        predicted = flipped.patients["probability"].to_numpy(np.float32)
    mapped = Wording.of(model.head_settings).mapped
    overlap = measure_overlap(cohort, scored.maps, model.recipe.crop, truth) if mapped else None
    return Explanation(
        model=model,
        cohort=cohort,
        maps=scored.maps,
        decisions=decisions,
        predicted=predicted,
        deletion=delete_images(model, scored.kept, cohort.n_images, seed=settings.seed),
        findings=Findings.of(model, scored.kept, cohort.n_images),
        truth=truth,
        overlap=overlap,
    )
