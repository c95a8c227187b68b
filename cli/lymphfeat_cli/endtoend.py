"""`lymphfeat endtoend`: cohort -> final model, trained through the backbone."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat.runtime.files import files_in
from lymphfeat_cli.head_options import head_options, only_head, pop_grid
from lymphfeat_cli.options import (
    cohort_options,
    device_option,
    force_option,
    is_first,
    load_cohort,
    note,
    output_options,
    precision_option,
    progress_bar,
    seed_option,
    show_json,
    threads_option,
    threshold_option,
    weights_option,
)
from lymphfeat_cli.results import (
    show_metrics,
    show_truth,
    submission_header_option,
    threshold_text,
    truth_option,
)

if TYPE_CHECKING:
    from lymphfeat.model.model import Model
    from lymphfeat.training import Members

CROSS_FITTED = (
    "Out of fold: each patient is judged by the member that has not seen it, at a threshold and "
    "calibration from the other folds (whose members have seen it); AUC is within folds."
)


@click.command(
    "endtoend",
    epilog="""\b
Examples:
  lymphfeat endtoend
  lymphfeat endtoend --cohort DIR --weights resnet18.safetensors --validation 0.2
  lymphfeat endtoend --cohort DIR --agg topk --k-train 5 --epochs 20 --out models/top5
  torchrun --nproc-per-node 8 -m lymphfeat_cli endtoend --cohort DIR
  lymphfeat endtoend --cohort DIR --folds 5 --tta --init-head runs/best
An interrupted training goes on when the same line is run again.""",
)
@cohort_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="models/endtoend",
    show_default=True,
    help="The model folder to write.",
)
@head_options(agg="bnsigmoid", lr=1e-4)
@click.option("--backbone", default="resnet18", show_default=True, help="Any timm model with maps.")
@weights_option
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True)
@click.option("--head-lr", type=float, help="The head's own. [default: --lr]")
@click.option(
    "--layer-decay",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Each stage of the backbone learns at so many times the rate of the one above.",
)
@click.option(
    "--freeze-stages",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="So many stages, from the stem up, keep weights and batch-norm (resnet18 has 5).",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Patients (or, for top1, topk and topbottomk, selected images) a step.",
)
@click.option(
    "--images-per-patient",
    type=click.IntRange(1),
    help="Draw so many of each patient's images anew at every step. [default: all]",
)
@click.option(
    "--max-forward-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Images at a time without gradients: bounds memory.",
)
@click.option(
    "--max-backward-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Images at a time with gradients: bounds memory.",
)
@click.option(
    "--gradient",
    type=click.Choice(["subset", "exact"]),
    default="subset",
    show_default=True,
    help="Through a random --max-backward-size images of a step, or through all of them.",
)
@click.option(
    "--no-grad-batchnorm",
    type=click.Choice(["train", "eval"]),
    default="train",
    show_default=True,
    help="Batch-norm of the images without gradients.",
)
@click.option("--freeze-batchnorm", is_flag=True, help="Keep batch-norm statistics as loaded.")
@click.option(
    "--flips/--no-flips", default=True, show_default=True, help="Random flips in training."
)
@click.option(
    "--colour-jitter",
    "--color-jitter",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Change brightness of each channel, saturation and contrast by up to this share.",
)
@click.option(
    "--affine",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Turn by up to so many half-turns; magnify and shift accordingly.",
)
@click.option(
    "--validation",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of labelled patients held out, for the curves.",
)
@click.option(
    "--folds",
    type=click.IntRange(2),
    help="Train so many members, each without one fold, and average them; threshold and "
    "calibration come from out-of-fold probabilities. [default: one model on all]",
)
@threshold_option
@click.option(
    "--init-head",
    type=click.Path(file_okay=False),
    help="Begin with the best linear head of this run of fit-head --save, on the same weights; it "
    "brings its own --agg and options.",
)
@click.option(
    "--allow-shared-images",
    is_flag=True,
    help="Go on though one image is in a training and in a held-out patient: a leak.",
)
@click.option("--tta", is_flag=True, help="Predict the mean over the four flips.")
@click.option(
    "--normalization",
    type=click.Choice(["imagenet", "challenge"]),
    default="imagenet",
    show_default=True,
    help="Channel constants; those the weights were trained with.",
)
@click.option("--crop", type=int, default=112, show_default=True, help="Centre crop in pixels.")
@click.option("--output-stride", type=click.Choice(["8", "16", "32"]), help="Dilated backbone.")
@precision_option(default="auto")
@submission_header_option
@truth_option
@seed_option
@device_option
@threads_option
@force_option
@output_options
def command(
    cohort: Path | None,
    table: Path | None,
    allow_missing: bool,
    reference_date: datetime,
    out: Path,
    submission_header: str,
    folds: int | None,
    truth: tuple[Path, ...],
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train backbone and head together; write the model, its predictions and a submission.

    Trains on all labelled patients (less --validation), predicts every patient, and writes a
    submission for the unlabelled ones.
    """
    from lymphfeat.evaluation.hidden_truth import Truth
    from lymphfeat.training import train

    settings = _settings(**options)
    known = Truth.read(truth) if truth else None
    patients = load_cohort(cohort, table, allow_missing, reference_date, quiet)
    with progress_bar("training", quiet) as progress:
        trained = train(
            patients,
            out,
            settings,
            folds=folds or None,
            force=force,
            submission_header=submission_header,
            progress=progress,
        )
    if not is_first():
        return  # of several processes the first shows the result
    scores = _score(known, trained.threshold, out)
    if as_json:
        show_json(_result(trained, out) | ({"truth": scores} if known else {}))
    else:
        _show(trained, out, scores)


