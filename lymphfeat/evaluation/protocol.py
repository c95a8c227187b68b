"""Protocols: heads are fitted on the splits of a plan, and measured next to baselines.

- `report` (METHOD §4): halves of the patients, one per seed; threshold .5; the mean of each run's
  ten best epochs. Comparable with the published results, and optimistic: the epochs are chosen on
  the patients they are measured on.
- `honest`: repeated stratified k-fold; whatever is chosen (threshold, calibration, epoch, settings)
  is chosen on out-of-fold probabilities of training patients alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.attributes import attribute_matrix, choose_attributes
from lymphfeat.cohort.splits import Plan, Split
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.averaging import combine_heads
from lymphfeat.evaluation.baselines import fit_baselines
from lymphfeat.evaluation.decision import BEST_BA, HALF
from lymphfeat.evaluation.fusion import choose_fusions, fit_fusions
from lymphfeat.evaluation.metrics import all_metrics, log_loss, roc_auc
from lymphfeat.evaluation.providers import FeatureProvider
from lymphfeat.evaluation.rows import image_rows
from lymphfeat.evaluation.scores import (
    Measured,
    PlannedPatients,
    Scores,
    measure,
    measure_as_reported,
    select_inside,
)
from lymphfeat.evaluation.summary import find_warnings, summarise
from lymphfeat.heads.engine.engine import Finished, fit_stacked
from lymphfeat.heads.engine.kept import KeptFits
from lymphfeat.heads.engine.logistic import PENALTIES
from lymphfeat.heads.engine.results import Curve, Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import head_name
from lymphfeat.heads.registry import DistributionAggregator, find_aggregator
from lymphfeat.runtime.arrays import Floats
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import FitSettings, HeadSettings


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a protocol: tables, learning curves and the fitted heads."""

    heads: tuple[HeadSettings, ...]
    splits: tuple[Split, ...]  # the evaluated ones
    epochs: pd.DataFrame  # tidy: head, split, seed, epoch, loss, metrics at threshold .5
    # patient, head, kind, split, seed, probability, calibrated, threshold, predicted, label
    predictions: pd.DataFrame
    runs: pd.DataFrame  # head, kind, split, metrics of the run
    summary: pd.DataFrame  # one row per head, fusion or selection, best first; then baselines
    warnings: tuple[str, ...]  # sentences: which rows do not beat bag size, or clinical alone
    fitted: FittedHeads  # heads x splits, in that order
    thresholds: str  # where the heads' thresholds come from
    patients: PlannedPatients
    scores: tuple[Scores, ...]  # what was measured, in the order of `runs`

    def curves(self, name: str, every: int = 1) -> list[Floats]:
        """Return the probabilities of a row of the summary after one epoch in `every`.

        One array (E, n) per split, of its validation patients; E is 1 for rows without epochs.
        """
        (scores,) = (scores for scores in self.scores if scores.name == name)
        return _curves(self.patients, self.fitted, scores, every)


@dataclass(frozen=True, kw_only=True)
class FinishedHead:
    """A head that is fitted on all splits, measured while others are fitted."""

    name: str
    protocol: str
    ba: float
    ba_low: float  # of its corrected 95 % interval
    ba_high: float
    auc: float
    # of fitting it: its share of the time of what was fitted together; None: it was kept
    seconds: float | None


Tell = Callable[[FinishedHead], None]


def untold(head: FinishedHead) -> None:
    """Ignore that a head is finished: the default."""


