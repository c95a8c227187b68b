"""From a row of a `fit-head` run to a final model for new patients; the maps are cached already."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from lymphfeat import __version__
from lymphfeat.cohort.attributes import AttributeRecipe, choose_attributes
from lymphfeat.cohort.splits import Plan, Split
from lymphfeat.errors import ModelError, SettingsError
from lymphfeat.evaluation.averaging import LEARNERS
from lymphfeat.evaluation.calibration import logit
from lymphfeat.evaluation.decision import Decision
from lymphfeat.evaluation.fusion import FUSIONS
from lymphfeat.evaluation.protocol import Outcome, run_protocol
from lymphfeat.evaluation.providers import FeatureProvider, load_features
from lymphfeat.evaluation.recorded_run import RecordedRun
from lymphfeat.evaluation.rows import Row, default_row, find_row
from lymphfeat.evaluation.run_provenance import RunProvenance
from lymphfeat.evaluation.scores import Scores, find_best
from lymphfeat.features.backbones import build_backbone
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.results import EVERYBODY, Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import head_name
from lymphfeat.heads.head import Head
from lymphfeat.heads.portable import portable_head
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.familiarity import Familiarity
from lymphfeat.model.final_model import TENSORS_FILE, FinalModel
from lymphfeat.model.held_out import HeldOut
from lymphfeat.model.members import Member
from lymphfeat.model.model import FINAL_FILE
from lymphfeat.model.scoring import ModelRecipe
from lymphfeat.model.sources import BackboneSource, ImportedSource, Source
from lymphfeat.runtime.arrays import Floats, Labels
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.files import ResultKind, result_folder
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import FitSettings, Way

FINAL_MODEL = ResultKind(name="final model", marks=(FINAL_FILE,), files=(FINAL_FILE, TENSORS_FILE))
Ints = NDArray[np.int64]


def finalize(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    row: str = "",
    members: bool = False,
    stores: Sequence[str | os.PathLike[str]] = (),
    weights: Sequence[str | os.PathLike[str]] = (),
    force: bool = False,
    progress: Progress = silent,
) -> FinalModel:
    """Make the model of a row of an honest run, write it to the folder `out` and return it.

    `row` is a name in the run's summary; by default the head chosen inside, fused if the run has
    fusions. The head is refit on all labelled patients; with `members` the model is the mean of the
    heads of the first repeat's folds. Whatever else is learnt (a choice among heads, how they are
    joined, the fusion, calibration, threshold and operating points) is learnt from the first
    repeat's out-of-fold probabilities. `stores` say where the run's stores are now, `weights` where
    the weights files are that their features were made with.

    Raises SettingsError for a row or run that cannot be made a model, StoreError and ModelError for
    stores or weights other than those of the run.

    >>> lf.fit_heads("cache/features.h5", agg="mean+std", out="runs/spread")
    >>> lf.finalize("runs/spread", "models/spread").predict(lf.Cohort.load("cohort")).patients
    """
    recorded = _Recorded.read(Path(run))
    chosen = recorded.find(row)
    opened = recorded.run.open_stores(stores)
    if not all(FROZEN in store.feature_sets for store in opened):
        raise SettingsError(
            f"run (={run}) must be on features of frozen weights; its backbones were "
            "fine-tuned for each split. Use `lymphfeat endtoend --folds`."
        )
    sources = tuple(_source(store, [Path(each) for each in weights]) for store in opened)
    settings = recorded.settings
    with (
        result_folder(Path(out), FINAL_MODEL, force=force) as folder,
        cpu_threads(settings.threads),
        whole_float32(),
    ):
        features = load_features(
            *(opened, torch.float32, torch.device("cpu")),
            views=settings.views,
            memory=settings.memory_bytes,
        )
        fitting = _Fitting.of(chosen, features, opened[0], recorded, progress)
        model = FinalModel(
            row=chosen.name,
            sources=sources,
            members=fitting.fold_members() if members else (fitting.everybody(),),
            attributes=fitting.recipe,
            facts=_facts(fitting, opened),
            figures=recorded.figures(chosen),
            held_out=fitting.held_out(by_member=members),
            familiarity=_familiarity(opened),
        )
        model.save(folder)
    return model


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a run folder says of how it was fitted, and of its rows."""

    run: RecordedRun
    settings: FitSettings
    splits: tuple[Split, ...]  # of the first repeat

    @classmethod
    def read(cls, folder: Path) -> "_Recorded":
        run = RecordedRun.read(folder)
        if run.settings.protocol != "honest":
            raise SettingsError(
                f"run (={folder}) must be fitted with --protocol honest: a model needs "
                "out-of-fold probabilities."
            )
        if run.settings.epoch == "nested":
            raise SettingsError(
                f"run (={folder}) must be fitted with --choose-epoch last: a model has the weights "
                "of the last epoch, not of those that were chosen inside."
            )
        first = run.splits[0].repeat
        return cls(
            run=run,
            settings=replace(run.settings, precision="float32"),
            splits=tuple(split for split in run.splits if split.repeat == first),
        )

    def find(self, row: str) -> Row:
        if row:
            return find_row(row, self.run.heads, self._fusions)
        return default_row(self.run.heads, self._fusions)

    @property
    def _fusions(self) -> list[Way]:
        asked = self.settings.fusions
        return [way for way in get_args(Way) if way in asked or "all" in asked]

    def figures(self, row: Row) -> dict[str, Mapping[str, Any]]:
        """Return the row's line of the summary, and that of its images alone."""
        lines = {str(line["head"]): line for line in self.run.summary}
        names = {"row": row.name, "images": row.images_only.name}
        return {key: lines[name] for key, name in names.items() if name in lines}


