"""`lymphfeat finalize`: a row of a run -> a model for new patients."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.runtime.files import files_in
from lymphfeat_cli.options import (
    EXISTING_FILE,
    FOLDER,
    Output,
    number,
    run_stores_option,
    with_interval,
    writing_options,
)
from lymphfeat_cli.results import threshold_text

if TYPE_CHECKING:
    from lymphfeat.model.final_model import FinalModel


@click.command(
    "finalize",
    epilog="""\b
Examples:
  lymphfeat finalize runs/topk-honest
  lymphfeat finalize runs/all-honest --row "top10 + clinical (late)" --out models/top10
  lymphfeat predict --model models/final --cohort DIR
The model is one folder to copy; it needs neither the run nor the store any more.""",
)
@click.argument("run", type=FOLDER)
@click.option(
    "--row",
    default="",
    help="Row of the run's table. [default: the head chosen inside, fused if the run has fusions]",
)
@click.option(
    "--members",
    is_flag=True,
    help="Average the heads of the first repeat's folds. [default: one head, refit on everybody]",
)
@run_stores_option
@click.option(
    "--weights",
    type=EXISTING_FILE,
    multiple=True,
    help="Weights file that the features were made with, if they were made with a file.",
)
@click.option(
    "--out", type=FOLDER, default="models/final", show_default=True, help="Model folder to write."
)
@writing_options
def command(
    run: Path,
    row: str,
    members: bool,
    stores: tuple[Path, ...],
    weights: tuple[Path, ...],
    out: Path,
    output: Output,
) -> None:
    """Make a row of an honest `fit-head` run a model for new patients.

    The head is fitted again on all labelled patients. How it is fused with the clinical attributes,
    its calibration, threshold and operating points come from out-of-fold probabilities.
    """
    from lymphfeat.finalization import finalize

    with output.progress("fitting") as progress:
        model = finalize(
            run,
            out,
            row=row,
            members=members,
            stores=stores,
            weights=weights,
            force=output.force,
            progress=progress,
        )
    output.show(lambda: _result(model, out), lambda: _show(model, out))


def _result(model: "FinalModel", out: Path) -> dict[str, object]:
    return {
        "row": model.row,
        "members": len(model.members),
        "attributes": list(model.attributes.names),
        "compares": list(model.compares),
        "threshold": model.threshold,
        "figures": dict(model.figures),
        "files": [str(path) for path in files_in(out)],
    }


def _show(model: "FinalModel", out: Path) -> None:
    reads = ", ".join(["images", *model.attributes.names])
    click.echo(f"{model.row}: reads {reads}; {threshold_text(model.threshold)}.")
    for key, name in (("row", "As measured by fit-head"), ("images", "Images alone")):
        figures = model.figures.get(key)
        if figures and (key == "row" or model.attributes.names):
            ba = with_interval(figures["ba"], figures["ba_low"], figures["ba_high"])
            click.echo(f"{name}: BA {ba}, AUC {number(figures['auc'])}.")
    if model.reads_images and model.compares == ("features",):
        click.echo(
            "Only features will tell which patients are unlike training, for the store has no "
            "image statistics. Extract again with --force to have stain, focus and scale, too."
        )
    if not model.reads_images:
        click.echo("It has no backbone: predict imported stores of the same features (--store).")
    click.echo("Research software, not a medical device.")
    for path in files_in(out):
        click.echo(f"wrote {path}")
