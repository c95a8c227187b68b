"""`lymphfeat predict`: model + cohort -> predictions; no labels needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.settings import PredictSettings
from lymphfeat_cli.options import (
    FILE,
    PATH,
    CohortChoice,
    Output,
    cohort_options,
    gather,
    note,
    writing_options,
)
from lymphfeat_cli.results import (
    show_metrics,
    show_truth,
    submission_header_option,
    threshold_text,
    truth_option,
)
from lymphfeat_cli.settings_options import settings_options

if TYPE_CHECKING:
    from lymphfeat.cohort.cohort import Cohort
    from lymphfeat.evaluation.hidden_truth import Truth
    from lymphfeat.model.loading import AnyModel
    from lymphfeat.model.predictions import Predictions


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files to write, and how."""

    out: Path
    images_out: Path | None
    submission: Path | None
    submission_header: str

    def check(self, output: Output) -> None:
        """Refuse files that may not be written."""
        for path in filter(None, (self.out, self.images_out, self.submission)):
            output.check_file(path)

    def write(self, predictions: "Predictions", cohort: "Cohort") -> list[Path]:
        """Write the files; return those written."""
        from lymphfeat.model.submission import write_submission

        predictions.save(self.out, self.images_out)
        written = [path for path in (self.out, self.images_out) if path]
        if self.submission and cohort.submission_ids:
            write_submission(
                predictions.patients, cohort.submission_ids, self.submission, self.submission_header
            )
            return [*written, self.submission]
        if self.submission:
            note("No submission written: the cohort has no unlabelled patients.")
        return written


file_options = gather(
    "files",
    {
        "out": click.option(
            "--out",
            type=FILE,
            default="predictions.csv",
            show_default=True,
            help="CSV to write, one row per patient.",
        ),
        "images_out": click.option(
            "--images-out",
            type=FILE,
            help="Also write a CSV with one row per image: logit, probability, weight in the "
            "decision.",
        ),
        "submission": click.option(
            "--submission",
            type=FILE,
            help="Also write a submission: 0 or 1 for each unlabelled patient.",
        ),
        "submission_header": submission_header_option,
    },
    lambda values: Files(**values),
)


@click.command(
    "predict",
    epilog="""\b
Examples:
  lymphfeat predict --cohort DIR
  lymphfeat predict --model models/endtoend --cohort DIR --out new.csv --images-out cells.csv
A cohort to predict needs a CSV with a column id, and one folder of images per id.""",
)
@click.option(
    "--model",
    "folders",
    multiple=True,
    type=PATH,
    default=("models/endtoend",),
    show_default=True,
    help="Model folder written by `endtoend` or `finalize`. Repeatable: several models of "
    "endtoend, or k-fold members, are averaged over calibrated logits; their spread is written.",
)
@click.option(
    "--without-attributes",
    is_flag=True,
    help="Predict from the images alone, where the model also reads clinical attributes.",
)
@click.option(
    "--sensitivity",
    type=click.FloatRange(0, 1, min_open=True),
    help="Use the model's operating point for this sensitivity (0.8, 0.9, 0.95, 0.99). "
    "[default: the model's threshold]",
)
@cohort_options
@file_options
@truth_option
@settings_options(PredictSettings())
@writing_options
def command(
    folders: tuple[Path, ...],
    without_attributes: bool,
    sensitivity: float | None,
    cohort: CohortChoice,
    files: Files,
    truth: "Truth | None",
    settings: PredictSettings,
    output: Output,
) -> None:
    """Predict patients from their images with a trained model.

    Each patient is predicted from its own images only; by a final model (of `finalize`, or of
    `endtoend --fusion`) also from the clinical attributes in the cohort's table. Predictions of
    labelled patients are evaluated, separately for the patients the model was trained on.
    """
    files.check(output)
    from lymphfeat.model.final_model import FinalModel
    from lymphfeat.model.loading import load_model

    model = load_model(*folders)
    if without_attributes and isinstance(model, FinalModel):
        model = model.without_attributes()
    if sensitivity is not None:
        model = model.at_sensitivity(sensitivity)
    patients = cohort.load(output)
    with output.progress("predicting") as progress:
        found = model.predict(patients, settings, progress=progress)
    written = files.write(found, patients)
    scores = truth.score(found.images, found.patients, model.threshold) if truth else {}
    output.show(
        lambda: _result(model, found, written) | ({"truth": scores} if truth else {}),
        lambda: _show(model, found, written, scores),
    )


def _result(model: "AnyModel", predictions: "Predictions", files: list[Path]) -> dict[str, object]:
    return {
        "patients": len(predictions.patients),
        "images": len(predictions.images),
        "tumoral": int(predictions.patients["predicted"].sum()),
        "threshold": model.threshold,
        "metrics": model.measure(predictions.patients),
        "files": [str(path) for path in files],
    }


def _show(
    model: "AnyModel",
    predictions: "Predictions",
    files: list[Path],
    scores: dict[str, float],
) -> None:
    patients = predictions.patients
    click.echo(
        f"{len(patients)} patients, {len(predictions.images)} images: "
        f"{int(patients['predicted'].sum())} called tumoral "
        f"({threshold_text(model.threshold)}: {model.threshold_from})."
    )
    if patients["calibrated"].isna().all():
        click.echo(
            "No calibrated probabilities: the model has none because it was trained without folds."
        )
    noted = int((patients["notes"] != "").sum()) if "notes" in patients else 0
    if noted:
        click.echo(
            f"{noted} patients have attributes that are missing or unlike those of training: "
            "see the column notes."
        )
    show_metrics("Labelled patients", model.measure(patients))
    show_truth(scores)
    for path in files:
        click.echo(f"wrote {path}")
