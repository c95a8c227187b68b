"""`lymphfeat fit-head`: feature store -> heads fitted on every split, and a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat.runtime.files import files_in
from lymphfeat_cli.head_options import TEXTS, grid_option, head_options, pop_grid
from lymphfeat_cli.options import (
    cache_path,
    device_option,
    force_option,
    is_first,
    number,
    output_options,
    precision_option,
    progress_bar,
    seed_option,
    show_json,
    show_table,
    threads_option,
    threshold_option,
    with_interval,
)

if TYPE_CHECKING:
    import pandas as pd

    from lymphfeat.evaluation.protocol import Outcome
    from lymphfeat.fitting import Run
    from lymphfeat.settings import FitSettings


@click.command(
    "fit-head",
    epilog="""\b
Examples:
  lymphfeat fit-head --agg topk
  lymphfeat fit-head --agg all --protocol both --seeds 10
  lymphfeat fit-head --agg topk --fusion late
  lymphfeat fit-head --agg topk --agg bnsigmoid --k-agg 1,5,10,20 --lr 1e-3,1e-2
  lymphfeat fit-head --agg topk --k-train 1,5 --k-percent 5,10,20 --unit image,pixel
  torchrun --nproc-per-node 2 -m lymphfeat_cli fit-head --agg all
Options with several values form a grid: each combination is one head; all are fitted at once.""",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Feature store written by `lymphfeat extract`. [default: cache/features.h5]",
)
@head_options(agg="topk", lr=0.003)
@grid_option(
    "--class-weights",
    TEXTS,
    "none, or balanced: equal weight for both classes in the loss. [default: none]",
)
@click.option(
    "--protocol",
    type=click.Choice(["honest", "report", "both"]),
    default="honest",
    show_default=True,
    help="honest: repeated stratified k-fold, threshold from training patients. report: random "
    "halves, threshold 0.5, mean of the ten best epochs (optimistic). both: run both and measure "
    "the optimism.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Number of random splits (report) or repeats of k-fold (honest).",
)
@click.option(
    "--folds",
    type=click.IntRange(3),
    default=5,
    show_default=True,
    help="Folds of the k-fold (honest).",
)
@click.option(
    "--splits",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Use these splits instead of the protocol's own: the splits.json of another run.",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=40, show_default=True, help="Training epochs."
)
@click.option(
    "--choose-epoch",
    "epoch",
    type=click.Choice(["last", "nested"]),
    default="last",
    show_default=True,
    help="last, or nested: the best epoch on out-of-fold probabilities within each training set "
    "(honest).",
)
@click.option(
    "--fusion",
    "fusions",
    multiple=True,
    type=click.Choice(["late", "sum", "experts", "all"]),
    help="Also fuse each head with the clinical attributes, in this way (honest). Repeatable.",
)
@click.option(
    "--attributes",
    type=TEXTS,
    default=(),
    help="Clinical columns to use, numeric or categorical. [default: all]",
)
@click.option(
    "--log-attributes",
    type=TEXTS,
    default=("lymph_count",),
    help="Clinical columns to log-transform. [default: lymph_count]",
)
@click.option(
    "--calibration",
    type=click.Choice(["platt", "temperature", "none"]),
    default="platt",
    show_default=True,
    help="How to calibrate probabilities on the training patients (honest).",
)
@threshold_option
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Patients (or, for top1, topk and topbottomk, selected instances) per step.",
)
@click.option(
    "--images-per-patient",
    type=click.IntRange(1),
    help="Number of images drawn per patient at every step. [default: all]",
)
@click.option(
    "--views",
    type=click.IntRange(1),
    help="Number of stored views to use; one is drawn per image at every step. [default: all]",
)
@click.option(
    "--tta", is_flag=True, help="Evaluate the mean over the views instead of the identity view."
)
@click.option(
    "--truth",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV (ID, FILE, IS_WITNESS) of witness images, to measure how well each head finds them.",
)
@precision_option(default="float32")
@click.option(
    "--allow-shared-images",
    is_flag=True,
    help="Continue even if training and validation patients share images (a leak).",
)
@click.option("--save", is_flag=True, help="Save the weights of the heads (heads.safetensors).")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder. [default: runs/<aggregators>-<protocol>, numbered if it exists]",
)
@seed_option
@device_option
@threads_option
@force_option
@output_options
def command(
    store: Path | None,
    splits: Path | None,
    truth: Path | None,
    save: bool,
    out: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fit MIL heads on cached feature maps, over all seeds and splits at once.

    Prints one row per head, best first, and writes a run folder with the table, all epochs,
    predictions and splits, and a figure.
    """
    from lymphfeat.cohort.splits import read_splits
    from lymphfeat.features.store import FeatureStore
    from lymphfeat.fitting import Run, fit_both, fit_heads
    from lymphfeat.heads.grid import expand
    from lymphfeat.settings import FitSettings

    grid = pop_grid(options)
    heads = expand(grid)
    protocol = options.pop("protocol")
    settings = FitSettings(**options, protocol="honest" if protocol == "both" else protocol)
    opened = FeatureStore.open(store or cache_path("features.h5"))
    folder = out or _free_folder(f"{'+'.join(dict.fromkeys(grid.agg))}-{protocol}")
    with progress_bar(f"fitting {len(heads)} heads", quiet) as progress:
        fit = fit_both if protocol == "both" else fit_heads
        found = fit(
            opened,
            heads,
            settings,
            folder,
            splits=read_splits(splits) if splits else None,
            truth=truth,
            save=save,
            force=force,
            progress=progress,
        )
    runs = [found] if isinstance(found, Run) else [found.report, found.honest]
    table = None if isinstance(found, Run) else found.table
    if not is_first():
        return  # of several processes only the first shows the result
    if as_json:
        show_json(_result(folder, runs, table))
        return
    for run in runs:
        _show(run.outcome, run.settings)
    if table is not None:
        _show_optimism(table)
    for warning in runs[-1].outcome.warnings:
        click.echo(f"Warning: {warning}")
    click.echo("Wrote " + ", ".join(map(str, files_in(folder))))


