"""The sentences of a report, with the values of the explanation it shows."""

from collections.abc import Sequence

import pandas as pd

from lymphfeat.evaluation.fusion import ExpertsFusion, SumFusion
from lymphfeat.evaluation.subgroups import FEWEST, shown
from lymphfeat.explanation.explanation import Explanation, Subgroups
from lymphfeat.explanation.faithfulness import Deletion
from lymphfeat.explanation.findings import Finding, Findings
from lymphfeat.explanation.subjects import Subject
from lymphfeat.explanation.thumbnails import Thumbnails
from lymphfeat.heads.aggregators.distribution import SUBSET
from lymphfeat.heads.grid import head_name
from lymphfeat.heads.registry import find_aggregator
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import AnyModel
from lymphfeat.model.members import IMAGES

FOUND_BY_HEAD = (
    "This is about the head's own logit, before it is calibrated and joined with anything else. "
)
FOUND = (
    "What each statistic of the patient's cells adds to the logit, compared with the average "
    "training patient. It is a weighted sum over all features, so it can go against the tendency "
    "of most of them."
)
DIFFERING = (
    "Cells by their distance from the patient's average cell, × its mean: the differences of all "
    "features, each weighed by how strongly the head reads the spread of that feature."
)
_HARDLY = 0.005  # parts of a logit that would be shown as 0
NOT_A_DEVICE = "Research software, not a medical device."
DISCLAIMER = f"{NOT_A_DEVICE} Do not use it to diagnose."


def summary(explanation: Explanation) -> str:
    """Summarise what was explained in a few sentences."""
    patients = explanation.patients
    called, errors = int(patients["predicted"].sum()), int(patients["error"].fillna(False).sum())
    labelled = int(patients["label"].notna().sum())
    threshold = f"{explanation.model.threshold:.2f}"
    counts = (
        f"{len(patients)} patients, {len(explanation.maps)} images. {called} patients are called "
        f"tumoral (probability above {threshold})."
    )
    wrong = f" Of the {labelled} with a label, {errors} are misclassified." if labelled else ""
    return counts + wrong + _looks_at(explanation.findings)


def _looks_at(findings: Findings | None) -> str:
    if findings is None:
        return ""
    *others, last = (each.about for each in findings.statistics)
    return f" The head looks at {', '.join(others)}{' and ' if others else ''}{last}."


def notices(explanation: Explanation, thumbnails: Thumbnails) -> list[str]:
    """Return what a reader must know before reading the results."""
    found = []
    trained = int((explanation.patients["role"] == "train").sum())
    if trained:
        found.append(
            f"The model was trained on {trained} of these {len(explanation.patients)} patients. "
            "Their probabilities show how well the model fits, not how well it predicts."
        )
    if explanation.subject.members > 1:
        found.append(
            f"The model averages {explanation.subject.members} members. Scores, weights, "
            "contributions and maps are the means of theirs."
        )
    if explanation.subject.tta:
        found.append(
            "The model averages its predictions over four flips of every image; contributions, "
            "weights and maps are those of the unflipped image, so their sum may differ slightly."
        )
    if thumbnails.left_out:
        found.append(
            f"{thumbnails.left_out} of {len(thumbnails.shown)} pictures are left out to keep "
            "this file small: those in the middle of their patient's ranking. Scores, weights and "
            "maps of all images are included. For all pictures raise --megabytes."
        )
    return found


def describe_deletion(deletion: Deletion) -> str:
    """Report the effect of deleting cells."""
    verdict = (
        f" more than any of {deletion.draws} random draws, whatever the number of cells"
        if deletion.surely
        else f", but not always more than all of {deletion.draws} random draws"
    )
    return (
        f"Deleting a patient's highest-scored cells changes its probability{verdict}: with "
        f"{deletion.k[-1]} cells deleted, by {deletion.highest[-1]:.3f} on average, against "
        f"{deletion.random[-1]:.3f} for random cells. Area between the curves: "
        f"{deletion.area:+.3f}. Means over {deletion.patients} patients; the band spans the draws."
    )


