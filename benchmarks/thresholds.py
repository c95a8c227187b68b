"""Which threshold to decide at, and what is claimed of it without any signal: simulations.

    python benchmarks/thresholds.py noise [--studies 6000]
    python benchmarks/thresholds.py rules [--studies 400]
    python benchmarks/thresholds.py single [--studies 10]
    python benchmarks/thresholds.py ensembles [--studies 1000]

Made-up probabilities with known truth, decided by the very code that decides users' patients.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lymphfeat.evaluation.calibration import METHODS
from lymphfeat.runtime.arrays import Floats
from tests.simulated_thresholds import (
    Ensemble,
    Situation,
    Values,
    collect,
    compare_rules,
    compare_single,
    decide_ensemble,
    decide_noise,
    mean_and_error,
    measure_noise,
)

PATIENTS = (30, 72, 163, 500)
AUCS = (0.7, 0.8, 0.9, 0.95)
ERRORS = tuple(product((0.5, 1.0, 2.0), (0.0, 1.0)))  # slope and shift of the logits


def tell_noise(studies: int) -> None:
    """Tell the mean of figures that should be .5, and how many standard errors it is off."""
    kinds: dict[str, Callable[..., Values]] = {
        "members, probabilities drawn": decide_noise,
        "members, learnt from noise": partial(decide_noise, learnt=True),
        "rows of fit-head, probabilities drawn": measure_noise,
    }
    print(f"\nWithout any signal, {studies} studies: mean ± standard error (distance to .5 in it)")
    print("| | patients | figure | mean | errors from .5 |\n|---|---|---|---|---|")
    for (kind, study), n in product(kinds.items(), (72, 163)):
        for name, values in collect(partial(study, n=n), studies).items():
            mean, error = mean_and_error(values)
            off = (mean - 0.5) / error
            print(f"| {kind} | {n} | {name} | {mean:.4f} ± {error:.4f} | {off:+.1f} |")
        sys.stdout.flush()


def tell_rules(studies: int) -> None:
    """Tell the true balanced accuracy of thresholds, and its paired difference to best-ba."""
    for spread in (1.0, 2.0):
        print(f"\nTumoral patients' scores {spread:g} times as wide, {studies} studies a situation")
        print("| n | rule | mean BA | minus best-ba | AUC .7 | .8 | .9 | .95 | worst situation |")
        print("|---|---|---|---|---|---|---|---|---|")
        for n in PATIENTS:
            _tell_rules_at(n, spread, studies)
            sys.stdout.flush()


def _tell_rules_at(n: int, spread: float, studies: int) -> None:
    found = {}
    for auc, (slope, shift) in product(AUCS, ERRORS):
        situation = Situation(n=n, auc=auc, slope=slope, shift=shift, spread=spread)
        found[situation] = collect(
            partial(compare_rules, situation=situation, methods=METHODS), studies
        )
    for name in next(iter(found.values())):
        gains = {where: values[name] - values["best-ba"] for where, values in found.items()}
        mean, error = _mean_of_means(list(gains.values()))
        ba, _ = _mean_of_means([values[name] for values in found.values()])
        by_auc = [
            np.mean([gain.mean() for where, gain in gains.items() if where.auc == auc])
            for auc in AUCS
        ]
        worst = min(gains, key=lambda where: gains[where].mean())
        at = f"AUC {worst.auc:g}, slope {worst.slope:g}, shift {worst.shift:g}"
        print(
            f"| {n} | {name} | {ba:.4f} | {mean:+.4f} ± {error:.4f} | "
            + " | ".join(f"{value:+.3f}" for value in by_auc)
            + f" | {gains[worst].mean():+.3f} ({at}) |"
        )


def _mean_of_means(values: Sequence[Floats]) -> tuple[float, float]:
    """Return the mean over situations and studies, and its error: studies share their draws."""
    return mean_and_error(np.mean(values, axis=0))


def tell_single(studies: int) -> None:
    """Tell the balanced accuracy on fresh patients of single models, by how they were decided."""
    found: dict[str, list[Values]] = {}
    for n, strength, seed in product((72, 163), (1.0, 2.5), range(studies)):
        for head, values in compare_single(seed, n, strength).items():
            for group in ("all", f"{n} patients", f"epoch {head.split()[-1]}", head.split()[0]):
                found.setdefault(group, []).append(values)
    names = list(found["all"][0])
    print(f"\nSingle models on fresh patients, {studies} cohorts of each kind: mean BA")
    print("| models | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for group, parts in found.items():
        means = [np.mean([part[name] for part in parts]) for name in names]
        print(f"| {group} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    for name in names:
        paired = [part[name] - part["mean as fitted"] for part in found["all"]]
        print(
            f"{name} minus mean as fitted: {np.mean(paired):+.4f}, {np.min(paired):+.3f} to "
            f"{np.max(paired):+.3f}"
        )


def tell_ensembles(studies: int) -> None:
    """Tell what deciding the mean of probabilities at single members' threshold did."""
    print(f"\nFive members, AUC .9 each, {studies} studies: logits (new), probabilities (old)")
    print(
        "| n | slope | own variance | rule | threshold | mean probability at it | called tumoral |"
        " BA new | BA old | new − old |\n|---" + "|---" * 9 + "|"
    )
    for n, (slope, noise), rule in product(
        (72, 163), ((1.0, 0.5), (2.0, 0.25), (2.0, 0.5), (4.0, 0.5)), ("prevalence", "best-ba")
    ):
        ensemble = Ensemble(n=n, slope=slope, noise=noise)
        found = collect(partial(decide_ensemble, ensemble=ensemble, rule=rule), studies)
        gain, error = mean_and_error(found["ba new"] - found["ba old"])
        mean = {name: values.mean() for name, values in found.items()}
        print(
            f"| {n} | {slope:g} | {noise:.0%} | {rule} | {mean['threshold']:.3f} | "
            f"{mean['mean probability at it']:.3f} | {mean['called new']:.1%}, not "
            f"{mean['called old']:.1%} | {mean['ba new']:.3f} | {mean['ba old']:.3f} | "
            f"{gain:+.3f} ± {error:.3f} |"
        )
        if rule == "prevalence":
            gain, error = mean_and_error(found["95 ba new"] - found["95 ba old"])
            reached = f"{mean['95 sensitivity new']:.3f}, old {mean['95 sensitivity old']:.3f}"
            print(
                f"| {n} | {slope:g} | {noise:.0%} | sensitivity .95: {reached} | | | "
                f"{mean['95 called new']:.1%}, not {mean['95 called old']:.1%} | "
                f"{mean['95 ba new']:.3f} | {mean['95 ba old']:.3f} | {gain:+.3f} ± {error:.3f} |"
            )
        sys.stdout.flush()


TELLERS = {
    "noise": (tell_noise, 6000),
    "rules": (tell_rules, 400),
    "single": (tell_single, 10),
    "ensembles": (tell_ensembles, 1000),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=TELLERS)
    parser.add_argument("--studies", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tell, studies = TELLERS[arguments.what]
    tell(arguments.studies or studies)
