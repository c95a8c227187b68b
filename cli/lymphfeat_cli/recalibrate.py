"""`lymphfeat recalibrate`: model + labelled cohort -> the model with another decision."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.runtime.files import files_in
from lymphfeat.settings import PredictSettings, RecalibrateSettings
from lymphfeat_cli.options import (
    FOLDER,
    PATH,
    CohortChoice,
    Output,
    cohort_options,
    number,
    show_table,
    with_interval,
    writing_options,
)
from lymphfeat_cli.results import threshold_text
from lymphfeat_cli.settings_options import settings_options

if TYPE_CHECKING:
    from lymphfeat.recalibration import Recalibration


@click.command(
    "recalibrate",
    epilog="""\b
Examples:
  lymphfeat recalibrate --model models/final --cohort DIR
  lymphfeat recalibrate --model models/final --cohort DIR --prevalence 0.3 --out models/here
  lymphfeat predict --model models/recalibrated --cohort NEW_DIR
Backbones and heads stay as they are: this takes as long as predicting the cohort.""",
)
@click.option(
    "--model",
    type=PATH,
    default="models/final",
    show_default=True,
    help="Model folder written by `finalize` or `endtoend`.",
)
@cohort_options
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=PATH,
    help="Read the patients of a feature store instead of a cohort's images. Repeatable: one per "
    "backbone of the model, in its order.",
)
@settings_options(RecalibrateSettings())
@settings_options(PredictSettings(), "scoring")
@click.option(
    "--out",
    type=FOLDER,
    default="models/recalibrated",
    show_default=True,
    help="Model folder to write.",
)
@writing_options
def command(
    model: Path,
    cohort: CohortChoice,
    stores: tuple[Path, ...],
    settings: RecalibrateSettings,
    scoring: PredictSettings,
    out: Path,
    output: Output,
) -> None:
    """Fit a model's probabilities and threshold to another laboratory's labelled patients.

    They must not be patients that the model was trained on. Calibration, threshold and operating
    points are learnt again; the figures after are of folds that are recalibrated by the others.
    """
    from lymphfeat.features.store import FeatureStore
    from lymphfeat.recalibration import recalibrate

    opened = [FeatureStore.open(path) for path in stores]
    patients = opened[0] if opened else cohort.load(output)
    with output.progress("predicting") as progress:
        found = recalibrate(
            model,
            patients,
            out,
            settings,
            scoring=scoring,
            other_stores=opened[1:],
            force=output.force,
            progress=progress,
        )
    output.show(lambda: _result(found, out), lambda: _show(found, out))


def _result(found: "Recalibration", out: Path) -> dict[str, object]:
    return {
        "patients": found.after["patients"],
        "prevalence": found.prevalence,
        "threshold": found.model.threshold,
        "before": found.before,
        "after": found.after,
        "files": [str(path) for path in files_in(out)],
    }


_COLUMNS = ("sensitivity", "specificity", "log_loss", "ece")


def _show(found: "Recalibration", out: Path) -> None:
    rows = []
    for name, figures in (("before", found.before), ("after, by the other folds", found.after)):
        intervals = [
            with_interval(figures[m], figures[f"{m}_low"], figures[f"{m}_high"])
            for m in ("ba", "auc")
        ]
        calibration = [number(figures[f"calibration_{m}"], ".2f") for m in ("slope", "intercept")]
        rows.append([name, *intervals, *(number(figures[m]) for m in _COLUMNS), *calibration])
    columns = (
        "",
        "BA (95 %)",
        "AUC (95 %)",
        *_COLUMNS[:2],
        "log loss",
        "ECE",
        "slope",
        "intercept",
    )
    show_table(f"{found.after['patients']} patients", columns, rows)
    click.echo(
        "Slope and intercept are what the probabilities still need: 1 and 0 if they are calibrated."
    )
    model = found.model
    click.echo(f"Tumoral if {threshold_text(model.threshold)} ({model.threshold_from}).")
    click.echo("Research software, not a medical device.")
    for path in files_in(out):
        click.echo(f"wrote {path}")
