"""Everything a report shows about a model on a cohort, as arrays and tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.provenance import PatientKey
from lymphfeat.errors import ModelError
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.evaluation.subgroups import FEWEST, measure_subgroups
from lymphfeat.explanation.faithfulness import Deletion, Overlap, delete_images, measure_overlap
from lymphfeat.explanation.findings import Findings
from lymphfeat.explanation.scores import Decisions, decide, ranks, score_cohort
from lymphfeat.explanation.subjects import Subject, subject_of
from lymphfeat.explanation.thumbnails import SheetMaker, Thumbnails
from lymphfeat.explanation.wording import Wording
from lymphfeat.features.store import FeatureStore
from lymphfeat.model.familiarity import Judgement
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import AnyModel
from lymphfeat.model.members import IMAGES
from lymphfeat.model.predictions import ROLE_OF
from lymphfeat.model.sources import check_stores
from lymphfeat.runtime.arrays import Float32s, Floats
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import ExplainSettings, PredictSettings


@dataclass(frozen=True, kw_only=True)
class Subgroups:
    """How well the model does in groups of patients."""

    of: str  # which patients: "new", "out of fold", "validation" or "train"
    rows: pd.DataFrame  # as `measure_subgroups` returns


_FOR_PICTURES = 0.88  # of the page's bytes; `render_page` makes them smaller where that is too much
ROLES = {"train": "trained on", "validation": "validation", "new": "new"}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a model saw in a cohort.

    maps (N, h, w) are pixel logits, or (N, 1, 1) where the heads have none. Images are grouped by
    patient, in the cohort's order.
    """

    subject: Subject
    cohort: Cohort
    maps: Float32s
    decisions: Decisions
    predicted: Floats  # (P,) probability as `predict` gives it; with TTA not the explained one
    thumbnails: Thumbnails
    deletion: Deletion | None  # None where no patient has enough images
    findings: Findings | None = None  # of heads of the family `distribution` alone
    truth: Truth | None = None
    overlap: Overlap | None = None  # of maps with rendered cells; synthetic cohorts only
    unlike: Judgement | None = None  # how unlike training images and patients are, if known

    @cached_property
    def keys(self) -> tuple[PatientKey, ...]:
        """Return what the patients are recognised by."""
        return tuple(patient_keys(self.cohort))

    @property
    def model(self) -> AnyModel:
        """Return the model."""
        return self.subject.model

    @cached_property
    def wording(self) -> Wording:
        """Return what to call the results."""
        return Wording.of_subject(self.subject)

    @property
    def logit(self) -> Floats:
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
        does not read how much cells differ. How unlike those of training images are is said as in
        `predict`.
        """
        paths = [path for paths in self.cohort.images for path in paths]
        table = pd.DataFrame(
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
        return table if self.unlike is None else table.assign(**self.unlike.images)

    @cached_property
    def patients(self) -> pd.DataFrame:
        """Tabulate the patients: id, label (missing where unknown), role, n_images, probability, …

        `calibrated` is missing where the model has no calibration; `predicted` is 1 above its
        threshold; `error` is missing where the label is. `from_images`, `from_<attribute>` and
        `rest` are as in `predict` for a final model; `without_attributes` and `without_images` are
        its probabilities from images, and from attributes, alone. `notes` says what is unusual
        about the attributes. For several models `spread` is as in `predict`.
        """
        seen = self.model.seen(self.keys)
        labels = pd.Series(self.cohort.labels, dtype="Int64")
        labels = labels.mask(labels < 0)
        calibration = self.model.decision.calibration
        raw = self.predicted
        predicted = pd.Series(raw > self.model.threshold).astype("Int64")
        table = pd.DataFrame(
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
        return table.assign(**self._beyond_images())

    def _beyond_images(self) -> dict[str, Any]:
        """Return the columns of final models, and of several models."""
        decisions, columns = self.decisions, dict[str, Any]()
        if self.subject.model_is_final:
            shares = self.shares
            columns |= {f"from_{name}": shares[name].to_numpy() for name in shares}
        for name in ("without_attributes", "without_images", "spread"):
            if (values := getattr(decisions, name)) is not None:
                columns[name] = values
        if self.unlike is not None:
            columns |= {str(name): values for name, values in self.unlike.patients.items()}
        if self.subject.attributes or self.unlike is not None:
            columns["notes"] = self._notes()
        return columns

    def _notes(self) -> list[str]:
        """Return what is unusual about each patient's attributes and images."""
        ids, notes = self.cohort.ids, self.subject.notes()
        unlike = [""] * len(ids) if self.unlike is None else self.unlike.notes
        told = [[*notes.get(id, ()), own] for id, own in zip(ids, unlike, strict=True)]
        return ["; ".join(filter(None, each)) for each in told]

    @cached_property
    def shares(self) -> pd.DataFrame:
        """Tabulate what the images, and each attribute that counts, add to each patient's total.

        These and `rest` add up to it.
        """
        cells = np.bincount(
            self.patient, self.decisions.contribution, minlength=len(self.cohort.ids)
        )
        columns = np.column_stack([cells, self.decisions.shares])
        return pd.DataFrame(columns, columns=[IMAGES, *self.subject.attributes])

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Measure the labelled patients, separately for training, validation and new patients."""
        return self.model.measure(self.patients)

    @cached_property
    def subgroups(self) -> Subgroups | None:
        """Measure groups of labelled patients, those that say most of how well the model predicts.

        The first of new patients, training patients out of fold, validation and training patients
        with five of each class; else of those with a label at all. None without any.
        """
        known = [own for own in self._judged() if len(own[1])]
        enough = [
            own for own in known if own[1]["label"].value_counts().reindex([0, 1]).min() >= FEWEST
        ]
        for of, own in enough or known:
            names = own.index.to_numpy()
            table = self.cohort.table[list(self.cohort.covariates)].iloc[names]
            rows = measure_subgroups(
                table.assign(images=self.cohort.n_images[names]),
                own["probability"].to_numpy(np.float64),
                own["label"].to_numpy(np.int64),
                own["threshold"].to_numpy(np.float64),
                own["fold"].to_numpy(np.int64) if own["fold"].notna().all() else None,
            )
            return Subgroups(of=of, rows=rows)
        return None

    def _judged(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Yield labelled patients with probability, threshold and fold, the most telling first."""
        patients = self.patients.assign(threshold=self.model.threshold, fold=np.nan)
        known = patients[patients["label"].notna()]
        held_out = self.subject.out_of_fold(self.keys, self.decisions.members).dropna()
        for role in ("new", "out of fold", "validation", "train"):
            if role == "out of fold":
                own = held_out.assign(label=patients["label"]).dropna()
            else:
                own = known[known["role"] == role]
            yield role, own

    def truth_scores(self) -> dict[str, float]:
        """Score the images' ranking, and patients whose label was hidden, against the truth."""
        if self.truth is None:
            return {}
        return self.truth.score(self.images, self.patients, self.model.threshold)