def run_protocol(
    features: FeatureProvider,
    plan: Plan,
    heads: Sequence[HeadSettings],
    settings: FitSettings,
    *,
    table: pd.DataFrame | None = None,
    kept: KeptFits | None = None,
    tell: Tell = untold,
    progress: Progress = silent,
) -> Outcome:
    """Fit every head on every split of a plan, and measure it next to the baselines.

    `plan` is the provider's, made with the same settings; whether its splits leak labels or images
    is for the caller to check (`refuse_leaks`). `table` has one row of clinical attributes per
    patient, in the provider's order. Fits that were `kept` are not repeated. `tell` is called with
    every head: as soon as it is finished where all splits share one set of features and one process
    fits them, else in the end. Raises SettingsError, before anything is fitted, for a threshold,
    epoch or fusion that cannot be learnt without inner splits or attributes.
    """
    rule = _threshold_rule(plan, settings)
    _check_epoch(plan, settings)
    attributes = _attributes(table, len(features.ids), settings)
    fusions = choose_fusions(settings.fusions, plan, attributes)
    patients = PlannedPatients(features.ids, features.labels, plan)
    finishing = _Finishing(patients, heads, settings, rule, tell)
    fitted = _fit(features, plan, heads, settings, kept, finishing.note, progress)
    scores, measured = finishing.all_of(fitted)
    scores += _join(patients, heads, scores)
    fused = fit_fusions(patients, scores, fusions, attributes)
    baselines = fit_baselines(patients, features.n_images, attributes)
    scores = [*scores, *fused, *baselines]
    fitted = fitted.take(range(len(heads) * len(plan.outer)))  # the fits on measured splits
    others = scores[len(heads) :]
    measured += [_measure(patients, fitted, each, settings, rule) for each in others]
    runs = pd.concat([each.runs for each in measured], ignore_index=True)
    predictions = pd.concat([each.predictions for each in measured], ignore_index=True)
    return Outcome(
        heads=tuple(heads),
        splits=plan.outer,
        epochs=_epochs(patients, fitted),
        predictions=predictions,
        runs=runs,
        summary=summarise(runs, predictions, plan),
        warnings=(
            *_find_gaps(plan, settings),
            *_find_edges(fitted),
            *find_warnings(runs, plan),
        ),
        fitted=fitted,
        thresholds=_describe(rule, plan),
        patients=patients,
        scores=tuple(scores),
    )


class _Finishing:
    """Measures every head when the last of its fits is finished, and tells of it."""

    def __init__(
        self,
        patients: PlannedPatients,
        heads: Sequence[HeadSettings],
        settings: FitSettings,
        rule: str,
        tell: Tell,
    ) -> None:
        self._patients, self._settings, self._rule, self._tell = patients, settings, rule, tell
        plan = patients.plan
        self._of_each = len(plan.outer) + len(plan.inner_once)  # fits
        self._left = dict.fromkeys(heads, self._of_each)
        self._seconds: dict[HeadSettings, float] = {}
        self._finished: dict[HeadSettings, tuple[Scores, Measured]] = {}

    def note(self, positions: Sequence[int], fitted: FittedHeads, seconds: float | None) -> None:
        """Note that some of the fits are finished; those of other sets of features are not here."""
        for head, n in Counter(fitted.fits[position].head for position in positions).items():
            self._left[head] -= n
            if seconds is not None:
                own = seconds * n / len(positions)
                self._seconds[head] = self._seconds.get(head, 0.0) + own
            here = len(fitted.positions[head_name(head)])
            if not self._left[head] and here == self._of_each:
                self._finish(head, fitted)

    def all_of(self, fitted: FittedHeads) -> tuple[list[Scores], list[Measured]]:
        """Return what was measured of all heads, in their order."""
        for head in self._left:
            if head not in self._finished:
                self._finish(head, fitted)
        scores, measured = zip(*(self._finished[head] for head in self._left), strict=True)
        return list(scores), list(measured)

    def _finish(self, head: HeadSettings, fitted: FittedHeads) -> None:
        scores = _head_scores(self._patients, fitted, head, self._settings)
        measured = _measure(self._patients, fitted, scores, self._settings, self._rule)
        self._finished[head] = scores, measured
        if self._tell is untold:
            return
        table = summarise(measured.runs, measured.predictions, self._patients.plan)
        values = (float(table[name].iloc[0]) for name in ("ba", "ba_low", "ba_high", "auc"))
        ba, ba_low, ba_high, auc = values
        self._tell(
            FinishedHead(
                name=scores.name,
                protocol=self._settings.protocol,
                ba=ba,
                ba_low=ba_low,
                ba_high=ba_high,
                auc=auc,
                seconds=self._seconds.get(head),
            )
        )


def _measure(
    patients: PlannedPatients,
    fitted: FittedHeads,
    scores: Scores,
    settings: FitSettings,
    rule: str,
) -> Measured:
    """Measure one row of the summary as the protocol does."""
    if settings.protocol == "report":
        curves = _curves(patients, fitted, scores, settings.evaluate_every)
        return measure_as_reported(patients, scores, curves)
    return measure(patients, scores, calibration=settings.calibration, threshold=rule)


