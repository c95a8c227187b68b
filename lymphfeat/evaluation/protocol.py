"""Protocols: which fits are made of heads and splits, and what is measured of them.

- `report` (METHOD §4): halves of the patients, one a seed; threshold .5; the mean of each run's ten
  best epochs. Comparable with the published figures, and optimistic: the epochs are chosen on the
  patients they are measured on.
- `honest`: repeated stratified k-fold; whatever is chosen (threshold, calibration, epoch, settings)
  is chosen on out-of-fold probabilities of training patients alone.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.attributes import attribute_matrix, choose_attributes
from lymphfeat.cohort.provenance import refuse_seen
from lymphfeat.cohort.splits import Plan, Split, check_splits, kfold_splits, report_splits
from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.evaluation.baselines import fit_baselines
from lymphfeat.evaluation.decision import BEST_BA, HALF
from lymphfeat.evaluation.fusion import fit_fusions
from lymphfeat.evaluation.leakage import SharedImage, refuse_shared_images
from lymphfeat.evaluation.metrics import all_metrics, log_loss, roc_auc
from lymphfeat.evaluation.scores import (
    PlannedPatients,
    Scores,
    find_warnings,
    measure,
    measure_as_reported,
    select_inside,
    summarise,
)
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, FittedHeads
from lymphfeat.heads.grid import head_name
from lymphfeat.runtime.arrays import Floats, Labels
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import FitSettings, HeadSettings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a protocol found."""

    heads: tuple[HeadSettings, ...]
    splits: tuple[Split, ...]  # the evaluated ones
    epochs: pd.DataFrame  # tidy: head, split, seed, epoch, loss, metrics at threshold .5
    # patient, head, kind, split, seed, probability, calibrated, threshold, predicted, label
    predictions: pd.DataFrame
    runs: pd.DataFrame  # head, kind, split, metrics of the run
    summary: pd.DataFrame  # one row a head, fusion or selection, the best first; then baselines
    warnings: tuple[str, ...]  # in plain words: who does not beat bag size, or clinical alone
    fitted: FittedHeads  # heads x splits, in that order
    thresholds: str  # where the heads' thresholds come from
    patients: PlannedPatients
    scores: tuple[Scores, ...]  # what was measured, in the order of `runs`

    def curves(self, name: str, every: int = 1) -> list[Floats]:
        """Return a row's probabilities of the validation patients after one epoch in `every`.

        One array (E, n) per split, in the patients' order; E is 1 for what has no epochs.
        """
        (scores,) = (scores for scores in self.scores if scores.name == name)
        return _curves(self.patients, self.fitted, scores, every)


class SplitFeatures:
    """Features of each split's own backbone, read when they are asked for."""

    def __init__(
        self,
        splits: Sequence[Split],
        ids: Sequence[str],
        sizes: NDArray[np.int64],
        read: Callable[[Split], Features],
    ) -> None:
        """Take the splits and all patients, with their image counts; `read` gives the features."""
        self.splits = {split.id: split for split in splits}
        self.sizes = sizes
        self.read = read
        self._row = {patient: row for row, patient in enumerate(ids)}

    def rows_of(self, patients: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self._row[patient] for patient in patients])


