"""Both protocols side by side: `report` minus `honest` is the optimism (METHOD §4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.evaluation import BEST_EPOCHS, Floats, Labels
from lymphfeat.files import result_folder
from lymphfeat.fit import OPTIMISM_FILES, RUN, Run, fit_head
from lymphfeat.intervals import draw_counts
from lymphfeat.metrics import ORACLE_THRESHOLDS
from lymphfeat.optimism_figure import draw_optimism
from lymphfeat.processes import is_first, join_processes
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import FitSettings, HeadSettings
from lymphfeat.splits import Split
from lymphfeat.store import FeatureStore

DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class BothRuns:
    """The same heads under both protocols.

    table: head, kind, report and honest, each with its corrected 95 % interval (`…_low`, `…_high`),
        report_half_width_uncorrected and …_published (too narrow), optimism (report − honest) with
        its 95 % bootstrap interval, and by_epochs (what of it comes of the choice of epochs:
        report − its last epoch).
    """

    report: Run
    honest: Run
    table: pd.DataFrame


def fit_both(
    store: FeatureStore,
    heads: Sequence[HeadSettings],
    settings: FitSettings,
    out: Path,
    *,
    splits: Sequence[Split] | None = None,
    truth: Path | None = None,
    save: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> BothRuns:
    """Run `fit_head` under either protocol into `out`/report and `out`/honest, and set them off.

    Fusions and nested epochs, which need training patients' out-of-fold probabilities, are of the
    honest run alone. Also writes optimism.csv and optimism.png. The folder is replaced as a whole,
    at the end; raises SettingsError as `fit_head` does.
    """
    join_processes()
    with result_folder(out, RUN, force=force, writes=is_first()) as folder:
        runs = {
            protocol: fit_head(
                store,
                heads,
                _under(settings, protocol),
                folder / protocol,
                splits=splits,
                truth=truth,
                save=save,
                progress=progress,
            )
            for protocol in ("honest", "report")  # the honest one first: it refuses more
        }
        table = set_off(runs["report"], runs["honest"])
        if is_first():
            csv, png = (folder / name for name in OPTIMISM_FILES)
            table.to_csv(csv, index=False, float_format="%.6g")
            draw_optimism(table, png)
    report, honest = (replace(runs[name], folder=out / name) for name in ("report", "honest"))
    return BothRuns(report=report, honest=honest, table=table)


def _under(settings: FitSettings, protocol: str) -> FitSettings:
    if protocol == "report":
        return replace(settings, protocol="report", epoch="last", fusions=())
    return replace(settings, protocol="honest")


def set_off(report: Run, honest: Run) -> pd.DataFrame:
    """Join the summaries of both protocols, in the order of the report's."""
    both = report.outcome.summary.merge(
        honest.outcome.summary, on="head", suffixes=("_report", "_honest")
    )
    low, high = np.transpose([bootstrap_optimism(report, honest, head) for head in both["head"]])
    return pd.DataFrame(
        {
            "head": both["head"],
            "kind": both["kind_report"],
            "report": both["ba_report"],
            "report_low": both["ba_low_report"],
            "report_high": both["ba_high_report"],
            "report_half_width_uncorrected": both["ba_half_width_uncorrected"],
            "report_half_width_published": both["ba_half_width_published"],
            "honest": both["ba_honest"],
            "honest_low": both["ba_low_honest"],
            "honest_high": both["ba_high_honest"],
            "optimism": both["ba_report"] - both["ba_honest"],
            "optimism_low": low,
            "optimism_high": high,
            "by_epochs": both["ba_report"] - both["ba_last"],
        }
    )


# --- the interval --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Whom a row calls tumoral in one split."""

    labels: Labels  # (n,) of the validation patients
    rows: NDArray[np.int64]  # (n,) of the validation patients, among all
    # (E, T, n): after every epoch at every threshold that the protocol chooses among; else 1, 1
    tumoral: NDArray[np.bool_]


def bootstrap_optimism(
    report: Run, honest: Run, head: str, *, oracle: bool = False
) -> tuple[float, float]:
    """Return the 95 % interval of a row's report − honest balanced accuracy.

    See `optimism_interval`; with `oracle` the report's thresholds are chosen as well.
    """
    return optimism_interval(
        report.outcome.patients.labels,
        _report_calls(report, head, oracle=oracle),
        _honest_calls(honest, head),
        seed=report.settings.seed,
    )


