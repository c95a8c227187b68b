"""`lymphfeat endtoend`: cohort -> final model, trained through the backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.runtime.files import files_in
from lymphfeat.settings import EndToEndSettings
from lymphfeat_cli.options import (
    PATH,
    CohortChoice,
    Output,
    built_in_truth,
    images_options,
    is_first,
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
from lymphfeat_cli.settings_options import settings_options, unless_given

if TYPE_CHECKING:
    from lymphfeat.evaluation.hidden_truth import Truth
    from lymphfeat.model.loading import AnyModel

IMAGES_ALONE = "out of fold, images alone"  # among the metrics of a fused model
# How the built-in cohort is trained, unless the user says otherwise: soon done, in steps enough for
# batch-norm to know the trained backbone's features. (With 18 steps at 1e-3, or 35 at 5e-4, most of
# the hidden reactive patients are called tumoral.)
BUILT_IN = {"epochs": 8, "images_per_patient": 12, "batch_size": 8, "lr": (3e-4,)}
CROSS_FITTED = (
    "Out of fold: each patient is predicted by the member not trained on it, with threshold and "
    "calibration from the other folds (whose members were trained on it); AUC is within folds."
)


@click.command(
    "endtoend",
    epilog="""\b
Examples:
  lymphfeat endtoend
  lymphfeat endtoend --cohort DIR --weights resnet18.safetensors --validation 0.2
  lymphfeat endtoend --cohort DIR --agg topk --k-train 5 --epochs 20 --out models/top5
  lymphfeat endtoend --cohort DIR --agg mean+std --out models/spread
  torchrun --nproc-per-node 8 -m lymphfeat_cli endtoend --cohort DIR
  lymphfeat endtoend --cohort DIR --folds 5 --tta --init-head runs/best
  lymphfeat endtoend --cohort DIR --folds 5 --fusion late --attributes age,lymph_count
Run the same command again to resume an interrupted training.""",
)
@images_options
@click.option(
    "--out",
    type=PATH,
    default="models/endtoend",
    show_default=True,
    help="Model folder to write.",
)
@settings_options(EndToEndSettings(), omit=("class_weights", "solver"))
@click.option(
    "--folds",
    type=click.IntRange(2),
    help="Train this many members, each without one fold, and average them; threshold, "
    "calibration and fusion come from out-of-fold probabilities. [default: one model on all "
    "patients]",
)
@submission_header_option
@truth_option
@writing_options
def command(
    cohort: CohortChoice,
    out: Path,
    settings: EndToEndSettings,
    folds: int | None,
    submission_header: str,
    truth: "Truth | None",
    output: Output,
) -> None:
    """Train backbone and head together; write model, predictions and submission.

    Trains on all labelled patients (except --validation), predicts every patient, and writes a
    submission for the unlabelled ones.

    The built-in cohort is trained briefly (two minutes of one processor core), unless you choose
    otherwise, and scored on its truth.
    """
    from lymphfeat.training import train

    patients = cohort.usable(cohort.load(output), settings.backbone.crop, output)
    if cohort.built_in:
        settings, truth = _for_built_in(settings), truth or _read_truth()
    with output.progress("endtoend") as progress:
        trained = train(
            patients,
            out,
            settings,
            folds=folds,
            force=output.force,
            submission_header=submission_header,
            progress=progress,
        )
    scores = _score(truth, trained, out)
    output.show(lambda: _result(trained, out) | scores, lambda: _show(trained, out, scores))


def _for_built_in(settings: EndToEndSettings) -> EndToEndSettings:
    chosen = unless_given(settings, BUILT_IN)
    if chosen != settings:
        note(
            f"Trained briefly: --epochs {chosen.epochs} --images-per-patient "
            f"{chosen.images_per_patient} --batch-size {chosen.batch_size} --lr "
            f"{chosen.head.lr:g}. Your own cohorts get the defaults of --help."
        )
    return chosen


def _read_truth() -> "Truth":
    from lymphfeat.evaluation.hidden_truth import Truth

    return Truth.read([built_in_truth()])


def _score(truth: "Truth | None", trained: "AnyModel", out: Path) -> dict[str, dict[str, float]]:
    """Score what was written against hidden truth; empty without."""
    from lymphfeat.model.predictions import Predictions
    from lymphfeat.model.submission import IMAGES_FILE, PATIENTS_FILE

    if truth is None or not is_first():
        return {}
    written = Predictions.read(out / PATIENTS_FILE, out / IMAGES_FILE)
    return {"truth": truth.score(written.images, written.patients, trained.threshold)}


def _result(trained: "AnyModel", out: Path) -> dict[str, object]:
    return {
        "model": str(out),
        "files": [str(path) for path in files_in(out)],
        "threshold": trained.threshold,
        "threshold_from": trained.threshold_from,
        "metrics": trained.metrics,
    }


Metrics = Mapping[str, Mapping[str, float | None]]


def warn_of_bag_size(metrics: Metrics) -> None:
    """Warn when the model's AUC is not significantly above that of bag size."""
    if _does_not_beat("baseline: bag size", metrics):
        note(
            "Warning: the model does not beat bag size alone (AUC "
            f"{metrics['baseline: bag size']['auc']:.2f}); it may have learnt only the number of "
            "images per patient."
        )


def warn_of_attributes(metrics: Metrics) -> None:
    """Warn when a fused model's AUC is not significantly above that of its attributes."""
    if IMAGES_ALONE in metrics and _does_not_beat("baseline: clinical", metrics):
        note(
            "Warning: images and attributes together do not beat the attributes alone (AUC "
            f"{metrics['baseline: clinical']['auc']:.2f}); the images may add nothing."
        )


def _does_not_beat(row: str, metrics: Metrics) -> bool:
    low = metrics.get(row, {}).get("auc_gain_low")
    return low is not None and low <= 0  # false for NaN: not measured


def _show(trained: "AnyModel", out: Path, scores: Mapping[str, dict[str, float]]) -> None:
    show_metrics("Final model, on labelled patients", trained.metrics)
    warn_of_bag_size(trained.metrics)
    warn_of_attributes(trained.metrics)
    show_truth(scores.get("truth", {}))
    click.echo(f"Tumoral if {threshold_text(trained.threshold)} ({trained.threshold_from}).")
    if "out of fold" in trained.metrics:
        click.echo(CROSS_FITTED)
    if IMAGES_ALONE in trained.metrics:
        click.echo("The fusion of each fold is learnt on the other folds, too.")
    for path in files_in(out):
        click.echo(f"wrote {path}")
    if not (out / "submission.csv").exists():
        note("No submission written: the cohort has no unlabelled patients.")
