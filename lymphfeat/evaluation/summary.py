"""The summary of a run: one row per head, fusion and baseline, and warnings about them."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from lymphfeat.cohort.splits import Plan
from lymphfeat.evaluation.calibration import calibration_error, fit_calibrations
from lymphfeat.evaluation.intervals import Estimate, estimate, estimate_metric, t_half_width
from lymphfeat.evaluation.metrics import METRICS, metric_bounds
from lymphfeat.evaluation.scores import BAG_SIZE, CLINICAL

_NORMAL_95 = 1.96
_KEPT = ("threshold", *METRICS, "log_loss_calibrated", "brier_calibrated")
_VERDICTS = (  # baseline, the kinds of row that must beat it, what it means if they do not
    (
        BAG_SIZE,
        ("head", "selected", "average"),
        "it may have learnt only the number of images per patient",
    ),
    (CLINICAL, ("fusion",), "the images add nothing to the clinical attributes here"),
)


def summarise(runs: pd.DataFrame, predictions: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Return one row per name: means over splits and intervals; the best first, baselines last.

    `runs` and `predictions` are those of `scores.Measured`, of all rows together. Each metric m has
    its corrected 95 % interval in `m_low` and `m_high`, clipped at the metric's bounds; balanced
    accuracy and AUC also have half its width before clipping, `m_half_width`.
    """
    label_of = predictions.drop_duplicates("patient")["label"]
    rarer = int(label_of.value_counts().min())
    calibration = _measure_calibration(predictions, plan)
    rows = []
    for (head, kind), group in runs.groupby(["head", "kind"], sort=False):
        row: dict[str, object] = {"head": head, "kind": kind, "runs": len(group)}
        row |= {name: float(group[name].mean()) for name in _KEPT if name in group}
        row |= calibration.get(str(head), {})
        for name in METRICS:
            found = _estimate(group[name], name, plan, rarer)
            row |= _ends(name, found)
            if name in ("ba", "auc"):
                row[f"{name}_half_width"] = found.half_width
        if "ba_oracle" in group:
            row |= _as_published(group, plan, rarer)
        rows.append(row)
    table = pd.DataFrame(rows)
    last = table["kind"] == "baseline"
    return pd.concat(
        [table[~last].sort_values("ba", ascending=False, kind="stable"), table[last]],
        ignore_index=True,
    )


def _measure_calibration(predictions: pd.DataFrame, plan: Plan) -> dict[str, dict[str, float]]:
    """Measure calibration over all patients of each repeat; a fold has too few to fill bins."""
    repeat = predictions["split"].map({split.id: split.repeat for split in plan.outer})
    found: dict[str, list[dict[str, float]]] = {}
    for (head, _), group in predictions.groupby(["head", repeat.rename("repeat")], sort=False):
        found.setdefault(str(head), []).append(_of_repeat(group))
    return {
        head: {name: float(np.mean([each[name] for each in repeats])) for name in repeats[0]}
        for head, repeats in found.items()
    }


def _of_repeat(predictions: pd.DataFrame) -> dict[str, float]:
    """Return calibration errors, and the slope and intercept that calibrated logits still need."""
    labels = predictions["label"].to_numpy(np.int64)
    found = {"ece": calibration_error(predictions["probability"].to_numpy(float), labels)}
    if "calibrated" in predictions:
        calibrated = predictions["calibrated"].to_numpy(float)
        (left,) = fit_calibrations(calibrated[None], labels)
        found |= {
            "ece_calibrated": calibration_error(calibrated, labels),
            "calibration_slope": left.slope,
            "calibration_intercept": left.intercept,
        }
    return found


def _estimate(values: pd.Series, metric: str, plan: Plan, rarer: int) -> Estimate:
    return estimate_metric(values.to_numpy(float), plan.test_to_train, metric_bounds(metric), rarer)


def _ends(name: str, found: Estimate) -> dict[str, float]:
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def _as_published(group: pd.DataFrame, plan: Plan, rarer: int) -> dict[str, float]:
    """Return what only the `report` protocol has, and intervals computed as the report did.

    Those are too narrow: `ba_half_width_uncorrected` treats the runs, whose patients overlap, as
    independent, and `ba_half_width_published` a run's ten epochs as well (METHOD §4).
    """
    epochs = np.concatenate(group["ba_best_epochs"].tolist())
    published = (
        _NORMAL_95 * epochs.std(ddof=1) / np.sqrt(len(epochs)) if len(epochs) > 1 else np.nan
    )
    return {
        "ba_half_width_uncorrected": t_half_width(group["ba"].to_numpy(float)),
        "ba_half_width_published": float(published),
        "ba_oracle": float(group["ba_oracle"].mean()),
        **_ends("ba_oracle", _estimate(group["ba_oracle"], "ba", plan, rarer)),
        "ba_last": float(group["ba_last"].mean()),
        "auc_last": float(group["auc_last"].mean()),
        "log_loss_best": float(group["log_loss_best"].mean()),
        **_ends("log_loss_best", _estimate(group["log_loss_best"], "log_loss", plan, rarer)),
    }


def find_warnings(runs: pd.DataFrame, plan: Plan) -> tuple[str, ...]:
    """List image rows that do not beat bag size, and fused rows that do not beat clinical.

    A row beats a baseline if the corrected 95 % interval of their difference in AUC, paired by
    split, is above 0. Under `report` heads are taken at their last epoch: a baseline has only one
    epoch, and the best of many would beat it by being chosen. A single split has no interval, and
    the warning then says that nothing follows from it.
    """
    last_epoch = "auc_last" in runs
    auc = runs.pivot(index="split", columns="head", values="auc_last" if last_epoch else "auc")
    kinds = runs.drop_duplicates("head").set_index("head")["kind"]
    found: list[str] = []
    for baseline, wanted, verdict in _VERDICTS:
        if baseline in auc:
            gains = auc[kinds.index[kinds.isin(wanted)]].sub(auc[baseline], axis=0)
            shown = f"AUC {auc[baseline].mean():.2f}"
            shown += ", heads at their last epoch" if last_epoch else ""
            found += _warn_of(gains, plan, f"{baseline} alone", f"({shown}); {verdict}.")
    return tuple(found)


def _warn_of(gains: pd.DataFrame, plan: Plan, baseline: str, verdict: str) -> Iterator[str]:
    """Yield a sentence on the columns of gains in AUC (splits, rows) that are not above 0."""
    lows = {
        str(name): estimate(gain.to_numpy(float), plan.test_to_train).low
        for name, gain in gains.items()
    }
    worse = [name for name, low in lows.items() if low <= 0]
    unknown = [name for name, low in lows.items() if np.isnan(low)]
    if worse:
        does = "does" if len(worse) == 1 else "do"
        yield f"{_listed(worse)}: {does} not beat {baseline} {verdict}"
    if unknown:
        reason = "AUC is undefined in some splits"
        if len(gains) == 1:
            reason = "a single split gives no interval. Use more --seeds"
        yield f"{_listed(unknown)}: not compared with {baseline}, because {reason}."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
