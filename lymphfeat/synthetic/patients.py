"""The patients of a synthetic cohort: labels, bag sizes and clinical rows, before any is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lymphfeat.settings import SyntheticSettings

TRAIN, TEST = "trainset", "testset"
TABLE_COLUMNS = ("ID", "LABEL", "GENDER", "DOB", "LYMPH_COUNT")

_REFERENCE_DATE = date(2021, 1, 1)
_DASHED_SHARE = 0.14  # of dates of birth, METHOD §6: 29 of 205
_FEWEST, _MOST = 0.5, 5 / 3  # bag sizes, as shares of the mean
_SIZE_SPREAD = 0.3  # deviation of log bag sizes between these
_SEPARATION = 2.3  # deviations between the classes' bag sizes at size_confounding 1
_TABLE_KEY = 0  # spawn key of the table's generator


@dataclass(frozen=True, kw_only=True)
class SyntheticPatient:
    """One synthetic patient."""

    number: int
    label: int  # 0 or 1, also of test patients
    split: str  # TRAIN or TEST
    images: int
    gender: str
    dob: str
    lymph_count: str

    @property
    def id(self) -> str:
        """Return the patient's id."""
        return f"P{self.number}"

    @property
    def folder(self) -> str:
        """Return the folder of the patient's images, relative to the cohort."""
        return f"{self.split}/{self.id}"

    def row(self) -> tuple[str, ...]:
        """Return the patient's cells of `TABLE_COLUMNS`; a test patient's label is hidden."""
        label = -1 if self.split == TEST else self.label
        return (self.id, str(label), self.gender, self.dob, self.lymph_count)


def plan_patients(settings: SyntheticSettings) -> list[SyntheticPatient]:
    """Draw all patients, in the order of their ids; both splits have both classes if they can."""
    sequence = np.random.SeedSequence(settings.seed, spawn_key=(_TABLE_KEY,))
    rng = np.random.default_rng(sequence)
    count = settings.patients + settings.test_patients
    test = np.zeros(count, np.bool_)
    test[rng.permutation(count)[: settings.test_patients]] = True
    labels = np.zeros(count, np.int64)
    labels[~test] = _draw_labels(rng, settings.patients, settings.tumoral)
    labels[test] = _draw_labels(rng, settings.test_patients, settings.tumoral)
    columns: dict[str, list[Any]] = {
        "label": labels.tolist(),
        "split": [TEST if hidden else TRAIN for hidden in test],
        "images": _draw_sizes(rng, labels, settings),
        "gender": _draw_genders(rng, count),
        "dob": _draw_births(rng, labels, settings.attribute_strength),
        "lymph_count": _draw_counts(rng, labels, settings.attribute_strength),
    }
    return [SyntheticPatient(number=k, **_pick(columns, k)) for k in range(count)]


def _pick(columns: dict[str, list[Any]], k: int) -> dict[str, Any]:
    return {name: values[k] for name, values in columns.items()}


def _draw_labels(rng: np.random.Generator, count: int, tumoral: float) -> NDArray[np.int64]:
    positive = round(tumoral * count)
    if count >= 2:
        positive = min(max(positive, 1), count - 1)
    return rng.permutation((np.arange(count) < positive).astype(np.int64))


def _shifted(
    rng: np.random.Generator, labels: NDArray[np.int64], separation: float
) -> NDArray[np.float64]:
    """Draw deviates whose mean is `separation` apart between the classes, (P,)."""
    return np.asarray(rng.normal(0, 1, len(labels)) + separation * (labels - 0.5), np.float64)


def _draw_sizes(
    rng: np.random.Generator, labels: NDArray[np.int64], settings: SyntheticSettings
) -> list[int]:
    deviates = _shifted(rng, labels, _SEPARATION * settings.size_confounding)
    usual = max(1, settings.images * _FEWEST), max(1, settings.images * _MOST)
    low, high = settings.image_range or usual
    spread = _SIZE_SPREAD
    if settings.image_range:
        spread *= np.log(high / low) / np.log(_MOST / _FEWEST)
    sizes = np.rint(settings.images * np.exp(spread * deviates - spread * spread / 2))
    return [int(size) for size in np.clip(sizes, np.ceil(low), np.floor(high))]


def _draw_genders(rng: np.random.Generator, count: int) -> list[str]:
    """Draw F and M, and one lower-case f, as in the challenge's table."""
    genders = ["F" if female else "M" for female in rng.random(count) < 0.5]
    women = [k for k, gender in enumerate(genders) if gender == "F"] or [0]
    genders[women[int(rng.integers(len(women)))]] = "f"
    return genders


def _draw_births(rng: np.random.Generator, labels: NDArray[np.int64], strength: float) -> list[str]:
    """Spell dates of birth in both conventions; dashes are commoner in one class: a format leak."""
    ages = np.clip(60 + 14 * _shifted(rng, labels, 2 * strength), 18, 97)
    weights = np.where(labels == 1, 2.0, 1.0)
    dashed = rng.choice(
        len(labels),
        size=max(1, round(_DASHED_SHARE * len(labels))),
        replace=False,
        p=weights / weights.sum(),
    )
    births = [_REFERENCE_DATE - timedelta(days=round(age * 365.25)) for age in ages.tolist()]
    return [_spell(birth, k in set(dashed.tolist())) for k, birth in enumerate(births)]


def _spell(birth: date, dashed: bool) -> str:
    if dashed:
        return f"{birth.day:02d}-{birth.month:02d}-{birth.year}"
    return f"{birth.month}/{birth.day}/{birth.year}"


def _draw_counts(rng: np.random.Generator, labels: NDArray[np.int64], strength: float) -> list[str]:
    """Draw lymphocyte counts, 2..295 G/l, normal on the log scale."""
    counts = np.exp(np.log(13) + 0.85 * _shifted(rng, labels, 2 * strength))
    return [f"{count:.4g}" for count in np.clip(counts, 2, 295).tolist()]


def shuffled(
    patients: Sequence[SyntheticPatient], settings: SyntheticSettings
) -> list[SyntheticPatient]:
    """Return the patients in the order of the table's rows, which is not that of their ids."""
    sequence = np.random.SeedSequence(settings.seed, spawn_key=(_TABLE_KEY, 1))
    order = np.random.default_rng(sequence).permutation(len(patients))
    return [patients[k] for k in order]