def _result(folder: Path, runs: "list[Run]", optimism: "pd.DataFrame | None") -> dict[str, object]:
    last = runs[-1].outcome
    result: dict[str, object] = {
        "folder": str(folder),
        "summary": last.summary.to_dict("records"),
        "warnings": list(last.warnings),
        "files": [str(path) for path in files_in(folder)],
    }
    if optimism is not None:
        result["report"] = runs[0].outcome.summary.to_dict("records")
        result["optimism"] = optimism.to_dict("records")
    return result


def _show_optimism(table: "pd.DataFrame") -> None:
    rows = [
        [
            row["head"],
            number(row["report"]),
            number(row["honest"]),
            with_interval(row["optimism"], row["optimism_low"], row["optimism_high"], "+.3f"),
            number(row["by_epochs"], "+.3f"),
        ]
        for row in table.to_dict("records")
    ]
    columns = ["head", "report", "honest", "optimism (95 %)", "of which: choice of epochs"]
    show_table(
        "Optimism of the report protocol in balanced accuracy (report − honest)", columns, rows
    )


def _free_folder(name: str) -> Path:
    """Return runs/<name>, or the first of runs/<name>-2, -3, … that does not exist yet."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def _show(outcome: "Outcome", settings: "FitSettings") -> None:
    summary = outcome.summary
    report = settings.protocol == "report"
    columns = ["head", "BA (95 %)", "sensitivity", "specificity", "AUC"]
    names = ["sensitivity", "specificity", "auc"]
    if report:
        columns += ["± uncorrected", "± as published", "BA last epoch", "BA oracle (optimistic)"]
        names += ["ba_half_width_uncorrected", "ba_half_width_published", "ba_last", "ba_oracle"]
    else:
        columns += ["log loss", "calibrated", "ECE", "calibrated"]
        names += ["log_loss", "log_loss_calibrated", "ece", "ece_calibrated"]
    if "bfloat16_change" in summary:
        columns.append("p shift by bfloat16")
        names.append("bfloat16_change")
    if "witness_auc" in summary:
        columns.append("cell AUC")
        names.append("witness_auc")
    rows = [
        [
            f"baseline: {row['head']}" if row["kind"] == "baseline" else row["head"],
            with_interval(row["ba"], row["ba_low"], row["ba_high"]),
            *(number(row[name]) for name in names),
        ]
        for row in summary.to_dict("records")
    ]
    runs = int(summary["runs"].iloc[0])
    title = (
        f"report protocol: {runs} splits, threshold 0.5, mean of the 10 best epochs per split "
        "(chosen on the evaluated patients: optimistic)"
        if report
        else f"honest protocol: {runs} splits per row, {settings.epoch} epoch, threshold "
        f"{outcome.thresholds}"
    )
    show_table(title, columns, rows)
