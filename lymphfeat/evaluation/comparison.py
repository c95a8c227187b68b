"""What a comparison of rows, paired by split, found."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

SMALLER_IS_BETTER = ("log_loss", "brier")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found.

    rows: name, run, head, mean, low, high: each row's figure with its own corrected 95 % interval,
        cut off at the metric's bounds.
    pairs: name, reference, difference (name − reference), low, high: simultaneous over all pairs
        (Bonferroni), p, p_adjusted (Holm), and last_epoch: whether both are taken at their last
        epoch. They are where a head under `report` is set against a baseline, which has one epoch
        only: the mean of ten best would beat it by being chosen.
    values: (splits, rows) the figures themselves.
    """

    metric: str
    protocol: str
    rows: pd.DataFrame
    pairs: pd.DataFrame
    values: pd.DataFrame

    @property
    def sentences(self) -> tuple[str, ...]:
        """Say which row of each pair is better, or that they are not significantly different."""
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
