"""`lymphfeat explain`: model + cohort -> HTML report of what the model looked at, with figures."""

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
    output_options,
    precision_option,
    progress_bar,
    seed_option,
    show_json,
    threads_option,
)
from lymphfeat_cli.results import show_metrics, show_truth, truth_option

if TYPE_CHECKING:
    from lymphfeat.explanation.explanation import Explanation

PAGE, CELL = Path("report.html"), Path("cell.png")


@click.command(
    "explain",
    epilog="""\b
Examples:
  lymphfeat explain --cohort DIR
  lymphfeat explain --model models/endtoend --cohort DIR --out report.html --figures pdf
  lymphfeat explain --image DIR/P7/000003.jpg --out cell.png
The report is one self-contained file: open it in a browser; no network is needed.""",
)
@click.option(
    "--model",
    "folder",
    type=click.Path(path_type=Path),
    default="models/endtoend",
    show_default=True,
    help="Model folder written by `lymphfeat endtoend`.",
)
@cohort_options
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Explain this one image instead of a cohort.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Report to write, or with --image the figure (.png, .pdf, .svg). "
    "[default: report.html, or cell.png]",
)
@click.option(
    "--figures",
    type=click.Choice(["png", "pdf", "both", "none"]),
    default="png",
    show_default=True,
    help="Format of the separate figures, in a folder next to the report.",
)
@click.option(
    "--plates",
    type=click.IntRange(0),
    default=6,
    show_default=True,
    help="Number of patients with a plate of cells as a figure; misclassified patients first.",
)
@click.option(
    "--megabytes",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Maximum size of the report; pictures are shrunk, then left out, to stay below it.",
)
@truth_option
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images per batch."
)
@seed_option
@precision_option(default="float32")
@device_option
@threads_option
@force_option
@output_options
def command(
    folder: Path,
    cohort: Path | None,
    table: Path | None,
    allow_missing: bool,
    reference_date: datetime,
    image: Path | None,
    out: Path | None,
    figures: str,
    plates: int,
    megabytes: int,
    truth: tuple[Path, ...],
    batch_size: int,
    seed: int,
    precision: str,
    device: str,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what a model looked at: cell scores, maps, and each cell's share of the decision.

    Writes an HTML report and figures, and prints how faithful they are: whether deleting the
    highest-scored cells changes probabilities more than deleting random cells.
    """
    out = out or (CELL if image else PAGE)
    if not out.parent.is_dir():
        raise click.UsageError(f"folder {out.parent} does not exist; create it first.")
    if image is not None:
        check_file(out, force=force)
        _explain_image(folder, image, out, device, precision, as_json)
        return
    from lymphfeat.evaluation.hidden_truth import Truth
    from lymphfeat.explanation.explanation import explain
    from lymphfeat.explanation.report import check_report, write_report
    from lymphfeat.model.model import Model

    check_report(out, force=force)
    model = Model.load(folder)
    known = Truth.read(truth) if truth else None
    patients = load_cohort(cohort, table, allow_missing, reference_date, quiet)
    with progress_bar("scoring", quiet) as progress:
        explanation = explain(
            model,
            patients,
            truth=known,
            seed=seed,
            device=device,
            precision=precision,
            threads=threads,
            batch_size=batch_size,
            progress=progress,
        )
    with progress_bar("picturing", quiet) as progress:
        files = write_report(
            explanation,
            out,
            budget=megabytes * 1_000_000,
            plates=plates,
            formats={"both": ("png", "pdf"), "none": ()}.get(figures, (figures,)),
            force=force,
            progress=progress,
        )
    if as_json:
        show_json(_result(explanation, files))
    else:
        _show(explanation, files)


def _explain_image(
    folder: Path, image: Path, out: Path, device: str, precision: str, as_json: bool
) -> None:
    from lymphfeat.explanation.report import write_cell
    from lymphfeat.model.model import Model

    cell = write_cell(Model.load(folder), image, out, device=device, precision=precision)
    if as_json:
        result = {"image": str(image), "logit": cell.logit, "probability": cell.probability}
        show_json(result | {"map": cell.grid.tolist(), "files": [str(out)]})
        return
    click.echo(f"{image}: score {cell.probability:.3f} (logit {cell.logit:+.3f})")
    click.echo("Logits per field of the map:")
    for row in cell.grid:
        click.echo("  " + " ".join(f"{value:+7.2f}" for value in row))
    click.echo(f"wrote {out}")


def _result(explanation: "Explanation", files: list[Path]) -> dict[str, object]:
    deletion, overlap = explanation.deletion, explanation.overlap
    return {
        "patients": len(explanation.patients),
        "images": len(explanation.images),
        "metrics": explanation.metrics(),
        "deletion": None if deletion is None else deletion.to_json(),
        "truth": explanation.truth_scores(),
        "overlap": None if overlap is None else vars(overlap),
        "files": [str(path) for path in files],
    }


def _show(explanation: "Explanation", files: list[Path]) -> None:
    from lymphfeat.explanation.text import deletion_told, summary

    click.echo(summary(explanation))
    show_metrics("Labelled patients", explanation.metrics())
    if explanation.deletion is not None:
        click.echo(deletion_told(explanation.deletion))
    show_truth(explanation.truth_scores())
    overlap = explanation.overlap
    if overlap is not None:
        click.echo(
            f"Maps of {overlap.images} atypical cells: AUC {overlap.auc:.3f} for fields on the "
            f"cell against fields off it; the highest is on it in {overlap.pointing:.0%} "
            f"of maps (chance {overlap.cell_share:.0%})."
        )
    click.echo(f"wrote {files[0]}")
    if len(files) > 1:
        click.echo(f"wrote {len(files) - 1} figures to {files[1].parent}")