def run_protocol(
    features: Features | SplitFeatures,
    ids: Sequence[str],
    labels: Labels,
    heads: Sequence[HeadSettings],
    settings: FitSettings,
    *,
    table: pd.DataFrame | None = None,
    splits: Sequence[Split] | None = None,
    seen: Callable[[Split], Collection[str]] = lambda split: (),
    shared: Sequence[SharedImage] = (),
    progress: Progress = silent,
) -> Outcome:
    """Fit every head on every split of the protocol and measure it beside the baselines.

    `ids` and `labels` (P,) are all patients of `features`; those of label -1 are left out. `table`
    has their clinical attributes, a row each. `splits` are taken in place of the protocol's own.
    `seen` returns a split's validation patients whose labels its features come from: LeakageError
    where there are any, and where one of the `shared` images is on both sides of a split.
    """
    if isinstance(features, SplitFeatures):
        plan = own_plan(features, dict(zip(ids, labels.tolist(), strict=True)), settings, splits)
        sizes = features.sizes
    else:
        plan = make_plan(ids, labels, settings, splits)
        sizes = features.bags.sizes.cpu().numpy()
    rule = _rule(settings, plan)
    refuse_seen(
        {id for split in plan.outer for id in seen(split)},
        "the backbone of these features",
        "Extract with per-split fine-tuning, or with weights not trained on them.",
    )
    if not settings.allow_shared_images:
        refuse_shared_images(plan.outer, shared)
    patients = PlannedPatients(ids, labels, plan)
    attributes = _attributes(table, len(ids), settings)
    nested = settings.epoch == "nested"
    if nested and not plan.is_nested:
        raise SettingsError(
            "epoch (=nested) must be chosen on out-of-fold probabilities of training patients; "
            "these features have no backbones for inner splits. Extract with --splits "
            "kfold:5+inner, or use --choose-epoch last."
        )
    outer = [Fit(head=head, split=split) for head in heads for split in plan.outer]
    inner = [
        Fit(head=head, split=split, curve=nested) for head in heads for split in plan.inner_once
    ]
    fitted = _fit(features, outer + inner, settings, progress)
    scores = [_head_scores(patients, fitted, head, nested=nested) for head in heads]
    fused = fit_fusions(patients, scores, settings.fusions, attributes)
    baselines = fit_baselines(patients, sizes, attributes)
    selected = _select(patients, heads, scores) if plan.is_nested else []
    every = (*scores, *fused, *selected, *baselines)
    fitted = fitted.take(range(len(outer)))
    if settings.protocol == "report":
        measured = [
            measure_as_reported(
                patients, found, _curves(patients, fitted, found, settings.evaluate_every)
            )
            for found in every
        ]
    else:
        measured = [
            measure(patients, found, calibration=settings.calibration, threshold=rule)
            for found in every
        ]
    runs = pd.concat([part.runs for part in measured], ignore_index=True)
    predictions = pd.concat([part.predictions for part in measured], ignore_index=True)
    return Outcome(
        heads=tuple(heads),
        splits=plan.outer,
        epochs=_epochs(patients, fitted),
        predictions=predictions,
        runs=runs,
        summary=summarise(runs, predictions, plan),
        warnings=(*_find_gaps(plan, settings), *find_warnings(runs, plan)),
        fitted=fitted,
        thresholds=_describe(rule, plan),
        patients=patients,
        scores=every,
    )


def _find_gaps(plan: Plan, settings: FitSettings) -> tuple[str, ...]:
    """Say what the honest protocol could not choose."""
    if settings.protocol == "report" or plan.is_nested:
        return ()
    return (
        "thresholds do not come from out-of-fold probabilities, and probabilities are not "
        "calibrated, because these features have no backbones for inner splits. Extract with "
        "--splits kfold:5+inner to get both.",
    )


def _rule(settings: FitSettings, plan: Plan) -> str:
    if settings.protocol == "report":
        return HALF
    if settings.threshold == BEST_BA and not plan.is_nested:
        raise SettingsError(
            "threshold (=best-ba) must be chosen on out-of-fold probabilities; these features have "
            "no backbones for inner splits. Extract with --splits kfold:5+inner, or use "
            "--threshold prevalence."
        )
    return settings.threshold


def _describe(rule: str, plan: Plan) -> str:
    if rule == HALF:
        return ".5"
    return f"{rule}, from training patients" + (" out of fold" if plan.is_nested else " as fitted")


def _attributes(table: pd.DataFrame | None, patients: int, settings: FitSettings) -> Floats:
    if table is None:
        return np.empty((patients, 0))
    return attribute_matrix(
        table, choose_attributes(table, settings.attributes), settings.log_attributes
    )


