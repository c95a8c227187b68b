"""What a page says of a model's results, by its heads' families: the only place that asks."""

from dataclasses import dataclass, replace

from lymphfeat.explanation.subjects import Subject
from lymphfeat.heads.aggregators.distribution import SUBSET
from lymphfeat.heads.registry import (
    DistributionAggregator,
    NetworkAggregator,
    RankingAggregator,
    find_aggregator,
)
from lymphfeat.settings import HeadSettings

_BAR = (
    "Below each cell are its score and its weight in the decision; the bar shows that weight "
    "relative to the patient's largest."
)
_ATTENTION_BAR = (
    "Below each cell are its score and its attention; the bar shows that attention relative to the "
    "patient's largest."
)
_ATTENTION = (
    "Attention is the weight that the network gives to a cell as it averages the cells' logits; a "
    "patient's weights add up to 1. It says how much a cell counts, not for which class: that is "
    "the cell's score. It depends on the cell's picture, and on the patient's other cells. High "
    "attention does not mean that a cell is abnormal, and low attention does not mean that the "
    "network failed to look at it."
)
_TOGETHER = (
    "Cells act on each other, so contributions need not add up to the patient's logit; the "
    "difference belongs to no cell."
)
_CALIBRATED = (
    "The result is calibrated, and joined with the clinical attributes if the model reads them."
)
_JOINT = (
    "This model has no maps: its heads read the pooled features of several backbones together, "
    "whose fields do not match."
)
_EXTREMES = (
    "One cell per patient. If the model looks at the disease, the highest-scored cells of tumoral "
    "patients look abnormal, and those of reactive patients are its false alarms."
)
_MEAN_OF_FIELDS = "A cell's logit is the mean of its fields' logits."
# Statistics whose score cannot be attributed to fields of a picture, in words (see `maps.py`).
_UNMAPPED = {
    "kernel-mean": "the distribution of the cells' appearances",
    "prototypes": "the share of each kind of cell",
}


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What the contributions of a head's cells are, in words."""

    mapped: bool  # whether fields of a picture have scores of their own
    scores: str  # how cells' scores make a patient's
    maps: str  # what a map's fields are to its cell
    contributions: str  # what one is
    marks: str  # the frames and bars on a plate
    extremes: str  # what the highest- and lowest-scored cells show
    unmarked: str  # whether a cell without a frame was used
    rest: str  # what belongs to no cell
    weight: str = "weight"  # what the weight of a cell is called
    attention: str = ""  # what attention is and is not, where weights are attention

    @classmethod
    def of_subject(cls, subject: Subject) -> "Wording":
        """Word the results of a model."""
        each = [cls.of(settings) for settings in subject.heads]
        found = each[0] if len(each) == 1 else _of_several(each)
        if subject.joint:
            found = replace(found, mapped=False, maps=_JOINT)
        if subject.model_is_final:
            return _of_final(found, subject)
        return _of_members(found, subject) if subject.members > 1 else found

    @classmethod
    def of(cls, settings: HeadSettings) -> "Wording":
        """Word the results of a head."""
        match find_aggregator(settings):
            case RankingAggregator(bottom=bottom):
                return _of_ranking(settings, bottom=bottom)
            case DistributionAggregator(statistics=names):
                return _of_distribution({name.partition("@")[0] for name in names})
            case NetworkAggregator():
                return _of_network(settings)
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
        scores="The scores of a patient's cells are combined into its probability.",
        mapped=True,
        maps=_MEAN_OF_FIELDS,
        contributions=f"Only cells that were used contribute. {how} Contributions add up exactly.",
        marks=f"▲ among the {k} highest {what}{lowest}; the others were not used. {_BAR}",
        extremes=_EXTREMES,
        unmarked="no",
        rest="",
    )


def _of_weighted(settings: HeadSettings) -> Wording:
    smoothed = settings.agg == "lse"
    return Wording(
        scores="The scores of a patient's cells are combined into its logit.",
        mapped=True,
        maps=_MEAN_OF_FIELDS,
        contributions="A cell's contribution is the sum of weight × logit over its instances. "
        "Contributions add up exactly" + (", together with the smoothing term." * smoothed or "."),
        marks=f"Cells run from the highest score to the lowest; every cell counts. {_BAR}",
        extremes=_EXTREMES,
        unmarked="according to its weight",
        rest="smoothing (belongs to no cell)",
    )


def _of_network(settings: HeadSettings) -> Wording:
    attention = "attention" in settings.agg
    return Wording(
        scores="A network reads a patient's cells together. A cell's score is the one that a "
        "patient with this cell alone would have.",
        mapped=False,
        maps="This head has no maps: the network reads whole cells, not parts of a picture.",
        contributions=f"A cell's contribution is its {'attention' if attention else 'weight'} "
        "times its logit. "
        + ("Contributions add up to the patient's logit." if attention else _TOGETHER),
        marks="Cells run from the highest score to the lowest; every cell counts. "
        + (
            _ATTENTION_BAR if attention else f"{_BAR} This head gives no weights, so all are equal."
        ),
        extremes=_EXTREMES,
        unmarked="according to its attention" if attention else "yes",
        rest="cells together (belongs to no cell)",
        weight="attention" if attention else "weight",
        attention=_ATTENTION if attention else "",
    )


