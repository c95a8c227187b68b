"""`lymphfeat reproduce report`: the report's results on a cohort, next to honest ones."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat.settings import ExtractSettings, FitSettings, Precision
from lymphfeat_cli.options import (
    FOLDER,
    CohortChoice,
    Output,
    cache_path,
    cohort_options,
    show_table,
    with_interval,
    writing_options,
)
from lymphfeat_cli.settings_options import option_of, settings_options

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
@click.argument("what", type=click.Choice(["report"]), expose_value=False)
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
@settings_options(FitSettings(), only=("seeds", "folds", "epochs", "seed", "device", "threads"))
@option_of(ExtractSettings(), "precision")
@click.option(
    "--out",
    type=FOLDER,
    default="runs/reproduce-report",
    show_default=True,
    help="Folder for runs, table and figures.",
)
@writing_options
def command(
    cohort: CohortChoice,
    backbones: tuple[str, ...],
    weights: tuple[str, ...],
    settings: FitSettings,
    precision: Precision,
    out: Path,
    output: Output,
) -> None:
    """Reproduce the report's comparisons on a cohort, under its protocol and under the honest one.

    Compares top-1, 5 and 10, top&bottom 5 and 10, bnsigmoid on three ResNets, mean with bnsigmoid,
    and all images with 10 per patient. Heads are fitted on cached frozen maps and shown next to
    the published results. The report trained whole networks, so absolute values may differ; the
    optimism is the result to look at.
    """
    from lymphfeat.reproduction import ReproductionSettings, reproduce_report

    chosen = ReproductionSettings(
        backbones=backbones,
        weights=dict(_named(text) for text in weights),
        fit=settings,
        precision=precision,
    )
    patients = cohort.load(output)
    with output.progress("reproducing") as progress:
        found = reproduce_report(
            patients, chosen, out, cache_path("reproduce"), force=output.force, progress=progress
        )
    output.show(lambda: _result(found), lambda: _show(found))


def _result(found: "Reproduction") -> dict[str, object]:
    return {
        "rows": found.table.to_dict("records"),
        "warnings": list(found.warnings),
        "files": [str(path) for path in found.files],
    }


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