def _settings(
    *,
    backbone: str,
    weights: str,
    crop: int,
    normalization: str,
    output_stride: str | None,
    freeze_batchnorm: bool,
    seed: int,
    **options: Any,
) -> Any:
    from lymphfeat.settings import BackboneSettings, EndToEndSettings

    head = only_head(pop_grid(options))
    return EndToEndSettings(
        backbone=BackboneSettings(
            backbone=backbone,
            weights=weights,
            crop=crop,
            normalization=normalization,
            output_stride=int(output_stride) if output_stride else None,
            weights_seed=seed,
        ),
        head=head,
        frozen_batchnorm=freeze_batchnorm,
        seed=seed,
        **options,
    )


def _score(known: Any, threshold: float, out: Path) -> dict[str, float]:
    if known is None:
        return {}
    from lymphfeat.model.predictions import Predictions
    from lymphfeat.model.submission import IMAGES_FILE, PATIENTS_FILE

    written = Predictions.read(out / PATIENTS_FILE, out / IMAGES_FILE)
    scores: dict[str, float] = known.score(written.images, written.patients, threshold)
    return scores


def _result(trained: "Model | Members", out: Path) -> dict[str, object]:
    return {
        "model": str(out),
        "files": [str(path) for path in files_in(out)],
        "threshold": trained.threshold,
        "threshold_from": trained.threshold_from,
        "metrics": trained.metrics,
    }


def warn_of_bag_size(metrics: Mapping[str, Mapping[str, float | None]]) -> None:
    """Say so when the model's AUC is not surely above that of bag size."""
    beside = metrics.get("baseline: bag size", {})
    low = beside.get("auc_gain_low")
    if low is not None and low <= 0:  # not where it is NaN: nothing was measured then
        note(
            f"Warning: the model does not beat bag size alone (AUC {beside['auc']:.2f}); what it "
            "learnt may be how many images a patient has."
        )


def _show(trained: "Model | Members", out: Path, scores: dict[str, float]) -> None:
    show_metrics("Patients, as the final model predicts them", trained.metrics)
    warn_of_bag_size(trained.metrics)
    show_truth(scores)
    click.echo(f"Called tumoral: {threshold_text(trained.threshold)} ({trained.threshold_from}).")
    if "out of fold" in trained.metrics:
        click.echo(CROSS_FITTED)
    for path in files_in(out):
        click.echo(f"wrote {path}")
    if not (out / "submission.csv").exists():
        note("No submission written: the cohort has no unlabelled patient.")
