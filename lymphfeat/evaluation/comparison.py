"""The result of comparing rows of runs, paired by split."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

SMALLER_IS_BETTER = ("log_loss", "brier")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of `compare`.

    rows: name, run, head, and the mean of the metric with its own corrected 95 % interval, low and
        high, clipped at the metric's bounds.
    pairs: name, reference, difference (name − reference) with low and high, which hold for all
        pairs simultaneously (Bonferroni), p, p_adjusted (Holm), and last_epoch: whether both rows
        are taken at their last epoch. They are if one is a head under `report` and the other a
        baseline, which has only one epoch: a mean of the ten best would beat it by being chosen.
    values: (splits, rows) the metric in each split.
    """

    metric: str
    protocol: str
    rows: pd.DataFrame
    pairs: pd.DataFrame
    values: pd.DataFrame

    @property
    def sentences(self) -> tuple[str, ...]:
        """Return for each pair which row is better, or that they do not differ significantly."""
        return tuple(self._sentence(pair) for pair in self.pairs.to_dict("records"))

    def _sentence(self, pair: dict[Any, Any]) -> str:
        name, reference, p = pair["name"], pair["reference"], pair["p_adjusted"]
        at = "; both at their last epoch" if pair["last_epoch"] else ""
        if np.isnan(p):
            return f"{name} and {reference} cannot be compared: a single split gives no interval."
        if p >= 0.05:
            return f"{name} and {reference} do not differ significantly (p {p:.2g}{at})."
        better = (pair["difference"] > 0) != (self.metric in SMALLER_IS_BETTER)
        size = abs(pair["difference"])
        return (
            f"{name} is {'better' if better else 'worse'} than {reference} by {size:.3f} "
            f"(p {p:.2g}{at})."
        )