def _find_gaps(plan: Plan, settings: FitSettings) -> tuple[str, ...]:
    """Warn of what the honest protocol could not choose."""
    if settings.protocol == "report" or plan.is_nested:
        return ()
    return (
        "thresholds do not come from out-of-fold probabilities, and probabilities are not "
        "calibrated, because these features have no backbones for inner splits. Extract with "
        "--splits kfold:5+inner to get both.",
    )


def _find_edges(fitted: FittedHeads) -> tuple[str, ...]:
    """Warn of penalties chosen at an end of their path: a better one may lie beyond."""
    names = [head_name(fit.head) for fit in fitted.fits]
    found = []
    for penalty, meaning in (
        (PENALTIES[0], "the smallest: usual where the classes are far apart, else try --penalty"),
        (PENALTIES[-1], "the largest: their features say little about the label"),
    ):
        counts = Counter(
            name
            for position, name in enumerate(names)
            if fitted.chosen(position).split(",")[0] == f"penalty {penalty:.2g}"
        )
        if counts:
            heads = ", ".join(
                f"{name} in {n} of {names.count(name)} splits" for name, n in counts.items()
            )
            found.append(f"{heads}: chose the penalty {penalty:g}, {meaning}.")
    return tuple(found)


def _threshold_rule(plan: Plan, settings: FitSettings) -> str:
    """Return the rule of `decision.RULES` by which thresholds are learnt."""
    if settings.protocol == "report":
        return HALF
    if settings.threshold == BEST_BA and not plan.is_nested:
        raise SettingsError(
            "threshold (=best-ba) must be chosen on out-of-fold probabilities; these features have "
            "no backbones for inner splits. Extract with --splits kfold:5+inner, or use "
            "--threshold prevalence."
        )
    return settings.threshold


def _check_epoch(plan: Plan, settings: FitSettings) -> None:
    if settings.epoch == "nested" and not plan.is_nested:
        raise SettingsError(
            "epoch (=nested) must be chosen on out-of-fold probabilities of training patients; "
            "these features have no backbones for inner splits. Extract with --splits "
            "kfold:5+inner, or use --choose-epoch last."
        )


def _describe(rule: str, plan: Plan) -> str:
    if rule == HALF:
        return ".5"
    return f"{rule}, from training patients" + (" out of fold" if plan.is_nested else " as fitted")


def _attributes(table: pd.DataFrame | None, patients: int, settings: FitSettings) -> Floats:
    if table is None:
        return np.empty((patients, 0))
    return attribute_matrix(
        table,
        choose_attributes(table, settings.attributes, groups=settings.groups),
        settings.log_attributes,
    )


def _fit(
    features: FeatureProvider,
    plan: Plan,
    heads: Sequence[HeadSettings],
    settings: FitSettings,
    kept: KeptFits | None,
    finished: Finished,
    progress: Progress,
) -> FittedHeads:
    """Fit heads x measured splits, then heads x inner splits, one set of features at a time."""
    nested = settings.epoch == "nested"
    outer = _fits(heads, plan.outer, "everyone" if nested else "held-out")
    inner = _fits(heads, plan.inner_once, "held-out" if nested else "nobody")
    fits = outer + inner
    groups: dict[str, list[int]] = {}
    for position, fit in enumerate(fits):
        groups.setdefault(features.set_of(fit.split), []).append(position)
    if len(groups) == 1:
        return _fit_together(features, fits, settings, kept, finished, progress)
    parts = []
    for done, (name, group) in enumerate(groups.items()):
        own = [fits[i] for i in group]
        parts.append(_fit_together(features, own, settings, kept, finished, silent))
        progress(done + 1, len(groups), name)
    order = np.argsort(np.concatenate([*groups.values()]), kind="stable")
    return FittedHeads.joined(parts).take(order.tolist())


def _fits(heads: Sequence[HeadSettings], splits: Sequence[Split], curve: Curve) -> list[Fit]:
    return [Fit(head=head, split=split, curve=curve) for head in heads for split in splits]


def _fit_together(
    features: FeatureProvider,
    fits: Sequence[Fit],
    settings: FitSettings,
    kept: KeptFits | None,
    finished: Finished,
    progress: Progress,
) -> FittedHeads:
    """Fit heads on splits that share one set of features."""
    own = features.for_split(fits[0].split)
    sampling = Sampling(
        batch_size=settings.batch_size,
        images_per_patient=settings.images_per_patient,
        views=own.n_views,
    )
    return fit_stacked(
        own,
        fits,
        epochs=settings.epochs,
        sampling=sampling,
        tta=settings.tta,
        memory=settings.trainer_memory,
        kept=kept,
        finished=finished,
        progress=progress,
    )