def describe_truth(explanation: Explanation) -> list[tuple[str, str, str]]:
    """Compare the scores with a known truth: (title, value, sentence); empty without one."""
    scores, overlap = explanation.truth_scores(), explanation.overlap
    found = []
    if "witness_auc" in scores:
        found.append(
            (
                "Do the right cells rank high?",
                f"AUC {scores['witness_auc']:.3f}",
                "Probability that a known atypical cell outranks a normal cell of the same "
                f"patients; {scores['witness_auc_all']:.3f} over all patients. 0.5 is chance.",
            )
        )
    if overlap is not None:
        found.append(
            (
                "Does the map highlight the cell?",
                f"AUC {overlap.auc:.3f}",
                "Probability that a map field on the cell outranks a field outside it, mean over "
                f"{overlap.images} atypical cells. The highest field is on the cell in "
                f"{overlap.pointing:.0%} of them; {overlap.cell_share:.0%} would be expected by "
                "chance.",
            )
        )
    if "hidden_auc" in scores:
        found.append(
            (
                "Patients whose label was hidden",
                f"AUC {scores['hidden_auc']:.3f}",
                f"{scores['hidden_patients']:.0f} patients; balanced accuracy "
                f"{scores['hidden_ba']:.3f} at the model's threshold.",
            )
        )
    return found


def model_facts(subject: Subject) -> list[tuple[str, str]]:
    """List what a reader would ask about the model, as (name, value)."""
    model = subject.model
    heads = [f"{head_name(each)}: {find_aggregator(each).about}" for each in subject.heads]
    units = dict.fromkeys(each.unit for each in subject.heads if each.unit)
    members = [("Members", f"{subject.members}, averaged")] if subject.members > 1 else []
    return [
        *([("Row of the run", model.row)] if isinstance(model, FinalModel) else []),
        *(("Head", told) for told in heads),
        ("Unit", ", ".join(units) or "image"),
        *members,
        *(("Backbone", told) for told in _backbones(subject)),
        *([("Clinical attributes", ", ".join(subject.attributes))] if subject.attributes else []),
        *_origin(model),
        ("Threshold", f"{model.threshold:.3g} ({model.threshold_from})"),
        *_figures_of(model),
    ]


def _backbones(subject: Subject) -> list[str]:
    told = [f"{s.recipe.backbone}, centre crop of {s.recipe.crop} px" for s in subject.sources]
    return [
        name if told.count(name) == 1 else f"{told.count(name)} × {name}"
        for name in dict.fromkeys(told)
    ]


def _origin(model: AnyModel) -> list[tuple[str, str]]:
    """Say with what weights training began, and on whom."""
    facts = [each.facts for each in (model.models if isinstance(model, Ensemble) else (model,))]
    patients = len({id for own in facts for id in own.trained_on})
    epochs = f", {facts[0].epochs} epochs" if facts[0].epochs else ""
    return [
        ("Initial weights", ", ".join(dict.fromkeys(own.initial_weights for own in facts))),
        ("Trained on", f"{patients} patients{epochs}"),
    ]


def _figures_of(model: AnyModel) -> list[tuple[str, str]]:
    """Give the honest figures of a final model's row, as they were measured."""
    row = model.figures.get("row", {}) if isinstance(model, FinalModel) else {}
    names = {"ba": "balanced accuracy", "auc": "AUC"}
    told = [f"{names[k]} {row[k]:.3f}" for k in names if isinstance(row.get(k), float)]
    return [("As measured on held-out patients", ", ".join(told))] if told else []