def make_plan(
    ids: Sequence[str],
    labels: Labels,
    settings: FitSettings,
    splits: Sequence[Split] | None = None,
) -> Plan:
    """Return the splits of a protocol, or the given ones, with the inner ones it chooses on."""
    label_of = dict(zip(ids, labels.tolist(), strict=True))
    known = [patient for patient in ids if label_of[patient] >= 0]
    truth = labels[labels >= 0]
    if splits is not None:
        plan = Plan.recorded(splits)
    elif settings.protocol == "report":
        plan = Plan.flat(report_splits(known, truth, seeds=settings.seeds, seed=settings.seed))
    else:
        repeats = kfold_splits(
            known, truth, folds=settings.folds, seeds=settings.seeds, seed=settings.seed
        )
        plan = Plan.flat([split for repeat in repeats for split in repeat.outer])
    check_splits(plan.outer, label_of, "splits")
    if settings.protocol == "report":
        return Plan.flat(plan.outer)
    if plan.is_nested:
        return plan
    return Plan.nested(plan.outer, label_of, folds=settings.folds)


def own_plan(
    features: SplitFeatures,
    labels: Mapping[str, int],
    settings: FitSettings,
    splits: Sequence[Split] | None = None,
) -> Plan:
    """Plan the splits that have features of their own, or those given among them.

    Inner splits are planned where all of them have features, too. Raises LeakageError when nobody
    is left to evaluate, or a given split is not the one that a backbone was fine-tuned on.
    """
    plan = Plan.recorded(split for split in features.splits.values() if split.validation)
    if not plan.outer:
        raise LeakageError(
            "the backbones of these features were fine-tuned on all labelled patients: none are "
            "left to evaluate heads on. Extract with --splits kfold:5, or with frozen weights."
        )
    if splits:
        plan = plan.only([split.id for split in _known(Plan.recorded(splits).outer, plan.outer)])
    check_splits(plan.outer, labels, "splits of these features")
    return Plan.flat(plan.outer) if settings.protocol == "report" else plan


def _known(splits: Sequence[Split], own: Sequence[Split]) -> Sequence[Split]:
    """Return splits, all of which must be among those with a backbone of their own."""
    for split in splits:
        if split not in own:
            raise LeakageError(
                f"split {split.id}: no backbone of these features was fine-tuned on its training "
                f"patients alone; there are backbones for {', '.join(s.id for s in own)}."
            )
    return splits


def _fit(
    features: Features | SplitFeatures,
    fits: Sequence[Fit],
    settings: FitSettings,
    progress: Progress,
) -> FittedHeads:
    """Fit heads, each split's on its own features where it has some."""
    if isinstance(features, Features):
        return _fit_on(features, fits, settings, progress)
    groups: dict[str, list[int]] = {}
    for i, fit in enumerate(fits):
        groups.setdefault(fit.split.id, []).append(i)
    parts = []
    for done, (id, group) in enumerate(groups.items()):
        own = features.read(features.splits[id])
        parts.append(_fit_on(own, [fits[i] for i in group], settings, silent))
        progress(done + 1, len(groups), id)
    order = np.argsort(np.concatenate([*groups.values()]), kind="stable")
    return FittedHeads.joined(parts).take(order.tolist())


def _fit_on(
    features: Features, fits: Sequence[Fit], settings: FitSettings, progress: Progress
) -> FittedHeads:
    return fit_stacked(
        features,
        fits,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        images_per_patient=settings.images_per_patient,
        views=features.n_views,
        tta=settings.tta,
        progress=progress,
    )


def _head_scores(
    patients: PlannedPatients, fitted: FittedHeads, head: HeadSettings, *, nested: bool
) -> Scores:
    """Read a head's probabilities at the last epoch, or at the one best inside each training set.

    Best is the lowest log loss of out-of-fold probabilities.
    """
    position = _positions(fitted, head_name(head))
    outer, inner, seen = patients.empty(), patients.empty(), patients.empty()
    chosen = []
    n_epochs = fitted.curves.shape[1]
    for place, split in enumerate(patients.plan.outer):
        curves = np.full((n_epochs, len(patients.ids)), np.nan)
        for within, rows in patients.inner(place):
            curves[:, rows] = fitted.curves[position[within.id]][:, rows]
        train, validation = patients.train[place], patients.validation[place]
        epoch = n_epochs - 1
        if nested and patients.plan.inner[place]:
            epoch = int(log_loss(curves[:, train], patients.labels[train]).argmin())
            chosen.append(f"epoch {epoch + 1}")
        inner[place, train] = curves[epoch, train]
        outer[place, validation] = fitted.curves[position[split.id], epoch, validation]
        seen[place, train] = fitted.curves[position[split.id], epoch, train]
    return Scores(
        name=head_name(head),
        kind="head",
        outer=outer,
        inner=inner,
        fitted=seen,
        chosen=tuple(chosen),
    )