def _source(store: FeatureStore, weights: Sequence[Path]) -> Source:
    """Build the backbone that a store's maps were made with; imported ones have none."""
    if store.is_imported:
        return ImportedSource.of(store)
    recipe, made = store.recipe, ModelRecipe.from_json(store.recipe)
    named = {path.name: str(path) for path in weights}
    source = str(recipe["weights"])
    backbone, loaded = build_backbone(
        recipe["backbone"],
        weights=named.get(source, source),
        image_size=recipe["crop"],
        output_stride=recipe["output_stride"],
        layout=made.layout,
    )
    if loaded.sha256 != recipe["weights_sha256"]:
        raise ModelError(
            f"{store.path}: its maps were made with other weights than {source} has now; name the "
            "weights file with --weights, or extract again."
        )
    return BackboneSource(backbone=backbone, recipe=made)


# --- fitting -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Fitting:
    """A row's heads, fitted on the first repeat's folds."""

    row: Row
    features: FeatureProvider
    settings: FitSettings
    outcome: Outcome
    recipe: AttributeRecipe
    attributes: Floats  # (P, D)
    channels: tuple[int, ...]  # of each store

    @classmethod
    def of(
        cls,
        row: Row,
        features: FeatureProvider,
        store: FeatureStore,
        recorded: _Recorded,
        progress: Progress,
    ) -> "_Fitting":
        settings = replace(recorded.settings, fusions=(row.fusion,) if row.fusion else ())
        plan = features.plan(settings, recorded.splits)
        _check_covered(plan, store, recorded.run.folder)
        outcome = run_protocol(
            features, plan, row.heads, settings, table=store.table, progress=progress
        )
        labelled = store.table[np.asarray(store.labels) >= 0]
        names: Sequence[str] = ()
        if row.fusion:
            names = choose_attributes(labelled, settings.attributes, groups=settings.groups)
        recipe = AttributeRecipe.of(labelled, names, settings.log_attributes)
        return cls(
            row=row,
            features=features,
            settings=settings,
            outcome=outcome,
            recipe=recipe,
            attributes=recipe.matrix(store.table),
            channels=tuple(own.channels for own in features.for_split(plan.outer[0]).sets),
        )

    @property
    def labels(self) -> Labels:
        return self.outcome.patients.labels

    def everybody(self) -> Member:
        """Refit on all labelled patients; learn all else from the folds' validation patients."""
        known = np.flatnonzero(self.labels >= 0)
        ids = tuple(self.outcome.patients.ids[known].tolist())
        split = Split(id=EVERYBODY, seed=self.settings.seed, repeat=0, train=ids, validation=())
        own = self.features.for_split(split)
        fitted = fit_stacked(
            own,
            [Fit(head=head, split=split, curve="nobody") for head in self.row.heads],
            epochs=self.settings.epochs,
            sampling=Sampling(
                batch_size=self.settings.batch_size,
                images_per_patient=self.settings.images_per_patient,
                views=own.n_views,
            ),
            memory=self.settings.trainer_memory,
        )
        heads = [
            portable_head(fitted, position, self.channels)
            for position in range(len(self.row.heads))
        ]
        return self._member(heads, known, _out_of_fold)

    def fold_members(self) -> tuple[Member, ...]:
        """Make a member of each fold; all it learns, it learns from its training patients."""
        return tuple(self._of_fold(place) for place in range(len(self.outcome.splits)))

    def _of_fold(self, place: int) -> Member:
        fitted, split = self.outcome.fitted, self.outcome.splits[place]
        at = {
            head_name(fit.head): position
            for position, fit in enumerate(fitted.fits)
            if fit.split.id == split.id
        }
        heads = [
            portable_head(fitted, at[head_name(head)], self.channels) for head in self.row.heads
        ]
        train = self.outcome.patients.train[place]
        return self._member(heads, train, lambda scores: scores.inner[place])

    def held_out(self, *, by_member: bool) -> dict[str, HeldOut]:
        """Return what the row, and its images alone, said of the first repeat's patients."""
        scores = {each.name: each for each in self.outcome.scores}
        names = {"images": self.row.images_only.name, "row": self.row.name}
        return {
            key: self._held_out(scores[name], by_member=by_member) for key, name in names.items()
        }

    def _held_out(self, scores: Scores, *, by_member: bool) -> HeldOut:
        patients = self.outcome.patients
        rows = np.concatenate(patients.validation)
        fold = np.repeat(np.arange(len(patients.train)), [len(r) for r in patients.validation])
        labels, judged = self.labels[rows], _out_of_fold(scores)[rows]
        decisions = [
            self._decision(scores.inner[place][train], self.labels[train])
            for place, train in enumerate(patients.train)
        ]
        return HeldOut.of(
            judged,
            labels,
            fold,
            measured_by=decisions,
            kept=decisions if by_member else [self._decision(judged, labels)],
            ids=patients.ids[rows].tolist(),
        )

    def _member(
        self, heads: Sequence[Head], rows: Ints, judged: Callable[[Scores], Floats]
    ) -> Member:
        """Learn how heads are joined, fused and decided, from patients `rows` (n,).

        `judged` returns the probabilities (P,) of a row of the summary that are not trained on
        these patients.
        """
        named = {scores.name: judged(scores)[rows] for scores in self.outcome.scores}
        known = [named[head_name(head)] for head in self.row.heads]  # (n,) each
        labels = self.labels[rows]
        mixture = None
        if self.row.joint == "selected":
            heads = [heads[find_best(np.stack(known), labels)]]
        elif self.row.joint:
            mixture = LEARNERS[self.row.joint](logit(np.column_stack(known)), labels)
        fusion = None
        if self.row.fusion:
            image = logit(named[self.row.images_only.name])  # a mixture's out of fold, too
            inputs = np.column_stack([image, self.attributes[rows]])
            fusion = FUSIONS[self.row.fusion](inputs, labels)
        return Member(
            heads=tuple(heads),
            mixture=mixture,
            fusion=fusion,
            decision=self._decision(named[self.row.name], labels),
            image_decision=self._decision(named[self.row.images_only.name], labels),
        )

    def _decision(self, probabilities: Floats, labels: Labels) -> Decision:
        return Decision.learn(
            probabilities,
            labels,
            rule=self.settings.threshold,
            method=self.settings.calibration,
            source=f"out-of-fold probabilities of {len(labels)} training patients",
        )


