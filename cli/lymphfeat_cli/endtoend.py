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
    from lymphfeat.model.ensemble import Ensemble
    from lymphfeat.model.model import Model

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
  torchrun --nproc-per-node 8 -m lymphfeat_cli endtoend --cohort DIR
  lymphfeat endtoend --cohort DIR --folds 5 --tta --init-head runs/best
Run the same command again to resume an interrupted training.""",
)
@cohort_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="models/endtoend",
    show_default=True,
    help="Model folder to write.",
)
@head_options(agg="bnsigmoid", lr=1e-4)
@click.option(
    "--backbone",
    default="resnet18",
    show_default=True,
    help="Any timm model that returns feature maps.",
)
@weights_option
@click.option(
    "--epochs", type=click.IntRange(1), default=40, show_default=True, help="Training epochs."
)
@click.option("--head-lr", type=float, help="Learning rate of the head. [default: --lr]")
@click.option(
    "--layer-decay",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Learning-rate multiplier per stage downward.",
)
@click.option(
    "--freeze-stages",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of stages to freeze, from the stem up: weights and batch-norm (resnet18 has 5).",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Patients (or, for top1, topk and topbottomk, selected images) per step.",
)
@click.option(
    "--images-per-patient",
    type=click.IntRange(1),
    help="Number of images drawn per patient at every step. [default: all]",
)
@click.option(
    "--max-forward-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Maximum images per pass without gradients; limits memory.",
)
@click.option(
    "--max-backward-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Maximum images per pass with gradients; limits memory.",
)
@click.option(
    "--gradient",
    type=click.Choice(["subset", "exact"]),
    default="subset",
    show_default=True,
    help="Images that receive gradients in a step: a random --max-backward-size of them, or all.",
)
@click.option(
    "--no-grad-batchnorm",
    type=click.Choice(["train", "eval"]),
    default="train",
    show_default=True,
    help="Batch-norm mode in passes without gradients.",
)
@click.option(
    "--freeze-batchnorm", is_flag=True, help="Keep the batch-norm statistics of the weights."
)
@click.option(
    "--flips/--no-flips", default=True, show_default=True, help="Random flips during training."
)
@click.option(
    "--colour-jitter",
    "--color-jitter",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Random change of brightness per channel, saturation and contrast, up to this fraction.",
)
@click.option(
    "--affine",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Maximum random rotation in half-turns (1 is 180°), with scaling and shifts to match.",
)
@click.option(
    "--validation",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of labelled patients held out to draw validation curves.",
)
@click.option(
    "--folds",
    type=click.IntRange(2),
    help="Train this many members, each without one fold, and average them; threshold and "
    "calibration come from out-of-fold probabilities. [default: one model on all patients]",
)
@threshold_option
@click.option(
    "--init-head",
    type=click.Path(file_okay=False),
    help="Start from the best linear head of this run of fit-head --save on the same weights; "
    "its aggregator and options replace those given here.",
)
@click.option(
    "--allow-shared-images",
    is_flag=True,
    help="Continue even if training and held-out patients share images (a leak).",
)
@click.option("--tta", is_flag=True, help="Predict the mean over the four flips.")
@click.option(
    "--normalization",
    type=click.Choice(["imagenet", "challenge"]),
    default="imagenet",
    show_default=True,
    help="Channel means and scales; use those the weights were trained with.",
)
@click.option(
    "--crop", type=int, default=112, show_default=True, help="Side of the centre crop in pixels."
)
@click.option(
    "--output-stride",
    type=click.Choice(["8", "16", "32"]),
    help="Stride of the feature maps, by dilation. [default: the backbone's own]",
)
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
    """Train backbone and head together; write model, predictions and submission.

    Trains on all labelled patients (except --validation), predicts every patient, and writes a
    submission for the unlabelled ones.
    """
    from lymphfeat.evaluation.hidden_truth import Truth
    from lymphfeat.training import train

    settings = _settings(**options)
    known = Truth.read(truth) if truth else None
    patients = load_cohort(cohort, table, allow_missing, reference_date, quiet)
    with progress_bar("endtoend", quiet) as progress:
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
        return  # of several processes only the first shows the result
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


def _result(trained: "Model | Ensemble", out: Path) -> dict[str, object]:
    return {
        "model": str(out),
        "files": [str(path) for path in files_in(out)],
        "threshold": trained.threshold,
        "threshold_from": trained.threshold_from,
        "metrics": trained.metrics,
    }


def warn_of_bag_size(metrics: Mapping[str, Mapping[str, float | None]]) -> None:
    """Warn when the model's AUC is not significantly above that of bag size."""
    baseline = metrics.get("baseline: bag size", {})
    low = baseline.get("auc_gain_low")
    if low is not None and low <= 0:  # false for NaN: not measured
        note(
            f"Warning: the model does not beat bag size alone (AUC {baseline['auc']:.2f}); it "
            "may have learnt only the number of images per patient."
        )


def _show(trained: "Model | Ensemble", out: Path, scores: dict[str, float]) -> None:
    show_metrics("Final model, on labelled patients", trained.metrics)
    warn_of_bag_size(trained.metrics)
    show_truth(scores)
    click.echo(f"Tumoral if {threshold_text(trained.threshold)} ({trained.threshold_from}).")
    if "out of fold" in trained.metrics:
        click.echo(CROSS_FITTED)
    for path in files_in(out):
        click.echo(f"wrote {path}")
    if not (out / "submission.csv").exists():
        note("No submission written: the cohort has no unlabelled patients.")