def about(explanation: Explanation) -> Sequence[tuple[str, Sequence[str]]]:
    """Explain the page to a first-time reader: (heading, paragraphs) in order."""
    side = explanation.maps.shape[1]
    wording = explanation.wording
    return [
        (
            "Scores",
            [
                "Every cell image gets a score between 0 (evidence for reactive) and 1 (evidence "
                "for tumoral); its logit is the same score on an unbounded scale centred on 0. "
                f"{wording.scores} A score is the model's opinion of a cell, not a diagnosis of "
                "the cell: in training only patients had labels.",
            ],
        ),
        (
            "Maps",
            [
                f"The score map shows the scores of {side} × {side} fields of the picture, "
                "smoothed: orange is evidence for tumoral, blue for reactive. The raw grid shows "
                f"the unsmoothed scores, white for 1 and black for 0. {wording.maps}",
                "A field's score depends on pixels far beyond its borders. A map shows roughly "
                "where the model looks, not what it recognises there.",
            ]
            if wording.mapped
            else [wording.maps],
        ),
        *([("Attention", [wording.attention])] if wording.attention else []),
        *_about_head(explanation.findings),
        *_about_attributes(explanation.subject),
        (
            "What this page cannot tell",
            [
                "Contributions show how the model computed its result, not what is biologically "
                "true. A model that learnt a shortcut (the stain, the bag size, the file format) "
                "explains its shortcut just as readily. Check the plot of score against bag size, "
                "and run lymphfeat audit on the cohort.",
                "This model uses images only, so there are no clinical attributes to leave out."
                if not explanation.subject.attributes
                else "An attribute that speaks for tumoral is not a cause: it is what the training "
                "patients had in common. If attributes and images tell the same, the formula may "
                "give the credit to either.",
            ],
        ),
        (
            "Keyboard",
            [
                "Tab moves between links, buttons and cells; Enter opens one. In an open cell the "
                "arrow keys move to its neighbours in the ranking and Escape closes it. Printing "
                "prints the open section."
            ],
        ),
    ]


def _about_attributes(subject: Subject) -> list[tuple[str, Sequence[str]]]:
    """Explain how the clinical attributes are joined with the images."""
    if not isinstance(subject.model, FinalModel) or not subject.attributes:
        return []
    fusion = subject.model.members[0].fusion
    compared = (
        "Each part is averaged over all orders in which images and attributes could become known "
        "(Shapley values), against a patient with average images and attributes."
        if isinstance(fusion, ExpertsFusion)
        else "Each part is one term of the formula that joins them, 0 for an attribute as the "
        "average training patient's."
    )
    silent = (
        "images that speak for neither class beyond the share of tumoral training patients"
        if isinstance(fusion, SumFusion)
        else "the images of the average training patient"
    )
    return [
        (
            "Images and clinical attributes",
            [
                f"The model joins the images with {_listed(subject.attributes)}. Parts above 0 "
                f"speak for tumoral, parts below 0 for reactive. {compared} With what is the same "
                "for every patient they add up to the patient's calibrated logit.",
                "Without attributes: what a formula that was learnt for images alone makes of the "
                "same images; it has a threshold of its own. Without images: what this model says "
                f"of a patient with these attributes and {silent}; it is not a model that was "
                "learnt without images.",
            ],
        )
    ]


def speaks(explanation: Explanation, patient: int) -> list[str]:
    """Say what speaks for either class, images and attributes by size: one sentence each."""
    if not explanation.subject.model_is_final:
        return []
    shares = explanation.shares.iloc[patient]
    order = shares[shares.abs() >= _HARDLY].abs().sort_values(ascending=False, kind="stable").index
    told = []
    for name, sign in (("tumoral", 1), ("reactive", -1)):
        own = [
            f"{named_value(explanation, str(part), patient)}, {_signed(shares[part])}"
            for part in order
            if sign * shares[part] > 0
        ]
        told.append(f"What speaks for {name}: {'; '.join(own) or 'nothing'}.")
    return told


def named_value(explanation: Explanation, part: str, patient: int) -> str:
    """Name a part of the logit with the patient's value: "the cells", "age 67", "gender F"."""
    if part == IMAGES:
        return "the cells"
    table, name = explanation.cohort.table, part.replace("_", " ")
    value = table[part].iloc[patient] if part in table else None
    if pd.isna(value):
        return f"{name} (missing)"
    return f"{name} {shown(value) if isinstance(value, float | int) else value}"


def alone(explanation: Explanation, patient: int) -> list[tuple[str, str]]:
    """Give the probabilities without attributes and without images: (name, value)."""
    decisions, model = explanation.decisions, explanation.model
    if decisions.without_attributes is None or decisions.without_images is None:
        return []
    assert isinstance(model, FinalModel)
    at = model.without_attributes().threshold
    images, attributes = decisions.without_attributes[patient], decisions.without_images[patient]
    return [
        ("Without attributes", f"{images:.2f} (threshold {at:.2f})"),
        ("Without images", f"{attributes:.2f}"),
    ]


