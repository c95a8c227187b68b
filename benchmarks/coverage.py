"""How often an abstaining model calls patients the wrong class: simulated.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --patients 60 163 --alpha 0.2 --repeats 100

Patients are Gaussian in ten features, 30 % of them reactive, the classes apart so that the best
possible AUC is .95. A penalised logistic regression is the model, in each way that patients can be
held out: `members` of a 5-fold, a `refit` on everybody judged by those folds, and a model
`recalibrated` on as many other patients. Shown for each class, over all repeats: the share of new
patients whose class is ruled out, the share called the other class, and the share referred.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from lymphfeat.model.held_out import ANSWERS, GUARANTEES, HeldOut, Scheme, answers
from lymphfeat.runtime.arrays import Floats, Labels

FEATURES, REACTIVE, NEW = 10, 0.3, 1000
APART = float(norm.ppf(0.95)) * np.sqrt(2)  # in standard deviations: AUC .95


def draw(n: int, rng: np.random.Generator) -> tuple[Floats, Labels]:
    """Draw patients (n, FEATURES) and their labels (n,), the same share in each draw."""
    labels = (np.arange(n) >= round(REACTIVE * n)).astype(np.int64)
    inputs = rng.normal(size=(n, FEATURES))
    inputs[:, 0] += APART * labels
    return inputs, labels


def fit(inputs: Floats, labels: Labels) -> LogisticRegression:
    return LogisticRegression(C=0.1).fit(inputs, labels)


def schemes(
    n: int, new: Floats, rng: np.random.Generator
) -> Iterator[tuple[Scheme, HeldOut, Floats]]:
    """Yield each scheme's held-out patients, and its logits of the new patients (M, P)."""
    inputs, labels = draw(n, rng)
    whole = fit(inputs, labels).decision_function(new)[None]
    logits, member, by_member = np.empty(n), np.empty(n, np.int64), []
    folds = StratifiedKFold(5, shuffle=True, random_state=int(rng.integers(2**31)))
    for number, (train, left_out) in enumerate(folds.split(inputs, labels)):
        model = fit(inputs[train], labels[train])
        logits[left_out] = model.decision_function(inputs[left_out])
        member[left_out] = number
        by_member.append(model.decision_function(new))
    one = np.zeros(n, np.int64)
    kept = HeldOut(scheme="members", logits=logits, labels=labels, member=member)
    yield "members", kept, np.stack(by_member)
    yield "refit", replace(kept, scheme="refit", member=one), whole
    others, other_labels = draw(n, rng)
    judged = fit(inputs, labels).decision_function(others)
    other = replace(kept, scheme="recalibrated", member=one, logits=judged, labels=other_labels)
    yield "recalibrated", other, whole


def simulate(n: int, alpha: float, repeats: int) -> dict[Scheme, Floats]:
    """Return for each scheme, class by class, shares ruled out, called the other, referred."""
    found: dict[Scheme, list[Floats]] = {scheme: [] for scheme in GUARANTEES}
    for seed in range(repeats):
        rng = np.random.default_rng([n, seed])
        new, labels = draw(NEW, rng)
        for scheme, held_out, logits in schemes(n, new, rng):
            p = held_out.p_values(logits)
            answered = np.array(answers(p, alpha))
            ruled_out = p[np.arange(NEW), labels] <= alpha
            found[scheme].append(
                np.array(
                    [
                        [
                            ruled_out[labels == label].mean(),
                            (answered[labels == label] == ANSWERS[1 - label]).mean(),
                            (answered[labels == label] == ANSWERS[2]).mean(),
                        ]
                        for label in (0, 1)
                    ]
                )
            )
    return {scheme: np.stack(values) for scheme, values in found.items()}  # (R, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patients", nargs="+", type=int, default=[60, 163, 500])
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=400)
    arguments = parser.parse_args()
    print("mean ± 2 standard errors over repeats; reactive | tumoral")
    for n in arguments.patients:
        for scheme, shares in simulate(n, arguments.alpha, arguments.repeats).items():
            mean, error = shares.mean(0), 2 * shares.std(0, ddof=1) / np.sqrt(len(shares))
            shown = [
                " | ".join(f"{mean[label, i]:.3f} ± {error[label, i]:.3f}" for label in (0, 1))
                for i in range(3)
            ]
            ruled_out, wrong, referred = shown
            print(
                f"n {n:4d} {scheme:13s} ruled out {ruled_out}  wrong {wrong}  referred {referred}"
            )


if __name__ == "__main__":
    main()