def _head_scores(
    patients: PlannedPatients, fitted: FittedHeads, head: HeadSettings, settings: FitSettings
) -> Scores:
    """Read a head's probabilities at the last epoch, or at the best one inside each training set.

    Best is the lowest log loss of out-of-fold probabilities.
    """
    position = fitted.positions[head_name(head)]
    outer, inner, seen = patients.empty(), patients.empty(), patients.empty()
    chosen = []
    n_epochs = fitted.curves.shape[1]
    for place, split in enumerate(patients.plan.outer):
        curves = np.full((n_epochs, len(patients.ids)), np.nan)
        for within, rows in patients.inner(place):
            curves[:, rows] = fitted.curves[position[within.id]][:, rows]
        train, validation = patients.train[place], patients.validation[place]
        epoch, own = n_epochs - 1, fitted.chosen(position[split.id])
        if settings.epoch == "nested" and not own:
            epoch = int(log_loss(curves[:, train], patients.labels[train]).argmin())
            own = f"epoch {epoch + 1}"
        chosen.append(own)
        inner[place, train] = curves[epoch, train]
        outer[place, validation] = fitted.curves[position[split.id], epoch, validation]
        seen[place, train] = fitted.curves[position[split.id], epoch, train]
    return Scores(
        name=head_name(head),
        kind="head",
        outer=outer,
        inner=inner,
        fitted=seen,
        chosen=tuple(chosen) if any(chosen) else (),
    )


def _join(
    patients: PlannedPatients, heads: Sequence[HeadSettings], scores: Sequence[Scores]
) -> list[Scores]:
    """Choose, average and stack heads inside each training set, as the rows of a summary do."""
    of_head = dict(zip(heads, scores, strict=True))
    found = []
    for row in image_rows(heads, nested=patients.plan.is_nested):
        own = [of_head[head] for head in row.heads]
        if row.joint == "selected":
            found.append(select_inside(patients, own, row.name))
        elif row.joint:
            found.append(combine_heads(patients, own, row))
    return found


def _curves(
    patients: PlannedPatients, fitted: FittedHeads, scores: Scores, every: int
) -> list[Floats]:
    """Return what `Outcome.curves` returns; `fitted` are the fits on measured splits."""
    if scores.kind != "head":
        return [scores.outer[place, rows][None] for place, rows in enumerate(patients.validation)]
    position = fitted.positions[scores.name]
    return [
        fitted.curves[position[split.id], every - 1 :: every][:, rows].astype(np.float64)
        for split, rows in zip(patients.plan.outer, patients.validation, strict=True)
    ]


def _epochs(patients: PlannedPatients, fitted: FittedHeads) -> pd.DataFrame:
    """Return the learning curves of the fits on measured splits, tidy, at threshold .5."""
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
    outcome: Outcome, features: FeatureProvider, witness: NDArray[np.bool_]
) -> dict[str, float]:
    """Return for each head how well its image logits find the witness images, mean over splits.

    `witness` (N,) says which images are. Measured on the validation patients who have a witness:
    ROC-AUC of their witness images against their other images.
    """
    patient = np.repeat(np.arange(len(features.ids)), features.n_images)  # (N,)
    carriers = np.unique(patient[witness])
    values: dict[str, list[float]] = {head_name(head): [] for head in outcome.heads}
    units = {_scored_unit(head) for head in outcome.heads}
    for split, rows in zip(outcome.splits, outcome.patients.validation, strict=True):
        shown = np.intersect1d(rows, carriers)
        truth = witness[np.isin(patient, shown)].astype(np.int64)
        own = features.for_split(split).sets
        read = {unit: [each.images_of(shown, unit) for each in own] for unit in units}
        for i, fit in enumerate(outcome.fitted.fits):
            if fit.split.id == split.id:
                sets, sizes = read[_scored_unit(fit.head)], features.n_images[shown]
                logits = outcome.fitted.image_logits(i, sets, sizes).astype(np.float64)
                values[head_name(fit.head)].append(float(roc_auc(logits, truth)))
    return {head: float(np.nanmean(aucs)) for head, aucs in values.items()}


def _scored_unit(head: HeadSettings) -> str:
    """Return what images are made of when a head scores them: a linear score is of the average."""
    is_linear = not isinstance(find_aggregator(head), DistributionAggregator)
    return "image" if is_linear else head.unit
