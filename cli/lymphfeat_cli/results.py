"""Output shared by several commands: patient metrics and scores against truth files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from lymphfeat_cli.options import EXISTING_FILE, gather, number, show_table, with_interval

if TYPE_CHECKING:
    from lymphfeat.evaluation.hidden_truth import Truth


def _read_truth(values: dict[str, Any]) -> "Truth | None":
    from lymphfeat.evaluation.hidden_truth import Truth

    return Truth.read(values["truth"]) if values["truth"] else None


# The command gets the truth, or None, as the argument `truth`.
truth_option = gather(
    "truth",
    {
        "truth": click.option(
            "--truth",
            type=EXISTING_FILE,
            multiple=True,
            help="CSV of hidden truth to score against (ID,FILE,IS_WITNESS and/or ID,LABEL). Never "
            "used for training. Repeatable.",
        )
    },
    _read_truth,
)
submission_header_option = click.option(
    "--submission-header",
    type=click.Choice(["Id,Predicted", "ID,LABEL"]),
    default="Id,Predicted",
    show_default=True,
    help="Column names of the submission.",
)

_COLUMNS = {
    "patients": "patients",
    "ba": "BA (95 %)",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "auc": "AUC (95 %)",
    "log_loss": "log loss",
}
_GROUPS = {
    "train": "training patients (not a performance estimate)",
    "validation": "validation",
    "out of fold": "training patients, out of fold",
    "out of fold, images alone": "the same, images alone",
    "new": "new patients",
}


def show_metrics(title: str, metrics: Mapping[str, Mapping[str, float | None]]) -> None:
    """Print one row per group of labelled patients; nothing if there are none."""
    rows = [
        [_GROUPS.get(group, group), *(_cell(values, name) for name in _COLUMNS)]
        for group, values in metrics.items()
    ]
    if rows:
        show_table(title, ["", *_COLUMNS.values()], rows)


def show_truth(scores: Mapping[str, float]) -> None:
    """Print scores against a truth file; nothing if there are none."""
    if "witness_auc" in scores:
        click.echo(
            f"Witness images: AUC of image scores {number(scores['witness_auc'])} within patients "
            f"with witnesses, {number(scores['witness_auc_all'])} over all images."
        )
    hidden = {
        name.removeprefix("hidden_"): value
        for name, value in scores.items()
        if name.startswith("hidden_")
    }
    if hidden:
        show_metrics("Scored against the hidden labels", {"unlabelled": hidden})


def threshold_text(threshold: float) -> str:
    """Describe which patients are called tumoral."""
    if threshold < 0:
        return "everyone, whatever the probability"
    if threshold >= 1:
        return "nobody, whatever the probability"
    return f"probability above {threshold:g}"


def _cell(values: Mapping[str, float | None], name: str) -> str:
    if name == "patients":
        return number(values.get(name), ".0f")
    return with_interval(values.get(name), values.get(f"{name}_low"), values.get(f"{name}_high"))