_OF = {
    "new": "Labelled patients that the model has not seen.",
    "out of fold": "The training patients, each judged by what had not seen its label.",
    "validation": "Validation patients: nothing was learnt from their labels, but the training was "
    "steered by them.",
    "train": "THE MODEL WAS TRAINED ON THESE PATIENTS. The figures show how well it fits, and are "
    "no estimate of how well it predicts.",
}


def describe_subgroups(subgroups: Subgroups, subject: Subject) -> list[str]:
    """Say of which patients the figures are, and how to read them: a sentence or more each."""
    groups = len(subgroups.rows) - 1
    told = [
        f"{_OF[subgroups.of]} Called tumoral are those above the model's threshold. Intervals are "
        f"95 %. No figure is given about fewer than {FEWEST} patients of a class.",
        f"{groups} groups are compared in three figures each: among so many, some differ by chance "
        "alone, and some intervals miss the truth. Where a group's interval holds the figure of "
        "all patients, nothing here shows that the model does better or worse in this group; nor "
        "does it show that it does equally well, if the interval is wide. A group whose interval "
        "does not hold it is a reason to look at more patients of this kind, not a result.",
    ]
    if subject.attributes:
        told.append(
            f"The model reads {_listed(subject.attributes)}. Where a value speaks for tumoral, "
            "more patients of either class are called tumoral: a higher sensitivity and a lower "
            "specificity in that group are what the model was made to do."
        )
    return told


def _listed(names: Sequence[str]) -> str:
    *others, last = (name.replace("_", " ") for name in names)
    return f"{', '.join(others)} and {last}" if others else last


def _about_head(findings: Findings | None) -> list[tuple[str, Sequence[str]]]:
    """Explain what a head of the family `distribution` looks at."""
    if findings is None:
        return []
    told = [
        "The head adds up what it finds in each statistic of a patient's cells, compared with the "
        "average training patient.",
        *(_tendency(finding) for finding in findings.statistics),
    ]
    return [("What the head looks at", told)]


def _tendency(finding: Finding) -> str:
    if not finding.spread:
        return f"{_capitalised(finding.about)}."
    return (
        f"{_capitalised(finding.about)}. If the cells differed more in all features, by a standard "
        f"deviation of the training patients, the logit would change by {_signed(finding.slope)}: "
        f"on the whole, cells that differ more are {_evidence(finding.slope)}."
    )


def describe_finding(finding: Finding, patient: int) -> str:
    """Say what a statistic found in a patient, with the figures it is based on."""
    score, certain = float(finding.score[patient]), float(finding.certain[patient])
    found = f"{_capitalised(finding.about)} is {_evidence(score)} ({_signed(score)})."
    if not finding.spread:
        return found
    if certain == 0:
        return (
            f"{found} A single image does not show how much cells differ; the median training "
            "patient's differences are assumed."
        )
    return f"{found} {_comparison(finding.differing[patient])}{_doubt(certain)}"


def _comparison(differing: float) -> str:
    """Compare the cells' differences with those of the median training patient."""
    if 0.45 < differing < 0.55:
        return (
            "They differ from each other about as much as the median training patient's (more in "
            f"{differing:.0%} of the features)."
        )
    amount, share = ("more", differing) if differing > 0.5 else ("less", 1 - differing)
    return (
        f"They differ {amount} from each other than the median training patient's, in {share:.0%} "
        "of the features."
    )


def _doubt(certain: float) -> str:
    if certain == 1:
        return ""
    return (
        f" Fewer than {SUBSET} images show this imprecisely: it counts {certain:.0%}, the median "
        "training patient's differences make up the rest."
    )


def _evidence(score: float) -> str:
    if abs(score) < 0.05:
        return "hardly evidence for either class"
    return f"evidence for {'tumoral' if score > 0 else 'reactive'}"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")  # + 0.0: no −0.00


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
