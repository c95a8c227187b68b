"""`lymphfeat explain`: model + cohort -> HTML report of what the model looked at, with figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.settings import ExplainSettings
from lymphfeat_cli.deciding import final_only, without_attributes_option
from lymphfeat_cli.options import (
    EXISTING_FILE,
    FILE,
    PATH,
    CohortChoice,
    Output,
    cohort_options,
    writing_options,
)
from lymphfeat_cli.results import show_metrics, show_truth, truth_option
from lymphfeat_cli.settings_options import settings_options

if TYPE_CHECKING:
    from lymphfeat.cohort.cohort import Cohort
    from lymphfeat.evaluation.hidden_truth import Truth
    from lymphfeat.explanation.explanation import Explanation
    from lymphfeat.explanation.report import Cell
    from lymphfeat.model.loading import AnyModel

PAGE, CELL = Path("report.html"), Path("cell.png")


@click.command(
    "explain",
    epilog="""\b
Examples:
  lymphfeat explain --cohort DIR
  lymphfeat explain --model models/endtoend --cohort DIR --out report.html --figures pdf
  lymphfeat explain --model models/final --cohort DIR --store cache/features.h5
  lymphfeat explain --image DIR/P7/000003.jpg --out cell.png
The report is one self-contained file: open it in a browser; no network is needed.""",
)
@click.option(
    "--model",
    "folder",
    type=PATH,
    default="models/endtoend",
    show_default=True,
    help="Model folder written by `endtoend` or `finalize`.",
)
@cohort_options
@click.option(
    "--image",
    type=EXISTING_FILE,
    help="Explain this one image instead of a cohort.",
)
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=PATH,
    help="Feature store that was extracted from the cohort: a final model is explained from its "
    "maps, and the images are only shown. Repeatable: one per backbone of the model, in its order.",
)
@without_attributes_option
@click.option(
    "--out",
    type=FILE,
    help="Report to write, or with --image the figure (.png, .pdf, .svg). "
    "[default: report.html, or cell.png]",
)
@truth_option
@settings_options(ExplainSettings())
@writing_options
def command(
    folder: Path,
    cohort: CohortChoice,
    image: Path | None,
    stores: tuple[Path, ...],
    without_attributes: bool,
    out: Path | None,
    truth: "Truth | None",
    settings: ExplainSettings,
    output: Output,
) -> None:
    """Show what a model looked at: cell scores, maps, and what each cell contributes.

    Writes an HTML report and figures, and prints how faithful they are: whether deleting the
    highest-scored cells changes probabilities more than deleting random cells.
    """
    if image and stores:
        raise click.UsageError("--image and --store: give only one of them.")
    out = out or (CELL if image else PAGE)
    output.claim(out)
    from lymphfeat.explanation.report import check_report

    if image:
        _explain_image(_load(folder), image, out, settings, output)
        return
    check_report(out, force=output.force)
    model = _load(folder, images_only=without_attributes)
    explanation = _explain(model, cohort.load(output), stores, truth, settings, output)
    files = _write(explanation, out, settings, output)
    output.show(lambda: _result(explanation, files), lambda: _show(explanation, files))


def _load(folder: Path, *, images_only: bool = False) -> "AnyModel":
    from lymphfeat.model.final_model import FinalModel
    from lymphfeat.model.loading import load_model

    model = load_model(folder)
    if images_only and isinstance(model, FinalModel):
        return model.without_attributes()
    return model


def _explain(
    model: "AnyModel",
    cohort: "Cohort",
    stores: Sequence[Path],
    truth: "Truth | None",
    settings: ExplainSettings,
    output: Output,
) -> "Explanation":
    from lymphfeat.explanation.explanation import explain
    from lymphfeat.features.store import FeatureStore

    if stores:
        final_only(model, "--store")
    opened = [FeatureStore.open(path) for path in stores]
    with output.progress("scoring") as progress:
        return explain(model, cohort, settings, stores=opened, truth=truth, progress=progress)


def _write(
    explanation: "Explanation", out: Path, settings: ExplainSettings, output: Output
) -> list[Path]:
    from lymphfeat.explanation.report import write_report

    return write_report(explanation, out, settings, force=output.force)


def _explain_image(
    model: "AnyModel", image: Path, out: Path, settings: ExplainSettings, output: Output
) -> None:
    from lymphfeat.explanation.report import write_cell

    cell = write_cell(model, image, out, settings)
    result = {"image": str(image), "logit": cell.logit, "probability": cell.probability}
    output.show(
        lambda: result | {"map": cell.grid.tolist(), "files": [str(out)]},
        lambda: _show_cell(cell, image, out),
    )


def _show_cell(cell: "Cell", image: Path, out: Path) -> None:
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
        "subgroups": _subgroups(explanation),
        "truth": explanation.truth_scores(),
        "overlap": None if overlap is None else vars(overlap),
        "files": [str(path) for path in files],
    }


def _subgroups(explanation: "Explanation") -> dict[str, object] | None:
    found = explanation.subgroups
    if found is None:
        return None
    return {"patients": found.of, "groups": found.rows.to_dict("records")}


def _show(explanation: "Explanation", files: list[Path]) -> None:
    from lymphfeat.explanation.text import describe_deletion, summary

    click.echo(summary(explanation))
    show_metrics("Labelled patients", explanation.metrics())
    if explanation.deletion is not None:
        click.echo(describe_deletion(explanation.deletion))
    show_truth(explanation.truth_scores())
    overlap = explanation.overlap
    if overlap is not None:
        click.echo(
            f"Maps of {overlap.images} atypical cells: AUC {overlap.auc:.3f} for fields on the "
            f"cell against fields off it; the highest is on it in {overlap.pointing:.0%} "
            f"of maps (chance {overlap.cell_share:.0%})."
        )
    figures = [path for path in files[1:] if path.parent != files[0].parent]
    click.echo(f"wrote {', '.join(str(path) for path in files if path not in figures)}")
    if figures:
        click.echo(f"wrote {len(figures)} figures to {figures[0].parent}")
