"""`lymphfeat reproduce report`: the report's results on a cohort, next to honest ones."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat_cli.options import (
    cache_path,
    cohort_options,
    device_option,
    force_option,
    load_cohort,
    output_options,
    precision_option,
    progress_bar,
    seed_option,
    show_json,
    show_table,
    threads_option,
    with_interval,
)

if TYPE_CHECKING:
    from lymphfeat.reproduction import Reproduction


@click.command(
    "reproduce",
    epilog="""\b
Examples:
  lymphfeat reproduce report --cohort DIR --weights imagenet
  lymphfeat reproduce report --backbone resnet18 --seeds 3 --epochs 20
  lymphfeat reproduce report --weights resnet18=cells.safetensors --weights imagenet
A second run reuses the feature stores of the first (in cache/reproduce).""",
)
@click.argument("what", type=click.Choice(["report"]))
@cohort_options
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    type=click.Choice(["resnet18", "resnet34", "resnet50"]),
    default=("resnet18", "resnet34", "resnet50"),
    show_default=True,
    help="Backbone to include. Repeatable; rows of the others are left out.",
)
@click.option(
    "--weights",
    multiple=True,
    help="As --weights of extract, for all backbones, or NAME=WEIGHTS for one. Repeatable. The "
    "report used imagenet. [default: auto]",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Number of random splits (report) and repeats of k-fold (honest).",
)
@click.option(
    "--folds",
    type=click.IntRange(3),
    default=5,
    show_default=True,
    help="Folds of the k-fold (honest).",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=40, show_default=True, help="Training epochs."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="runs/reproduce-report",
    show_default=True,
    help="Folder for runs, table and figures.",
)
@seed_option
@precision_option(default="auto")
@device_option
@threads_option
@force_option
@output_options
def command(
    what: str,
    cohort: Path | None,
    table: Path | None,
    allow_missing: bool,
    reference_date: datetime,
    backbones: tuple[str, ...],
    weights: tuple[str, ...],
    seeds: int,
    folds: int,
    epochs: int,
    out: Path,
    seed: int,
    precision: str,
    device: str,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Reproduce the report's comparisons on a cohort, under its protocol and under the honest one.

    Compares top-1, 5 and 10, top&bottom 5 and 10, bnsigmoid on three ResNets, mean with bnsigmoid,
    and all images with 10 per patient. Heads are fitted on cached frozen maps and shown next to
    the published results. The report trained whole networks, so absolute values may differ; the
    optimism is the result to look at.
    """
    from lymphfeat.reproduction import ReproductionSettings, reproduce_report
    from lymphfeat.settings import FitSettings

    settings = ReproductionSettings(
        backbones=backbones,
        weights=dict(_named(text) for text in weights),
        fit=FitSettings(
            seeds=seeds, folds=folds, epochs=epochs, seed=seed, device=device, threads=threads
        ),
        precision=precision,
    )
    patients = load_cohort(cohort, table, allow_missing, reference_date, quiet)
    with progress_bar("reproducing", quiet) as progress:
        found = reproduce_report(
            patients, settings, out, cache_path("reproduce"), force=force, progress=progress
        )
    if as_json:
        show_json(
            {
                "rows": found.table.to_dict("records"),
                "warnings": list(found.warnings),
                "files": [str(path) for path in found.files],
            }
        )
        return
    _show(found)


def _named(text: str) -> tuple[str, str]:
    name, equals, weights = text.partition("=")
    return (name, weights) if equals else ("", text)


def _show(found: "Reproduction") -> None:
    rows = [
        [
            row["name"],
            f"{row['published']:.3f} ± {row['published_half_width']:.3f}",
            _cell(row, "report") + ("*" if row["oracle"] else ""),
            _cell(row, "honest"),
            _cell(row, "optimism", "+.3f"),
        ]
        for row in found.table.to_dict("records")
    ]
    columns = ["", "published", "here, report protocol", "here, honest", "optimism"]
    show_table("Balanced accuracy (95 % interval; published: ± as published)", columns, rows)
    click.echo("* threshold chosen on the evaluated patients, as published for these rows.")
    for warning in found.warnings:
        click.echo(f"Warning: {warning}")
    click.echo("Wrote " + ", ".join(str(path) for path in found.files))


def _cell(row: dict[Any, Any], name: str, form: str = ".3f") -> str:
    return with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], form)