def _check_covered(plan: Plan, store: FeatureStore, folder: Path) -> None:
    """Raise SettingsError unless every labelled patient is out of fold once."""
    counts = Counter(patient for split in plan.outer for patient in split.validation)
    known = [id for id, label in zip(store.ids, store.labels.tolist(), strict=True) if label >= 0]
    once = sum(counts[id] == 1 for id in known)
    if once < len(known) or counts.total() > once:
        raise SettingsError(
            f"run (={folder}) must hold every labelled patient out once, for the threshold and "
            f"calibration of its model; its splits do so with {once} of {len(known)}. Fit the "
            "heads again with --folds."
        )


def _out_of_fold(scores: Scores) -> Floats:
    """Return each patient's probability in the split that holds it out: (P,)."""
    return np.asarray(np.nanmax(scores.outer, axis=0, initial=-1, where=~np.isnan(scores.outer)))


def _familiarity(stores: Sequence[FeatureStore]) -> Familiarity:
    """Learn what labelled patients' images are like."""
    first = stores[0]
    known = first.labels >= 0  # (P,)
    rows = np.flatnonzero(np.repeat(known, first.n_images))
    statistics = first.image_statistics
    return Familiarity.learn(
        [store.pooled()[rows, 0].astype(np.float64) for store in stores],
        None if statistics is None else statistics.iloc[rows],
        first.n_images[known].tolist(),
    )


def _facts(fitting: _Fitting, stores: Sequence[FeatureStore]) -> TrainingFacts:
    labelled = np.flatnonzero(fitting.labels >= 0)
    provenance = RunProvenance.of(stores)
    ids = fitting.outcome.patients.ids[labelled].tolist()
    split = Split(id=EVERYBODY, seed=0, repeat=0, train=tuple(ids), validation=())
    return TrainingFacts(
        trained_on=tuple(ids),
        provenance=provenance.of_heads(split),
        cohort=stores[0].recipe["cohort"],
        settings=asdict(fitting.settings),
        epochs=fitting.settings.epochs,
        seed=fitting.settings.seed,
        initial_weights=", ".join(str(store.recipe["weights"]) for store in stores),
        initial_weights_sha256=", ".join(str(store.recipe["weights_sha256"]) for store in stores),
        versions={"lymphfeat": __version__, "torch": torch.__version__},
    )
