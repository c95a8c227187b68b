"""What a decision is worth at a prevalence: predictive values from sensitivity and specificity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.special import expit

from lymphfeat.errors import SettingsError
from lymphfeat.runtime.arrays import Labels

_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How many patients were called rightly by a decision that was not learnt from them."""

    tumoral: int
    called_tumoral: int  # of the tumoral patients
    reactive: int
    called_reactive: int  # of the reactive patients

    @classmethod
    def of(cls, predicted: Labels, labels: Labels) -> "Rates":
        """Count predictions (n,) against labels (n,), each 0 or 1."""
        tumoral, right = labels == 1, predicted == labels
        return cls(
            tumoral=int(tumoral.sum()),
            called_tumoral=int((right & tumoral).sum()),
            reactive=int((~tumoral).sum()),
            called_reactive=int((right & ~tumoral).sum()),
        )

    @property
    def sensitivity(self) -> float:
        """The share of tumoral patients that are called tumoral."""
        return self.called_tumoral / self.tumoral if self.tumoral else math.nan

    @property
    def specificity(self) -> float:
        """The share of reactive patients that are called reactive."""
        return self.called_reactive / self.reactive if self.reactive else math.nan


@dataclass(frozen=True, kw_only=True)
class PredictiveValue:
    """The share of the patients called one way that are so, with its 95 % interval."""

    value: float  # NaN where nobody is called this way
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PredictiveValues:
    """The predictive values of a decision at a prevalence of tumoral patients."""

    prevalence: float
    positive: PredictiveValue  # of "tumoral"
    negative: PredictiveValue  # of "reactive"

    @classmethod
    def at(cls, prevalence: float, rates: Rates) -> "PredictiveValues":
        """Return the predictive values by Bayes' rule.

        Sensitivity and specificity are taken to be those of other prevalences. The intervals are
        those of Mercaldo, Lau and Zhou (2007), of adjusted logits, for a known prevalence. Raises
        SettingsError unless the prevalence is between 0 and 1.
        """
        check_prevalence(prevalence)
        odds = prevalence / (1 - prevalence)
        wrong = rates.reactive - rates.called_reactive, rates.tumoral - rates.called_tumoral
        return cls(
            prevalence=prevalence,
            positive=_value(
                odds, (rates.called_tumoral, rates.tumoral), (wrong[0], rates.reactive)
            ),
            negative=_value(
                1 / odds, (rates.called_reactive, rates.reactive), (wrong[1], rates.tumoral)
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Return ppv and npv, each with `_low` and `_high`, and the prevalence."""
        found: dict[str, Any] = {"prevalence": self.prevalence}
        for name, each in (("ppv", self.positive), ("npv", self.negative)):
            found |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
        return found


def check_prevalence(prevalence: float) -> None:
    """Raise SettingsError unless a prevalence is between 0 and 1."""
    if not 0 < prevalence < 1:
        raise SettingsError(
            f"prevalence (={prevalence:g}) must be above 0 and below 1: the share of tumoral "
            "patients among those to be predicted."
        )


def _value(odds: float, right: tuple[int, int], wrong: tuple[int, int]) -> PredictiveValue:
    """Return the odds of one class times its rate of such calls to the other's, as a share.

    right, wrong: the patients of the class, and of the other, so called, and how many there are.
    """
    calls = odds * _share(*right), _share(*wrong)
    more = _Z**2 / 2
    of_right, of_wrong = (_share(called + more, n + 2 * more) for called, n in (right, wrong))
    middle = math.log(odds * of_right / of_wrong)
    variance = (1 - of_right) / of_right / (right[1] + 2 * more)
    variance += (1 - of_wrong) / of_wrong / (wrong[1] + 2 * more)
    half = _Z * math.sqrt(variance)
    low, high = expit(middle - half), expit(middle + half)
    value = calls[0] / sum(calls) if sum(calls) > 0 else math.nan
    return PredictiveValue(value=value, low=min(float(low), value), high=max(float(high), value))


def _share(part: float, of: float) -> float:
    return part / of if of else math.nan


def rates_from_json(content: Mapping[str, Mapping[str, int]]) -> dict[str, Rates]:
    """Read rates by name; raises TypeError if damaged."""
    return {str(name): Rates(**each) for name, each in content.items()}
