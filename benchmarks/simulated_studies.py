"""How often 95 % intervals hold the truth, how optimistic the report's protocol is without signal.

    python benchmarks/simulated_studies.py [--studies 200]

Simulated cohorts with known truth, measured by the very code that measures users' cohorts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from lymphfeat.evaluation.protocol import run_protocol
from lymphfeat.evaluation.providers import SharedFeatures
from lymphfeat.settings import FitSettings, HeadSettings
from tests.simulations import coverage, noise_features, run_optimism_study, run_study

HEAD = HeadSettings(agg="top1", unit="image", k_agg=1, lr=0.03)
LABELS = np.array([0, 1, 1] * 20)


def tell_coverage(studies: int) -> None:
    print(f"95 % intervals that hold the truth, of {studies} studies")
    print("| protocol | Nadeau–Bengio | of a paired difference | splits as independent |")
    print("|---|---|---|---|")
    plans: dict[str, dict[str, Any]] = {
        "honest, 2 × 3-fold, 60 patients": {},
        "honest, 3 × 5-fold, 60 patients": {"folds": 5, "repeats": 3},
        "honest, 5 × 5-fold, 163 patients": {"folds": 5, "repeats": 5, "patients": 163},
        "10 halves at .5, 163 patients": {"repeats": 10, "patients": 163, "protocol": "report"},
    }
    for name, options in plans.items():
        found = coverage([run_study(seed, **options) for seed in range(studies)])
        print(f"| {name} | {found.ours:.1%} | {found.difference:.1%} | {found.naive:.1%} |")


def tell_optimism_coverage(studies: int) -> None:
    print(f"\n95 % intervals that hold the optimism, of {studies} studies")
    print("| honest splits | covered | width / standard deviation of the optimism |")
    print("|---|---|---|")
    many: dict[str, Any] = {"patients": 163, "folds": 5, "repeats": 5}
    plans: dict[str, dict[str, Any]] = {
        "2 × 3-fold, 60 patients": {},
        "2 × 3-fold, 60 patients, no signal": {"strength": ()},
        "3 × 5-fold, 60 patients": {"folds": 5, "repeats": 3},
        "5 × 5-fold, 163 patients": many,
        "5 × 5-fold, 163 patients, no signal": many | {"strength": ()},
        "5 × 5-fold, 163 patients, strong": many | {"strength": (2.5, 1.0)},
    }
    for name, options in plans.items():
        found = [run_optimism_study(seed, **options) for seed in range(studies)]
        values = np.array([study.optimism for study in found])
        true, spread = values.mean(), values.std()
        covered = np.mean([study.low <= true <= study.high for study in found])
        width = np.mean([study.high - study.low for study in found]) / spread
        print(f"| {name} | {covered:.1%} | {width:.1f} |")


def tell_optimism(cohorts: int) -> None:
    figures: dict[str, list[float]] = {
        "honest": [],
        "report": [],
        "report, last epoch": [],
        "report, oracle": [],
    }
    inside = 0
    for seed in range(cohorts):
        features = SharedFeatures.of(noise_features(seed, np.full(60, 5), LABELS))
        for protocol in ("honest", "report"):
            settings = FitSettings(protocol=protocol, seeds=10, epochs=40, seed=seed, threads=1)
            plan = features.plan(settings)
            row = run_protocol(features, plan, [HEAD], settings).summary.iloc[0]
            figures[protocol].append(row["ba"])
            if protocol == "honest":
                inside += row["ba_low"] <= 0.5 <= row["ba_high"]
            else:
                figures["report, last epoch"].append(row["ba_last"])
                figures["report, oracle"].append(row["ba_oracle"])
    print(f"\nBalanced accuracy without any signal, mean of {cohorts} cohorts of 60 patients")
    for name, values in figures.items():
        print(f"  {name:20s} {np.mean(values):.3f}  ({np.min(values):.3f} to {np.max(values):.3f})")
    print(f"  honest within .5 ± its interval: {inside} of {cohorts}")


def tell_shortcut(cohorts: int) -> None:
    warned = 0
    for seed in range(cohorts):
        sizes = np.where(LABELS == 1, 9, 4) + np.random.default_rng(seed).integers(0, 4, 60)
        features = SharedFeatures.of(noise_features(seed, sizes, LABELS))
        settings = FitSettings(seeds=4, epochs=30, seed=seed, threads=1)
        found = run_protocol(features, features.plan(settings), [HEAD], settings)
        warned += any("does not beat bag size" in line for line in found.warnings)
    print(f"\nBag size the only signal: warned of in {warned} of {cohorts} cohorts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--cohorts", type=int, default=10)
    arguments = parser.parse_args()
    tell_coverage(arguments.studies)
    tell_optimism_coverage(arguments.studies)
    tell_optimism(arguments.cohorts)
    tell_shortcut(arguments.cohorts)
