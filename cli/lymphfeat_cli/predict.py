"""`lymphfeat predict`: model + cohort -> predictions; no labels needed."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.runtime.files import check_file
from lymphfeat_cli.options import (
    cohort_options,
    device_option,
    force_option,
    load_cohort,
    note,
    output_options,
    precision_option,
    progress_bar,
    show_json,
    threads_option,
)
from lymphfeat_cli.results import (
    show_metrics,
    show_truth,
    submission_header_option,
    threshold_text,
    truth_option,
)

if TYPE_CHECKING:
    from lymphfeat.model.ensemble import Ensemble
    from lymphfeat.model.model import Model
    from lymphfeat.model.predictions import Predictions


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
    type=click.Path(path_type=Path),
    default=("models/endtoend",),
    show_default=True,
    help="Model folder written by `lymphfeat endtoend`. Repeatable: several models, or k-fold "
    "members, are averaged over calibrated logits, and their spread is written.",
)
@click.option(
    "--sensitivity",
    type=click.FloatRange(0, 1, min_open=True),
    help="Use the model's operating point for this sensitivity (0.8, 0.9, 0.95, 0.99). "
    "[default: the model's threshold]",
)
@cohort_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="predictions.csv",
    show_default=True,
    help="CSV to write, one row per patient.",
)
@click.option(
    "--images-out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a CSV with one row per image: logit, probability, weight in the decision.",
)
@click.option(
    "--submission",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a submission: 0 or 1 for each unlabelled patient.",
)
@submission_header_option
@truth_option
@click.option(
    "--tta/--no-tta",
    default=None,
    help="Predict the mean over the four flips. [default: the model's setting]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images per batch."
)
@precision_option(default="float32")
@device_option
@threads_option
@force_option
@output_options
def command(
    folders: tuple[Path, ...],
    sensitivity: float | None,
    cohort: Path | None,
    table: Path | None,
    allow_missing: bool,
    reference_date: datetime,
    out: Path,
    images_out: Path | None,
    submission: Path | None,
    submission_header: str,
    truth: tuple[Path, ...],
    tta: bool | None,
    batch_size: int,
    precision: str,
    device: str,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Predict patients from their images with a trained model.

    Each patient is predicted from its own images only. Predictions of labelled patients are
    evaluated, separately for the patients the model was trained on.
    """
    files = [path for path in (out, images_out, submission) if path is not None]
    _check_free(files, force)
    from lymphfeat.evaluation.hidden_truth import Truth
    from lymphfeat.model.ensemble import load_model
    from lymphfeat.model.submission import write_submission

    model = load_model(*folders)
    if sensitivity is not None:
        model = model.at_sensitivity(sensitivity)
    known = Truth.read(truth) if truth else None
    patients = load_cohort(cohort, table, allow_missing, reference_date, quiet)
    with progress_bar("predicting", quiet) as progress:
        predictions = model.predict(
            patients,
            tta=tta,
            device=device,
            precision=precision,
            threads=threads,
            batch_size=batch_size,
            progress=progress,
        )
    predictions.save(out, images_out)
    if submission is not None and patients.submission_ids:
        write_submission(
            predictions.patients, patients.submission_ids, submission, submission_header
        )
    elif submission is not None:
        files.remove(submission)
        note("No submission written: the cohort has no unlabelled patients.")
    scores = known.score(predictions.images, predictions.patients, model.threshold) if known else {}
    if as_json:
        show_json(_result(model, predictions, files) | ({"truth": scores} if known else {}))
    else:
        _show(model, predictions, files, scores)


def _check_free(files: list[Path], force: bool) -> None:
    for path in files:
        check_file(path, force=force)
        if not path.parent.is_dir():
            raise click.UsageError(f"folder {path.parent} does not exist; create it first.")


def _result(
    model: "Model | Ensemble", predictions: "Predictions", files: list[Path]
) -> dict[str, object]:
    return {
        "patients": len(predictions.patients),
        "images": len(predictions.images),
        "tumoral": int(predictions.patients["predicted"].sum()),
        "threshold": model.threshold,
        "metrics": model.measure(predictions.patients),
        "files": [str(path) for path in files],
    }


def _show(
    model: "Model | Ensemble",
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
    show_metrics("Labelled patients", model.measure(patients))
    show_truth(scores)
    for path in files:
        click.echo(f"wrote {path}")
