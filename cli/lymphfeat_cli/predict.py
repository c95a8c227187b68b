"""`lymphfeat predict`: model + cohort -> predictions; no labels needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.settings import PredictSettings
from lymphfeat_cli.deciding import (
    Deciding,
    deciding_options,
    describe_deciding,
    final_only,
    show_deciding,
    show_patient,
)
from lymphfeat_cli.options import (
    FILE,
    PATH,
    CohortChoice,
    Output,
    gather,
    images_options,
    note,
    writing_options,
)
from lymphfeat_cli.patient_options import PatientChoice, patient_options
from lymphfeat_cli.results import (
    show_metrics,
    show_truth,
    submission_header_option,
    threshold_text,
    truth_option,
)
from lymphfeat_cli.settings_options import settings_options

if TYPE_CHECKING:
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

    def claim(self, output: Output) -> None:
        """Refuse files that may not be written, and keep them from other processes."""
        output.claim(*filter(None, (self.out, self.images_out, self.submission)))

    def write(self, predictions: "Predictions", submission_ids: Sequence[str]) -> list[Path]:
        """Write the files; return those written."""
        from lymphfeat.model.submission import write_submission

        beside: dict[Path, Callable[[Path], object]] = {}
        if self.submission and submission_ids:
            beside[self.submission] = lambda path: write_submission(
                predictions.patients, submission_ids, path, self.submission_header
            )
        elif self.submission:
            note("No submission written: the cohort has no unlabelled patients.")
        predictions.save(self.out, self.images_out, beside)
        return [self.out, *([self.images_out] if self.images_out else []), *beside]


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
  lymphfeat predict --model models/final --store cache/features.h5 --abstain --prevalence 0.3
  lymphfeat predict --model models/final --images DIR/P7 --age 67 --gender F --lymph-count 12.3
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
@images_options
@patient_options
@deciding_options
@file_options
@truth_option
@settings_options(PredictSettings())
@writing_options
def command(
    folders: tuple[Path, ...],
    cohort: CohortChoice,
    choice: PatientChoice,
    deciding: Deciding,
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
    choice.check()
    files.claim(output)
    from lymphfeat.model.loading import load_model

    model = deciding.apply(load_model(*folders))
    found, submission_ids = _predict(model, choice, cohort, settings, output)
    written = files.write(found, submission_ids)
    scores = truth.score(found.images, found.patients, model.threshold) if truth else {}
    one = choice.images is not None
    output.show(
        lambda: _result(model, found, written, one) | ({"truth": scores} if truth else {}),
        lambda: _show(model, found, written, scores, one),
    )


def _predict(
    model: "AnyModel",
    choice: PatientChoice,
    cohort: CohortChoice,
    settings: PredictSettings,
    output: Output,
) -> "tuple[Predictions, tuple[str, ...]]":
    """Return the predictions, and the patients that belong in a submission."""
    if choice.stores:
        from lymphfeat.features.store import FeatureStore

        stores = [FeatureStore.open(path) for path in choice.stores]
        found = final_only(model, "--store").predict_stores(*stores, settings=settings)
        return found, stores[0].submission_ids
    from lymphfeat.model.loading import largest_crop

    crop = largest_crop(model, settings.um_per_px)
    patients = cohort.usable(choice.load(cohort, output), crop, output)
    with output.progress("predicting") as progress:
        return model.predict(patients, settings, progress=progress), patients.submission_ids


def _result(
    model: "AnyModel", predictions: "Predictions", files: list[Path], one: bool
) -> dict[str, object]:
    patients = predictions.patients
    unlike = {"unlike": int(patients["unlike"].sum())} if "unlike" in patients else {}
    return {
        "patients": len(patients),
        "images": len(predictions.images),
        "tumoral": int(patients["predicted"].sum()),
        "threshold": model.threshold,
        **unlike,
        "metrics": model.measure(patients),
        **describe_deciding(model, patients),
        **({"patient": patients.iloc[0].to_dict()} if one else {}),
        "files": [str(path) for path in files],
    }


def _show(
    model: "AnyModel",
    predictions: "Predictions",
    files: list[Path],
    scores: dict[str, float],
    one: bool,
) -> None:
    patients = predictions.patients
    threshold = f"{threshold_text(model.threshold)}: {model.threshold_from}"
    if one:
        show_patient(patients.iloc[0])
        click.echo(f"Called tumoral: {threshold}.")
    else:
        click.echo(
            f"{len(patients)} patients, {len(predictions.images)} images: "
            f"{int(patients['predicted'].sum())} called tumoral ({threshold})."
        )
    if patients["calibrated"].isna().all():
        click.echo(
            "No calibrated probabilities: the model has none because it was trained without folds."
        )
    show_deciding(model, patients)
    if not one and "notes" in patients and (patients["notes"] != "").any():
        click.echo(
            f"{(patients['notes'] != '').sum()} patients have something that is missing or unlike "
            "training: see the column notes."
        )
    if not one and "unlike" in patients:
        click.echo(
            f"Images unlike those of training: {int(patients['unlike'].sum())} of {len(patients)} "
            "patients; about 5 % would be expected by chance."
        )
    show_metrics("Labelled patients", model.measure(patients))
    show_truth(scores)
    for path in files:
        click.echo(f"wrote {path}")
