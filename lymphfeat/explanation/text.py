"""What a report says in words; every sentence a figure of the explanation at hand."""

from collections.abc import Sequence

from lymphfeat.explanation.explanation import Explanation
from lymphfeat.explanation.faithfulness import Deletion
from lymphfeat.explanation.thumbnails import Thumbnails
from lymphfeat.heads.grid import head_name
from lymphfeat.heads.registry import AGGREGATORS
from lymphfeat.model.model import Model

DISCLAIMER = "Research software, not a medical device. Do not use it to diagnose."


def summary(explanation: Explanation) -> str:
    """Say what was explained, in a sentence or two."""
    patients = explanation.patients
    called, errors = int(patients["predicted"].sum()), int(patients["error"].fillna(False).sum())
    labelled = int(patients["label"].notna().sum())
    threshold = f"{explanation.model.threshold:.2f}"
    told = (
        f"{len(patients)} patients, {len(explanation.maps)} images. {called} patients are called "
        f"tumoral (probability above {threshold})."
    )
    return told + (f" Of {labelled} with a label, {errors} are called wrongly." if labelled else "")


def notices(explanation: Explanation, thumbnails: Thumbnails) -> list[str]:
    """Say what a reader must know before the figures."""
    found = []
    trained = int((explanation.patients["role"] == "train").sum())
    if trained:
        found.append(
            f"{trained} of these {len(explanation.patients)} patients were trained on. Their "
            "probabilities show how well the model fits, not how well it predicts."
        )
    if explanation.model.tta:
        found.append(
            "The model predicts the mean over four flips of every image; shares, weights and maps "
            "are those of the image as it is, so their sum may differ a little."
        )
    if thumbnails.left_out:
        found.append(
            f"{thumbnails.left_out} of {len(thumbnails.pictures)} pictures are left out to keep "
            "this file small: those in the middle of their patient's ranking. Scores, weights and "
            "maps of all images are here."
        )
    return found


def marks_told(model: Model) -> str:
    """Say what frames and bars on a plate mean."""
    settings = model.head_settings
    aggregator = AGGREGATORS[settings.agg]
    bar = (
        "Under a cell stand its score and its weight in the decision; the bar is that weight, "
        "relative to the heaviest."
    )
    if aggregator.family != "ranking":
        return f"Cells run from the highest score to the lowest; every cell counts. {bar}"
    k = f"{settings.k_agg}" if settings.k_percent is None else f"{settings.k_percent:g} %"
    what = "cells" if settings.unit == "image" else "pixels (a cell is framed that holds one)"
    lowest = f", ▼ in the {k} lowest" if aggregator.bottom else ""
    return f"▲ counted in the {k} highest {what}{lowest}; the others were not used. {bar}"


def shares_told(model: Model) -> str:
    """Say what a cell's share is."""
    settings = model.head_settings
    if AGGREGATORS[settings.agg].family == "ranking":
        how = "The highest score alone is" if settings.reduce == "max" else "Its share is"
        tail = " the patient's." if settings.reduce == "max" else " its score over their number."
        return f"Only the cells counted have a share. {how}{tail} Shares add up exactly."
    told = "A cell's share is the sum of weight × logit over its instances. Shares add up exactly"
    return told + (", with the smoothing's part." if settings.agg == "lse" else ".")


def deletion_told(deletion: Deletion) -> str:
    """Say what deleting cells did, in figures."""
    verdict = (
        f"at every number of images more than any of {deletion.draws} random draws"
        if deletion.surely
        else f"not at every number of images more than all of {deletion.draws} random draws"
    )
    last = f"{deletion.highest[-1]:.3f} against {deletion.random[-1]:.3f}"
    return (
        f"Deleting a patient's highest-scored cells moves its probability {verdict}: by {last} at "
        f"{deletion.k[-1]} cells. Area between the curves {deletion.area:+.3f}. Mean over "
        f"{deletion.patients} patients; the band spans the draws."
    )


def truth_told(explanation: Explanation) -> list[tuple[str, str, str]]:
    """Tell the scores against a known truth: (title, figure, sentence); none without one."""
    scores, overlap = explanation.truth_scores(), explanation.overlap
    found = []
    if "witness_auc" in scores:
        found.append(
            (
                "Do the right cells rank high?",
                f"AUC {scores['witness_auc']:.3f}",
                "Chance that a known atypical cell outranks a normal one of the same patients; "
                f"{scores['witness_auc_all']:.3f} over all patients. 0.5 is chance.",
            )
        )
    if overlap is not None:
        found.append(
            (
                "Does the map lie on the cell?",
                f"AUC {overlap.auc:.3f}",
                f"Chance that a field of the map on the cell outranks one beside it, mean of "
                f"{overlap.images} atypical cells. The highest field is on the cell in "
                f"{overlap.pointing:.0%} of them; by chance it would be in "
                f"{overlap.cell_share:.0%}.",
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


def model_facts(model: Model) -> list[tuple[str, str]]:
    """List what a reader would ask about the model."""
    facts, recipe = model.facts, model.recipe
    return [
        ("Head", f"{head_name(model.head_settings)}: {AGGREGATORS[model.head_settings.agg].about}"),
        ("Unit", model.head_settings.unit),
        ("Backbone", f"{recipe.backbone}, centre crop of {recipe.crop} px"),
        ("Weights begun from", facts.initial_weights),
        ("Trained on", f"{len(facts.trained_on)} patients, {facts.epochs} epochs"),
        ("Threshold", f"{model.threshold:g} ({model.threshold_from})"),
    ]


def about(explanation: Explanation) -> Sequence[tuple[str, Sequence[str]]]:
    """Explain the page to someone who has not seen one."""
    side = explanation.maps.shape[1]
    kind = "logit" if explanation.decisions.additive == "logit" else "probability"
    return [
        (
            "Scores",
            [
                "Every photograph of a cell gets a score between 0 (speaks for reactive) and 1 "
                "(speaks for tumoral); its logit is the same on a scale without ends, 0 in the "
                f"middle. Scores of a patient's cells are combined into its {kind}. A score is "
                "the model's opinion of a cell, not a diagnosis of the cell: only patients had "
                "labels when it learnt.",
            ],
        ),
        (
            "Maps",
            [
                f"The score map shows the scores of {side} × {side} fields of the picture, "
                "smoothed: orange speaks for tumoral, blue for reactive. The raw grid shows the "
                "fields as they are, white for 1 and black for 0. A cell's logit is the mean of "
                "its fields'.",
                "A field sees far beyond its own borders. A map says roughly where the model "
                "looks, not what it recognises there.",
            ],
        ),
        (
            "What this page cannot tell",
            [
                "Shares say how the number came about, not what is biologically true. A model "
                "that learnt a shortcut (the stain, the size of the bag, the format of the file) "
                "explains its shortcut just as readily. Look at the score against bag size, and "
                "let lymphfeat audit look at the cohort.",
                "This model reads images alone: there are no clinical attributes to leave out.",
            ],
        ),
        (
            "Keyboard",
            [
                "Tab moves between links, buttons and cells; Enter opens; in a cell the arrow "
                "keys move to its neighbours in the ranking and Escape closes it. The print "
                "command prints what is open."
            ],
        ),
    ]
