"""What groups of patients (laboratories, scanners, persons) do to a result."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lymphfeat.cohort.groups import Groups
from lymphfeat.cohort.splits import Plan
from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.evaluation.subgroups import measure_group
from lymphfeat.runtime.arrays import Labels

_DRAWS = 1999  # permutations of the labels
_LEVEL = 0.05


def check_groups(plan: Plan, ids: Sequence[str], labels: Labels, groups: Groups) -> None:
    """Refuse splits that divide a group (LeakageError) or whose inner splits lack a class.

    ids, labels and groups are (P,), of all patients.
    """
    group_of = dict(zip(ids, groups.tolist(), strict=True))
    label_of = dict(zip(ids, labels.tolist(), strict=True))
    for split in plan.outer:
        shared = {group_of[id] for id in split.train} & {group_of[id] for id in split.validation}
        if shared:
            raise LeakageError(
                f"split {split.id}: training and validation must not share a group; both have "
                f"{', '.join(sorted(shared)[:5])}. Leave --splits away, or use splits by group."
            )
    for split in plan.inner_once:
        if {label_of[id] for id in split.train} != {0, 1}:
            raise SettingsError(
                "groups must leave both classes to train on when two folds are left out; split "
                f"{split.id} has only one. Use --group-folds whole with fewer --folds."
            )


def measure_by_group(
    predictions: pd.DataFrame, group_of: Mapping[str, str], heads: Sequence[str]
) -> pd.DataFrame:
    """Measure every row of a summary, in the order of `heads`, in every group.

    `predictions` are those of an `Outcome`, of one repeat. Returns head, kind, group and the
    columns of `measure_subgroups`: reactive, tumoral, auc, sensitivity, specificity and their
    95 % intervals. A figure about fewer than five patients of a class is missing.
    """
    group = predictions["patient"].map(dict(group_of)).rename("group")
    order = {head: place for place, head in enumerate(heads)}
    rows = []
    grouped = list(predictions.groupby(["head", "kind", group], sort=False))
    for (head, kind, name), own in sorted(grouped, key=lambda it: (order[str(it[0][0])], it[0][2])):
        figures = measure_group(
            own["probability"].to_numpy(float),
            own["label"].to_numpy(np.int64),
            own["threshold"].to_numpy(float),
        )
        rows.append({"head": head, "kind": kind, "group": name, **figures})
    return pd.DataFrame(rows)


def warn_of_groups(labels: Labels, groups: Groups, column: str) -> tuple[str, ...]:
    """Warn in a sentence where groups (P,) predict the labels (P,), -1 unknown.

    By the chi-square statistic of group and label, against permuted labels: valid for groups of
    any size.
    """
    known = labels >= 0
    names, places = np.unique(groups[known], return_inverse=True)
    members = np.eye(len(names))[places]  # (n, G)
    truth = labels[known].astype(np.float64)
    generator = np.random.default_rng(0)
    drawn = generator.permuted(np.tile(truth, (_DRAWS, 1)), axis=1)  # (draws, n)
    sizes, expected = members.sum(0), members.sum(0) * truth.mean()  # (G,)
    scale = expected * (1 - truth.mean())
    observed = float((((truth @ members) - expected) ** 2 / scale).sum())
    chance = (((drawn @ members) - expected) ** 2 / scale).sum(1)  # (draws,)
    p = (1 + (chance >= observed - 1e-9).sum()) / (1 + _DRAWS)
    if p >= _LEVEL:
        return ()
    shares = (truth @ members) / sizes
    low, high = int(shares.argmin()), int(shares.argmax())
    return (
        f"{column} predicts the label: {shares[low]:.0%} of the patients of {names[low]} are "
        f"tumoral, {shares[high]:.0%} of {names[high]} (p = {p:.2g}, permuted labels). A head may "
        "tell groups apart rather than the disease; within a group that does not help it, so trust "
        "the figures by group.",
    )
