"""What a page says of a head's results, by the head's family: the only place that asks for it."""

from dataclasses import dataclass

from lymphfeat.heads.registry import RankingAggregator, find_aggregator
from lymphfeat.settings import HeadSettings

_BAR = (
    "Below each cell are its score and its weight in the decision; the bar shows that weight "
    "relative to the patient's largest."
)


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What the contributions of a head's cells are, in words."""

    additive: str  # "logit" or "probability": what contributions add up to
    contributions: str  # what one is
    marks: str  # the frames and bars on a plate
    unmarked: str  # whether a cell without a frame was used
    rest: str  # what belongs to no cell

    @classmethod
    def of(cls, settings: HeadSettings) -> "Wording":
        """Word the results of a head."""
        match find_aggregator(settings):
            case RankingAggregator(bottom=bottom):
                return _of_ranking(settings, bottom=bottom)
            case _:
                return _of_weighted(settings)


def _of_ranking(settings: HeadSettings, *, bottom: bool) -> Wording:
    how = (
        "The patient's probability is the highest score."
        if settings.reduce == "max"
        else "A cell's contribution is its score divided by the number of instances used."
    )
    k = f"{settings.k_agg}" if settings.k_percent is None else f"{settings.k_percent:g} %"
    what = "cells" if settings.unit == "image" else "pixels (cells that contain one are framed)"
    lowest = f", ▼ among the {k} lowest" if bottom else ""
    return Wording(
        additive="probability",
        contributions=f"Only cells that were used contribute. {how} Contributions add up exactly.",
        marks=f"▲ among the {k} highest {what}{lowest}; the others were not used. {_BAR}",
        unmarked="no",
        rest="",
    )


def _of_weighted(settings: HeadSettings) -> Wording:
    smoothed = settings.agg == "lse"
    return Wording(
        additive="logit",
        contributions="A cell's contribution is the sum of weight × logit over its instances. "
        "Contributions add up exactly" + (", together with the smoothing term." * smoothed or "."),
        marks=f"Cells run from the highest score to the lowest; every cell counts. {_BAR}",
        unmarked="according to its weight",
        rest="smoothing (belongs to no cell)",
    )