def _select(
    patients: PlannedPatients, heads: Sequence[HeadSettings], scores: Sequence[Scores]
) -> list[Scores]:
    """Select nested: among the settings of each aggregator, and among all heads."""
    groups: dict[str, list[Scores]] = {}
    for head, found in zip(heads, scores, strict=True):
        groups.setdefault(head.agg, []).append(found)
    selected = [
        select_inside(patients, group, f"{agg}, best of {len(group)} chosen inside")
        for agg, group in groups.items()
        if len(group) > 1
    ]
    if len(groups) > 1:
        name = f"any head, best of {len(scores)} chosen inside"
        selected.append(select_inside(patients, scores, name))
    return selected


def _curves(
    patients: PlannedPatients, fitted: FittedHeads, scores: Scores, every: int
) -> list[Floats]:
    """Return what `Outcome.curves` does; `fitted` holds the fits of the measured splits."""
    if scores.kind != "head":
        return [scores.outer[place, rows][None] for place, rows in enumerate(patients.validation)]
    position = _positions(fitted, scores.name)
    return [
        fitted.curves[position[split.id], every - 1 :: every][:, rows].astype(np.float64)
        for split, rows in zip(patients.plan.outer, patients.validation, strict=True)
    ]


def _positions(fitted: FittedHeads, name: str) -> dict[str, int]:
    """Return where the fits of a head are, by the split's id."""
    return {fit.split.id: i for i, fit in enumerate(fitted.fits) if head_name(fit.head) == name}


def _epochs(patients: PlannedPatients, fitted: FittedHeads) -> pd.DataFrame:
    """Return the learning curves of all outer fits, tidy, at threshold .5."""
    n_epochs = fitted.losses.shape[1]
    frames = []
    for i, fit in enumerate(fitted.fits):
        rows = patients.rows(fit.split.validation)
        curves = fitted.curves[i][:, rows].astype(np.float64)
        frames.append(
            pd.DataFrame(
                {
                    "head": head_name(fit.head),
                    "split": fit.split.id,
                    "seed": fit.split.seed,
                    "epoch": np.arange(1, n_epochs + 1),
                    "loss": fitted.losses[i],
                    **all_metrics(curves, patients.labels[rows]),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def witness_aucs(
    outcome: Outcome,
    features: Features | SplitFeatures,
    patient_of_image: NDArray[np.int64],
    witness: NDArray[np.bool_],
) -> pd.Series:
    """Return for each head how well its image logits find the witnesses, mean over splits.

    `patient_of_image` and `witness` are (N,). Measured on the validation patients who have a
    witness: AUC of their witness images against their other images.
    """
    values: dict[str, list[float]] = {}
    for i, fit in enumerate(outcome.fitted.fits):
        own = features.read(fit.split) if isinstance(features, SplitFeatures) else features
        images = own.images.float().cpu().numpy()  # (N, C)
        rows = features.rows_of(fit.split.validation)
        carriers = np.intersect1d(rows, np.unique(patient_of_image[witness]))
        chosen = np.isin(patient_of_image, carriers)
        logits = outcome.fitted.image_logits(i, images[chosen])
        auc = roc_auc(logits[None].astype(np.float64), witness[chosen].astype(np.int64))[0]
        values.setdefault(head_name(fit.head), []).append(float(auc))
    return pd.Series({head: float(np.nanmean(aucs)) for head, aucs in values.items()})