def _of_distribution(names: set[str]) -> Wording:
    approximate = (
        " For the logarithms this split is approximate; the remainder belongs to no cell."
        if "logstd" in names
        else ""
    )
    return Wording(
        scores="This head scores a patient's cells together, not one by one. A cell's logit is its "
        "contribution times the number of cells, plus what belongs to no cell; the mean of a "
        "patient's logits is the patient's logit.",
        mapped=bool(names - {"kernel-mean"}),  # one part of `prototypes` has a map
        maps=_of_maps(names),
        contributions="A cell's contribution is its part in the statistics that the head reads, "
        "times their weights. Contributions add up to the logit, together with what belongs to no "
        "cell: the intercept, less the average training patient's statistics; with fewer than "
        f"{SUBSET} images also what is assumed of how they differ.{approximate} A cell's "
        "contribution depends on the patient's other cells: removing one changes theirs.",
        marks=f"Cells run from the highest score to the lowest; every cell counts. {_BAR} The "
        "weight is the size of the cell's contribution compared with all the patient's.",
        extremes="One cell per patient. A cell is scored together with the patient's other cells; "
        "among those of another patient it would have another score.",
        unmarked="according to its contribution",
        rest="intercept, less the average patient",
    )


def _of_maps(names: set[str]) -> str:
    if names == {"kernel-mean"}:
        return (
            f"This head has no maps: {_UNMAPPED['kernel-mean']} belongs to whole cells, not of "
            "parts of a picture."
        )
    told = (
        f"{_MEAN_OF_FIELDS} Their differences are a first approximation: how the patient's logit "
        "would change if the cell looked more like that field."
    )
    for name in sorted(names & set(_UNMAPPED)):
        told += (
            f" Not shown is {_UNMAPPED[name]}: that belongs to whole cells and is spread evenly "
            "over the fields."
        )
    return told


# --- several heads ------------------------------------------------------------------------------


def _of_several(heads: "list[Wording]") -> Wording:
    """Word the results of different heads, averaged."""
    mapped = [each for each in heads if each.mapped]
    told = "This model has no maps: none of its heads has."
    if mapped:
        told = f"{_MEAN_OF_FIELDS} A map is the mean of the heads' maps."
        if len(mapped) < len(heads):
            told += (
                f" Only {len(mapped)} of the {len(heads)} kinds of head have maps; the others' "
                "scores are spread evenly over the fields."
            )
    return Wording(
        scores="Several heads score a patient's cells; a cell's score is the mean of theirs, each "
        "by how much it counts.",
        mapped=bool(mapped),
        maps=told,
        contributions="A cell's contribution is the sum of its contributions to the heads.",
        marks=f"Cells run from the highest score to the lowest. {_BAR}",
        extremes=_EXTREMES,
        unmarked="according to its weight",
        rest="belongs to no cell",
    )


def _of_members(own: Wording, subject: Subject) -> Wording:
    """Word the means of several models of the same kind."""
    mean, own = _mean_of(subject), _by_most(own)
    return replace(
        own,
        maps=own.maps + mean * own.mapped,
        marks=own.marks + mean,
        contributions=f"{own.contributions}{mean} The probability is that of the mean of the "
        "members' calibrated logits, so it is not quite that of the sum.",
        rest=own.rest or "belongs to no cell",
    )


def _mean_of(subject: Subject) -> str:
    return f" Shown are the means of the {subject.members} members."


def _by_most(own: Wording) -> Wording:
    """Word the frames of ranking heads as what most members count."""
    told = own.marks.replace("▲ among", "▲ in most members among")
    told = told.replace("▼ among", "▼ in most members among")
    told = told.replace("the others were not used", "most members did not use the others")
    return replace(
        own,
        marks=told,
        unmarked="by at most half of the members" if own.unmarked == "no" else own.unmarked,
    )


def _of_final(own: Wording, subject: Subject) -> Wording:
    """Word what cells add to the calibrated logit of a final model."""
    mean = _mean_of(subject) * (subject.members > 1)
    own = _by_most(own) if subject.members > 1 else own
    also = " Attributes have a part of their own." * bool(subject.attributes)
    return replace(
        own,
        scores=f"{own.scores} {_CALIBRATED}",
        maps=own.maps + mean * own.mapped,
        marks=own.marks + mean,
        contributions="A cell's contribution is what it adds to the patient's calibrated logit, as "
        "far as the heads tell cells apart; what belongs to no single cell is shared out equally "
        f"among them. Contributions add up exactly to the images' part.{also}{mean}",
        rest="the same for every patient",
    )
