"""A final model: backbones, heads, attributes and decision in one folder.

The folder holds `final.json` and `final.safetensors`; no pickle, no path to anything else. The
members read the same backbones, whose features are computed once, or each its own.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from scipy.special import logit as special_logit
from torch import Tensor, nn

from lymphfeat.cohort.attributes import AttributeRecipe
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.images import VIEWS
from lymphfeat.cohort.provenance import PatientKey
from lymphfeat.errors import ModelError
from lymphfeat.evaluation.calibration import Calibration
from lymphfeat.evaluation.decision import Decision, combine
from lymphfeat.evaluation.predictive_values import PredictiveValues, check_prevalence
from lymphfeat.features.backbones import weights_sha256
from lymphfeat.features.store import FeatureStore
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.blank import empty_head
from lymphfeat.heads.head import Head, ReadOut
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.familiarity import Familiarity
from lymphfeat.model.folder import build_blank, load_tensors, read_facts, write_model
from lymphfeat.model.held_out import GUARANTEES, MEASURED, HeldOut, answers
from lymphfeat.model.members import IMAGES, Member
from lymphfeat.model.model import FINAL_FILE
from lymphfeat.model.predictions import Predictions, image_table, measure_by_role, patient_table
from lymphfeat.model.sources import (
    ImportedSource,
    Kept,
    Pooled,
    Source,
    check_stores,
    refuse_imported,
    source_from_json,
)
from lymphfeat.runtime.arrays import Floats
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.files import recover
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.settings import HeadSettings, PredictSettings

FORMAT, FORMAT_VERSION = "lymphfeat-final-model", 1
TENSORS_FILE = "final.safetensors"


@dataclass(frozen=True, kw_only=True)
class FinalModel:
    """A row of `fit-head`, ready for new patients: one refit on everybody, or several members.

    Also the members of `endtoend --folds --fusion`. The members' calibrated logits are averaged.
    `without_attributes` predicts from images alone, with the decision that was learnt for that.
    """

    row: str
    sources: tuple[Source, ...]
    members: tuple[Member, ...]
    attributes: AttributeRecipe
    facts: TrainingFacts
    # the honest figures of the row, and of its images alone, as they were measured
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tta: bool = False  # whether `predict` averages over the four flips by default
    # what was said of patients held out: by the "row", and by its "images" alone; not in old models
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)
    familiarity: Familiarity | None = None  # what training images were like; not in old models
    # what another laboratory's patients taught about the members' mean, by the same names
    recalibration: Mapping[str, Decision] = field(default_factory=dict)
    images_only: bool = False
    operating_point: str = MEASURED  # the sensitivity that the threshold aims at
    prevalence: float | None = None  # of tumoral patients where the model is used
    alpha: float | None = None  # the model abstains at this level

    @property
    def fused(self) -> bool:
        """Whether the clinical attributes count."""
        return not self.images_only and self.members[0].fusion is not None

    @property
    def decision(self) -> Decision:
        """The decision about the probability, which is that of the members' mean."""
        if self.recalibration:
            return self.recalibration[self.judging].about_calibrated()
        return combine(
            [each.decision if self.fused else each.image_decision for each in self.members]
        )

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float | None]]:
        """How `endtoend` measured the patients that it was trained on, out of fold."""
        return self.facts.metrics

    @property
    def threshold(self) -> float:
        """The calibrated probability above which a patient is called tumoral."""
        return self.decision.threshold

    @property
    def threshold_from(self) -> str:
        """What the threshold was chosen on."""
        return self.decision.threshold_from

    @property
    def reads_images(self) -> bool:
        """Whether it has backbones; a model of imported features predicts stores alone."""
        return not any(isinstance(source, ImportedSource) for source in self.sources)

    @property
    def compares(self) -> tuple[str, ...]:
        """What of new images is compared with training: features, and names of statistics."""
        known = self.familiarity
        return () if known is None else ("features", *known.statistics)

    @property
    def judging(self) -> str:
        """What judges patients: the "row", or its "images" alone."""
        return "row" if self.fused else "images"

    def without_attributes(self) -> "FinalModel":
        """Return the model that reads images only."""
        return replace(self, images_only=True)

    def at_sensitivity(self, target: float) -> "FinalModel":
        """Decide by every member's operating point for a sensitivity; see `Model`."""
        recalibration = {
            name: each.at_sensitivity(target) for name, each in self.recalibration.items()
        }
        members = [
            replace(
                member,
                decision=member.decision.at_sensitivity(target),
                image_decision=member.image_decision.at_sensitivity(target),
            )
            for member in self.members
        ]
        return replace(
            self,
            members=tuple(members),
            recalibration=recalibration,
            operating_point=f"{target:g}",
        )

    def at_prevalence(self, prevalence: float) -> "FinalModel":
        """Return the model for another share of tumoral patients than in training.

        Its predictions also have the probability at this prevalence; `predictive_values` says what
        its decisions are worth. The threshold stays. Raises SettingsError unless the prevalence is
        between 0 and 1, ModelError for a model of an earlier version.
        """
        check_prevalence(prevalence)
        self._judged()
        return replace(self, prevalence=prevalence)

    def abstaining(self, alpha: float = 0.1) -> "FinalModel":
        """Return the model that also answers: reactive, tumoral, or refer.

        It calls a patient one class if the other can be ruled out at level `alpha`
        (class-conditional conformal sets; `guarantee` says what holds of them). Raises
        SettingsError if there are too few patients for this level, ModelError for a model of an
        earlier version.
        """
        self._judged().check_alpha(alpha)
        return replace(self, alpha=alpha)

    @property
    def guarantee(self) -> str:
        """What holds of the answers of an abstaining model."""
        return f"{GUARANTEES[self._judged().scheme]}. Under a shift nothing is guaranteed."

    @property
    def predictive_values(self) -> PredictiveValues | None:
        """What the decisions are worth at the model's prevalence; None if it has none."""
        if self.prevalence is None:
            return None
        return PredictiveValues.at(self.prevalence, self._judged().rates[self.operating_point])

    def _judged(self) -> HeldOut:
        """Return what was said of patients held out, by what decides."""
        if self.judging not in self.held_out:
            raise ModelError(
                "model must keep what it said of held-out patients, to abstain or to give "
                "predictive values; it was made by an earlier version. Make it again with "
                "`lymphfeat finalize`."
            )
        return self.held_out[self.judging]

    @property
    def out_of_fold(self) -> pd.DataFrame:
        """What the row said of its training patients, each held out.

        By id: probability (calibrated), threshold, fold (the member that judged, 0 if the model was
        refit on everybody). Empty for models of earlier versions, and for recalibrated ones.
        """
        columns = ["probability", "threshold", "fold"]
        known = self.held_out.get(self.judging)
        if known is None or not known.ids or known.scheme == "recalibrated":
            return pd.DataFrame(columns=columns, dtype=float)
        members = [m.decision if self.fused else m.image_decision for m in self.members]
        thresholds = np.array([each.about_calibrated().threshold for each in members])
        values = (expit(known.logits), thresholds[known.member], known.member)
        return pd.DataFrame(dict(zip(columns, values, strict=True)), index=list(known.ids))

    def measure(self, patients: pd.DataFrame) -> dict[str, dict[str, float | None]]:
        """Measure predicted patients with a label, as `Model.measure` does."""
        return measure_by_role(patients, self.threshold)

    def seen(self, patients: Sequence[PatientKey]) -> list[str]:
        """Return what the model has seen of each patient, as one of `SEEN`."""
        return self.facts.seen(patients)

    # --- predicting ------------------------------------------------------------------------------

    def predict(
        self,
        cohort: Cohort,
        settings: PredictSettings | None = None,
        *,
        progress: Progress = silent,
    ) -> Predictions:
        """Predict every patient and image of a cohort, each only from its own data.

        With `settings.tta` logits are the mean over the four flips. Raises CohortError for a table
        without the attributes that the model reads, ModelError for a model of imported features.
        """
        settings, backbones = settings or PredictSettings(), refuse_imported(self.sources)
        table, views = self._table(cohort, settings), self._views(settings)
        with cpu_threads(settings.threads), whole_float32():
            read = [
                source.keep_images(
                    *(cohort, self._reader(number), views, settings),
                    part_of(progress, number, len(self.sources), ""),
                    measured=self.familiarity is not None,
                )
                for number, source in enumerate(backbones)
            ]
            kept, statistics = [own for own, _ in read], read[0][1]
            predictions = self._predictions(cohort, table, patient_keys(cohort), kept)
            return self._compared(predictions, kept, statistics)

    def predict_stores(
        self, *stores: FeatureStore, settings: PredictSettings | None = None
    ) -> Predictions:
        """Predict the patients of stores from their feature maps, as `predict` from their images.

        There must be one store per backbone of the model, in its order, over the same images.
        Raises StoreError for stores whose maps are not those of the model's backbones, or that lack
        the flipped views that `settings.tta` asks for.
        """
        settings = settings or PredictSettings()
        check_stores(self.sources, stores)
        first = stores[0]
        table, views = self._table(first, settings), self._views(settings)
        with cpu_threads(settings.threads), whole_float32():
            kept = [
                source.keep_maps(store, self._reader(number), views, settings.batch_size)
                for number, (source, store) in enumerate(zip(self.sources, stores, strict=True))
            ]
            predictions = self._predictions(first, table, first.keys, kept)
            return self._compared(predictions, kept, first.image_statistics)

    def _views(self, settings: PredictSettings) -> tuple[str, ...]:
        """Return the flips whose logits are averaged."""
        tta = self.tta if settings.tta is None else settings.tta
        return VIEWS if tta else VIEWS[:1]

    def _sources_of(self, member: Member) -> Sequence[int]:
        return member.sources or range(len(self.sources))

    def _reader(self, source: int) -> Kept | Pooled:
        """Return what keeps of a source's images what its readers need of them.

        Heads that read several sources read pooled images.
        """
        readers = [member for member in self.members if source in self._sources_of(member)]
        if any(len(self._sources_of(member)) > 1 for member in readers):
            return Pooled()
        heads: list[Head] = [head for member in readers for head in member.heads]
        # To say how familiar images are, their mean is kept after what the heads keep.
        return Kept(heads if self.familiarity is None else [*heads, Pooled()])

    def _table(self, cohort: Cohort | FeatureStore, settings: PredictSettings) -> pd.DataFrame:
        """Return the cohort's table, checked before any image is read."""
        table = cohort.table
        if settings.allow_missing_attributes:
            table = self.attributes.complete(table)
        if self.fused:
            self.attributes.matrix(table)
        return table

    def _read(self, kept: Sequence[Tensor], images: Bags) -> list[list[ReadOut]]:
        """Return what each member's heads read out of what was kept of images, (N, K) a source."""
        parts = [self._parts(number, own) for number, own in enumerate(kept)]
        read = []
        for member in self.members:
            own = [parts[number] for number in self._sources_of(member)]
            read.append(
                [
                    head.read_out(torch.cat([next(each) for each in own], dim=-1), images)
                    for head in member.heads
                ]
            )
        return read

    def _parts(self, source: int, kept: Tensor) -> Iterator[Tensor]:
        """Yield what each head that reads a source needs of images, (N, U, D): from (N, K)."""
        reader, own = self._reader(source), self.sources[source]
        if isinstance(reader, Pooled):
            return repeat(kept[:, None])
        return iter(reader.split(kept, own.pixels, own.channels))

    def _predictions(
        self,
        cohort: Cohort | FeatureStore,
        table: pd.DataFrame,
        keys: Sequence[PatientKey],
        kept: Sequence[Tensor],
    ) -> Predictions:
        """Make tables of what was kept of a cohort's images in every view, (V, N, K) a source."""
        attributes = self.attributes.matrix(table) if self.fused else None
        images = Bags.of(cohort.n_images)
        views = [self._read(view, images) for view in zip(*kept, strict=True)]
        groups = self.attributes.groups
        last, last_of_images = self.last_calibration(self.judging), self.last_calibration("images")
        logits, alone, parts, tables = [], [], [], []
        for number, member in enumerate(self.members):
            read = [view[number] for view in views]
            image = np.mean([member.image_logits(each) for each in read], axis=0)  # (P,)
            logits.append(last.of_logits(member.fused_logits(image, attributes)))
            alone.append(last_of_images.of_logits(member.fused_logits(image, None)))
            parts.append(last.slope * member.parts(image, attributes, groups))
            values = member.image_values(read, image, attributes, groups, images)  # (3, N)
            tables.append(np.stack([*values[:2], last.slope * values[2]]))
        calibrated = np.mean(logits, axis=0)  # (P,)
        patients = patient_table(
            cohort,
            self.seen(keys),
            expit(calibrated),
            self.decision,
        )
        if len(self.members) > 1:
            patients["spread"] = np.std(expit(logits), axis=0)
        patients = patients.assign(
            **self._at_prevalence(calibrated),
            **self._answers(np.stack(logits)),
            **self._speaks(calibrated, np.mean(parts, axis=0)),
        )
        if self.fused:
            patients["without_attributes"] = expit(np.mean(alone, axis=0))
            notes = self.attributes.notes(table)
            patients["notes"] = ["; ".join(notes.get(id, ())) for id in cohort.ids]
        values = np.mean(tables, axis=0).astype(np.float32)  # (3, N)
        return Predictions(patients=patients, images=image_table(cohort, *values))

    def last_calibration(self, name: str) -> Calibration:
        """Return the calibration of the members' mean."""
        last = self.recalibration.get(name)
        return (last.calibration if last else None) or Calibration()

    def _at_prevalence(self, logit: Floats) -> dict[str, Floats]:
        """Move calibrated logits (P,) by the odds of the prevalence (Bayes' rule)."""
        if self.prevalence is None:
            return {}
        moved = special_logit(self.prevalence) - special_logit(self._judged().prevalence)
        return {"probability_at_prevalence": np.asarray(expit(logit + moved))}

    def _answers(self, logits: Floats) -> dict[str, Any]:
        """Answer by conformal sets, from the members' calibrated logits (M, P)."""
        if self.alpha is None:
            return {}
        held_out = self._judged()
        if held_out.scheme == "recalibrated":
            logits = logits.mean(0, keepdims=True)
        p = held_out.p_values(logits)  # (P, 2)
        return {"answer": answers(p, self.alpha), "p_reactive": p[:, 0], "p_tumoral": p[:, 1]}

    def _compared(
        self, predictions: Predictions, kept: Sequence[Tensor], statistics: pd.DataFrame | None
    ) -> Predictions:
        """Say which images and patients are unlike those of training."""
        if self.familiarity is None:
            return predictions
        pooled = [
            own[0, :, -source.channels :].double().numpy()  # (N, C)
            for own, source in zip(kept, self.sources, strict=True)
        ]
        sizes = predictions.patients["n_images"].tolist()
        return predictions.judged(self.familiarity.judge(pooled, statistics, sizes))

    def _speaks(self, logit: Floats, parts: Floats) -> dict[str, Floats]:
        """Name what images and each attribute add to the logit (P,); `rest` is the same for all."""
        names = [IMAGES, *(self.attributes.names if self.fused else ())]
        columns = {f"from_{name}": parts[:, i] for i, name in enumerate(names)}
        return columns | {"rest": logit - parts.sum(1)}

    # --- the folder ------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `final.safetensors` and `final.json` to a folder, creating it if needed."""
        network = self._network()
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "row": self.row,
            "sources": [source.to_json() for source in self.sources],
            "members": [member.to_json() for member in self.members],
            "attributes": self.attributes.to_json(),
            "decision": self.decision.to_json(),
            "figures": self.figures,
            "tta": self.tta,
            "recalibration": {name: each.to_json() for name, each in self.recalibration.items()},
            "held_out": {name: each.to_json() for name, each in self.held_out.items()},
            "tensors_sha256": weights_sha256(network),
            "training": self.facts.to_json(),
            "familiarity": None if self.familiarity is None else self.familiarity.to_json(),
        }
        write_model(network, Path(folder, TENSORS_FILE), content, Path(folder, FINAL_FILE))

    def _network(self) -> nn.ModuleDict:
        """Name the tensors: source.<number>.<timm's key>, member.<number>.<head's number>.<key>.

        familiarity.<source's number>.<key> are those of `FeatureDistance`.
        """
        known = () if self.familiarity is None else self.familiarity.features
        return nn.ModuleDict(
            {
                "source": nn.ModuleList(source.network for source in self.sources),
                "member": nn.ModuleList(nn.ModuleList(member.heads) for member in self.members),
                "familiarity": nn.ModuleList(known),
            }
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "FinalModel":
        """Read a final model's folder; raises ModelError, saying what to do, if it is damaged."""
        folder = Path(folder)
        recover(folder)
        hint = "make one with `lymphfeat finalize`"
        content = read_facts(folder / FINAL_FILE, FORMAT, FORMAT_VERSION, hint=hint)
        model = build_blank(content, _build, folder / FINAL_FILE, folder / TENSORS_FILE)
        sha256 = str(content.get("tensors_sha256"))
        load_tensors(model._network(), folder / TENSORS_FILE, sha256, facts=FINAL_FILE)
        return model


def _build_member(content: Mapping[str, Any], channels: Sequence[int]) -> Member:
    """Build a member, its heads blank, of a model whose sources have these numbers of channels."""
    places = content.get("sources") or range(len(channels))
    if not content["heads"] or any(place < 0 for place in places):
        raise ValueError("a member must have heads, and sources by their numbers")
    own = [channels[place] for place in places]
    heads = [empty_head(HeadSettings(**each), *own) for each in content["heads"]]
    return Member.from_json(content, heads)


def _build(content: Mapping[str, Any]) -> FinalModel:
    sources = tuple(source_from_json(each) for each in content["sources"])
    channels = [source.channels for source in sources]
    members = [_build_member(member, channels) for member in content["members"]]
    known = content.get("familiarity")
    if not members or not sources:
        raise ValueError("it must have members and sources")
    model = FinalModel(
        row=str(content["row"]),
        sources=sources,
        members=tuple(members),
        attributes=AttributeRecipe.from_json(content["attributes"]),
        facts=TrainingFacts.from_json(content["training"]),
        figures=dict(content["figures"]),
        tta=bool(content.get("tta", False)),  # models of earlier versions have none
        recalibration={
            name: Decision.from_json(each)
            for name, each in content.get("recalibration", {}).items()
        },
        held_out={
            name: HeldOut.from_json(each) for name, each in content.get("held_out", {}).items()
        },
        familiarity=None if known is None else Familiarity.from_json(known, channels),
    )
    _ = model.decision, model.without_attributes().decision  # members that do not agree fail here
    for known_of in model.held_out.values():
        if not np.isin(known_of.member, range(len(members))).all():
            raise ValueError("held-out patients must be judged by a member")
    return model
