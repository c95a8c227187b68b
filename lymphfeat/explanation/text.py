"""The sentences of a report, with the values of the explanation it shows."""

from collections.abc import Sequence

from lymphfeat.explanation.explanation import Explanation
from lymphfeat.explanation.faithfulness import Deletion
from lymphfeat.explanation.thumbnails import Thumbnails
from lymphfeat.heads.grid import head_name
from lymphfeat.heads.registry import find_aggregator
from lymphfeat.model.model import Model

DISCLAIMER = "Research software, not a medical device. Do not use it to diagnose."


def summary(explanation: Explanation) -> str:
    """Summarise what was explained in one or two sentences."""
    patients = explanation.patients
    called, errors = int(patients["predicted"].sum()), int(patients["error"].fillna(False).sum())
    labelled = int(patients["label"].notna().sum())
    threshold = f"{explanation.model.threshold:.2f}"
    counts = (
        f"{len(patients)} patients, {len(explanation.maps)} images. {called} patients are called "
        f"tumoral (probability above {threshold})."
    )
    wrong = f" Of the {labelled} with a label, {errors} are misclassified." if labelled else ""
    return counts + wrong


def notices(explanation: Explanation, thumbnails: Thumbnails) -> list[str]:
    """Return what a reader must know before reading the results."""
    found = []
    trained = int((explanation.patients["role"] == "train").sum())
    if trained:
        found.append(
            f"The model was trained on {trained} of these {len(explanation.patients)} patients. "
            "Their probabilities show how well the model fits, not how well it predicts."
        )
    if explanation.model.tta:
        found.append(
            "The model averages its predictions over four flips of every image; contributions, "
            "weights and maps are those of the unflipped image, so their sum may differ slightly."
        )
    if thumbnails.left_out:
        found.append(
            f"{thumbnails.left_out} of {len(thumbnails.pictures)} pictures are left out to keep "
            "this file small: those in the middle of their patient's ranking. Scores, weights and "
            "maps of all images are included."
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


def model_facts(model: Model) -> list[tuple[str, str]]:
    """List what a reader would ask about the model, as (name, value)."""
    facts, recipe = model.facts, model.recipe
    return [
        ("Head", f"{head_name(model.head_settings)}: {find_aggregator(model.head_settings).about}"),
        ("Unit", model.head_settings.unit),
        ("Backbone", f"{recipe.backbone}, centre crop of {recipe.crop} px"),
        ("Initial weights", facts.initial_weights),
        ("Trained on", f"{len(facts.trained_on)} patients, {facts.epochs} epochs"),
        ("Threshold", f"{model.threshold:g} ({model.threshold_from})"),
    ]


def about(explanation: Explanation) -> Sequence[tuple[str, Sequence[str]]]:
    """Explain the page to a first-time reader: (heading, paragraphs) in order."""
    side = explanation.maps.shape[1]
    kind = "logit" if explanation.decisions.additive == "logit" else "probability"
    return [
        (
            "Scores",
            [
                "Every cell image gets a score between 0 (evidence for reactive) and 1 (evidence "
                "for tumoral); its logit is the same score on an unbounded scale centred on 0. "
                f"The scores of a patient's cells are combined into its {kind}. A score is the "
                "model's opinion of a cell, not a diagnosis of the cell: in training only "
                "patients had labels.",
            ],
        ),
        (
            "Maps",
            [
                f"The score map shows the scores of {side} × {side} fields of the picture, "
                "smoothed: orange is evidence for tumoral, blue for reactive. The raw grid shows "
                "the unsmoothed scores, white for 1 and black for 0. A cell's logit is the mean "
                "of its fields' logits.",
                "A field's score depends on pixels far beyond its borders. A map shows roughly "
                "where the model looks, not what it recognises there.",
            ],
        ),
        (
            "What this page cannot tell",
            [
                "Contributions show how the model computed its result, not what is biologically "
                "true. A model that learnt a shortcut (the stain, the bag size, the file format) "
                "explains its shortcut just as readily. Check the plot of score against bag size, "
                "and run lymphfeat audit on the cohort.",
                "This model uses images only, so there are no clinical attributes to leave out.",
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