def explain(
    model: AnyModel,
    cohort: Cohort,
    settings: ExplainSettings | None = None,
    *,
    stores: Sequence[FeatureStore] = (),
    truth: Truth | None = None,
    progress: Progress = silent,
) -> Explanation:
    """Explain a model's decisions on a cohort.

    Of several members the means are explained. The unflipped images are explained; where the model
    predicts the mean over four flips, `predicted` holds that mean. With the `stores` that were
    extracted from the cohort, one for each backbone of a final model, in its order, their maps are
    explained; the images are only shown. `truth` is used only for scoring. Raises CohortError for a
    table without the attributes that the model reads, SettingsError for members whose contributions
    are of different kinds, StoreError for stores of other images or backbones, ModelError for
    stores with a model that is not final.

    >>> lf.explain(lf.load_model("models/endtoend"), lf.Cohort.load("cohort")).images
    """
    settings = settings or ExplainSettings()
    scoring = settings.scoring
    if stores and not isinstance(model, FinalModel):
        raise ModelError(
            "model must be a final one to be explained from stores; make one with `lymphfeat "
            "finalize`, or leave out the stores."
        )
    subject = subject_of(model, cohort.table, lenient=scoring.allow_missing_attributes)
    sheets = SheetMaker(cohort, subject.crop, int(_FOR_PICTURES * settings.megabytes * 1_000_000))
    if stores:
        check_stores(subject.sources, stores)
    scored = score_cohort(
        subject, cohort, scoring, stores=stores, show=sheets.add, progress=progress
    )
    decisions = decide(subject, scored.kept, cohort.n_images)
    predicted = decisions.probability
    if subject.tta:
        predicted = _predict(model, cohort, stores, scoring, progress)
    mapped = Wording.of_subject(subject).mapped
    overlap = measure_overlap(cohort, scored.maps, subject.crop, truth) if mapped else None
    return Explanation(
        subject=subject,
        cohort=cohort,
        maps=scored.maps,
        decisions=decisions,
        predicted=predicted,
        thumbnails=sheets.made(),
        deletion=delete_images(subject, scored.kept, cohort.n_images, seed=settings.seed),
        findings=Findings.of(subject, scored.kept, cohort.n_images),
        truth=truth,
        overlap=overlap,
        unlike=scored.unlike,
    )


def _predict(
    model: AnyModel,
    cohort: Cohort,
    stores: Sequence[FeatureStore],
    scoring: PredictSettings,
    progress: Progress,
) -> Floats:
    """Return the patients' probabilities (P,) as `predict` gives them."""
    if isinstance(model, FinalModel) and stores:
        own = [replace(store, table=cohort.table) for store in stores]
        found = model.predict_stores(*own, settings=scoring)
    else:
        found = model.predict(cohort, scoring, progress=progress)
    return found.patients["probability"].to_numpy(np.float64)