def optimism_interval(
    labels: Labels,
    report: Sequence[Calls],
    honest: Sequence[Calls],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the difference in mean accuracy, of patients (P,).

    Every draw takes patients with replacement, within each class, and the report's halves with
    replacement, and measures both protocols on the same patients. Epochs and thresholds are chosen
    anew in each draw, as the report chooses them; nothing is fitted anew. The interval is that of
    the draws about their mean, moved to the estimate: choosing among patients some of whom are
    repeated is more optimistic, so the draws themselves lie too high. It lies within [−1, 1]; NaN
    when no draw has both classes in a split of each protocol.
    """
    generator = np.random.default_rng(seed)
    counts = draw_counts(labels, draws, generator)  # (B, P)
    n = len(report)
    halves = generator.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)  # (B, S)
    found = mean_accuracy(report, counts, halves) - mean_accuracy(honest, counts)
    found = found[np.isfinite(found)]
    if not len(found):
        return np.nan, np.nan
    once = np.ones((1, len(labels)))
    estimate = mean_accuracy(report, once) - mean_accuracy(honest, once)
    ends = np.quantile(found - found.mean(), [0.025, 0.975]) + estimate
    low, high = np.clip(ends, -1, 1).tolist()
    return low, high


def mean_accuracy(calls: Sequence[Calls], counts: Floats, splits: Floats | None = None) -> Floats:
    """Return the mean over splits of balanced accuracies, of patients counted (B, P) times: (B,).

    In each split it is the mean of the ten best epochs, each at its best threshold. `splits` (B, S)
    counts the splits, None each once. A split in which a draw lacks a class is left out of it.
    """
    found = np.stack([_accuracy(each, counts[:, each.rows]) for each in calls], axis=1)  # (B, S)
    weights = np.isfinite(found) * (1 if splits is None else splits)
    with np.errstate(invalid="ignore"):
        return np.asarray((np.nan_to_num(found) * weights).sum(1) / weights.sum(1))


def _accuracy(calls: Calls, counts: Floats) -> Floats:
    """Return one split's: (B,), NaN where a class was not drawn."""
    shares = []
    for label, right in ((1, calls.tumoral), (0, ~calls.tumoral)):
        own = counts[:, calls.labels == label].astype(np.float32)  # (B, n of this class)
        hits = right[..., calls.labels == label].reshape(-1, own.shape[1])  # (E * T, n)
        with np.errstate(invalid="ignore"):
            shares.append(own @ hits.T.astype(np.float32) / own.sum(1, keepdims=True))
    accuracy = (shares[0] + shares[1]) / 2
    accuracy = accuracy.reshape(len(counts), *calls.tumoral.shape[:2]).max(2)  # (B, E)
    best = min(BEST_EPOCHS, accuracy.shape[1])
    return np.asarray(np.partition(accuracy, -best, axis=1)[:, -best:].mean(1), np.float64)


def _report_calls(run: Run, head: str, *, oracle: bool) -> list[Calls]:
    patients = run.outcome.patients
    thresholds = ORACLE_THRESHOLDS if oracle else np.array([0.5])
    curves = run.outcome.curves(head, run.settings.evaluate_every)
    return [
        Calls(
            labels=patients.labels[rows],
            rows=rows,
            tumoral=probabilities[:, None] > thresholds[:, None],
        )
        for rows, probabilities in zip(patients.validation, curves, strict=True)
    ]


def _honest_calls(run: Run, head: str) -> list[Calls]:
    patients, predictions = run.outcome.patients, run.outcome.predictions
    table = predictions[predictions["head"] == head].pivot(
        index="split", columns="patient", values="predicted"
    )
    ids = [split.id for split in patients.plan.outer]
    tumoral = table.reindex(index=ids, columns=patients.ids).to_numpy(float) > 0  # (S, P)
    return [
        Calls(labels=patients.labels[rows], rows=rows, tumoral=tumoral[place, rows][None, None])
        for place, rows in enumerate(patients.validation)
    ]
