"""Whether a finished model does with new patients what `fit-head` said.

    python benchmarks/finished_model.py RESULTS.csv
    python benchmarks/finished_model.py RESULTS.csv --cohort PBC_MIL --truth PBC_MIL_TRUTH
    python benchmarks/finished_model.py RESULTS.csv --show

Heads are fitted on the labelled patients of a cohort under the honest protocol (two repeats of
5-fold); the head chosen inside, fused with the attributes, becomes a model, refit on everybody and
as the members of the first repeat. Both predict the patients whose labels are hidden, from the
store; `images` is the same without the attributes. A figure is as said if it differs from that of
`fit-head` by less than both intervals together: √(half-width of the run's² + half-width of the
hidden patients'²). Synthetic cohorts have 120 labelled and 100 hidden patients; --cohort names
another, in the layout of `lymphfeat synth`, and --truth the CSV of its hidden labels.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

import lymphfeat as lf
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.evaluation.scores import patient_metrics
from lymphfeat.settings import (
    BackboneSettings,
    ExtractSettings,
    FitSettings,
    HeadGrid,
    Sign,
    SyntheticSettings,
)
from lymphfeat.synthetic.cohort import write_synthetic_cohort

WEIGHTS = BackboneSettings(weights="bloodcells-v1")  # those of the published results
DIFFICULTY = {"witness": 0.65, "variety": 0.26, "shift": 0.3}
AGG = ("mean", "std", "mean+std", "topk", "bnsigmoid")
METRICS = ("auc", "ba")
ROW = f"any head, best of {len(AGG)} chosen inside + clinical (late)"


def synthetic(sign: Sign, seed: int, folder: Path) -> Path:
    settings = SyntheticSettings(
        patients=120, test_patients=100, sign=sign, difficulty=DIFFICULTY[sign], seed=seed
    )
    return write_synthetic_cohort(settings, folder / "cohort")


def measure(cohort: Path, truth: Path, name: str, folder: Path, threads: int) -> pd.DataFrame:
    """Return what fit-head said, and what hidden patients say, for each way of making a model."""
    store = lf.extract(
        lf.Cohort.load(cohort),
        folder / "store.h5",
        ExtractSettings(backbone=WEIGHTS, threads=threads, precision="float32"),
    )
    settings = FitSettings(seeds=2, fusions=("late",), threads=threads)
    lf.fit_heads(store, HeadGrid(agg=AGG), settings, folder / "run")
    hidden = Truth.read([truth]).labels
    assert hidden is not None
    found = []
    for way in ("refit", "members"):
        model = lf.finalize(folder / "run", folder / way, row=ROW, members=way == "members")
        for read in ("row", "images"):
            one = model if read == "row" else model.without_attributes()
            patients = one.predict_stores(store).patients
            new = patients[patients["label"].isna()].assign(label=lambda p: p["id"].map(hidden))
            said = model.figures[read]
            got = patient_metrics(new, one.threshold)
            found += [line(name, way, read, metric, said, got) for metric in METRICS]
    return pd.DataFrame(found)


def line(
    name: str, way: str, read: str, metric: str, said: Mapping[str, Any], got: Mapping[str, Any]
) -> dict[str, object]:
    """Compare a figure of the run with that of the hidden patients."""
    names = (metric, f"{metric}_low", f"{metric}_high")
    (before, low, high), (value, test_low, test_high) = (
        [each[end] for end in names] for each in (said, got)
    )
    up = (
        value > before
    )  # then the run's upper half counts, and the lower one of the hidden patients
    halves = (high - before, value - test_low) if up else (before - low, test_high - value)
    return {
        "cohort": name,
        "model": way,
        "reads": read,
        "metric": metric,
        "patients": got["patients"],
        "said": before,
        "said_low": low,
        "said_high": high,
        "got": value,
        "got_low": test_low,
        "got_high": test_high,
        "as_said": bool(abs(value - before) <= np.hypot(*halves) + 1e-9),
    }


def show(results: pd.DataFrame) -> None:
    pd.set_option("display.width", 200)
    print(results.round(3).to_string(index=False))
    print(f"as said: {results['as_said'].sum()} of {len(results)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="CSV that results are added to")
    parser.add_argument("--signs", nargs="+", default=get_args(Sign), choices=get_args(Sign))
    parser.add_argument("--seeds", type=int, default=1, help="synthetic cohorts per sign")
    parser.add_argument("--cohort", type=Path)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    results = pd.read_csv(arguments.results) if arguments.results.exists() else pd.DataFrame()
    todo: list[tuple[str, Sign | None, int]] = [
        (f"{sign} {seed}", sign, seed)
        for seed in range(arguments.seeds)
        for sign in arguments.signs
    ]
    if arguments.cohort:
        todo = [(arguments.cohort.name, None, 0)]
    done = set(results["cohort"]) if len(results) else set()
    for name, sign, seed in () if arguments.show else todo:
        if name in done:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            root = synthetic(sign, seed, folder) if sign else arguments.cohort
            truth = root / "truth.csv" if sign else arguments.truth
            found = measure(root, truth, name, folder, arguments.threads)
        results = pd.concat([results, found], ignore_index=True)
        results.to_csv(arguments.results, index=False)
        print(name, flush=True)
    show(results)


if __name__ == "__main__":
    main()
