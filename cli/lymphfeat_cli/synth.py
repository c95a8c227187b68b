"""`lymphfeat synth`: write a synthetic cohort, or a plate of its cells to look at."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat_cli.options import (
    force_option,
    output_options,
    progress_bar,
    seed_option,
    show_json,
    show_table,
)

if TYPE_CHECKING:
    from lymphfeat.synthetic.cohort import SyntheticSettings

SHARE = click.FloatRange(0, 1)


@click.command(
    "synth",
    epilog="""\b
Examples:
  lymphfeat synth --out made-up
  lymphfeat synth --out hard --difficulty 0.6 --witness-share 0.03 0.1 --patients 200
  lymphfeat synth --plate cells.png --difficulty 0.6
Next, run `lymphfeat audit --cohort made-up`, or pass the folder to any other command.""",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write the cohort into.",
)
@click.option(
    "--patients", type=click.IntRange(2), default=60, show_default=True, help="Labelled patients."
)
@click.option(
    "--test-patients",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Patients with label -1; truth.csv has their true label.",
)
@click.option(
    "--images",
    type=click.IntRange(1, 100_000),
    default=24,
    show_default=True,
    help="Mean number of images per patient; the range is 1/2 to 5/3 of it.",
)
@click.option(
    "--tumoral-share",
    "tumoral",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.6,
    show_default=True,
    help="Share of tumoral patients.",
)
@click.option(
    "--witness-share",
    type=(SHARE, SHARE),
    metavar="LOW HIGH",
    default=(0.08, 0.3),
    show_default=True,
    help="Range of the share of atypical cells in tumoral patients (always at least one cell).",
)
@click.option(
    "--difficulty",
    type=SHARE,
    default=0.3,
    show_default=True,
    help="0: atypical cells are clearly different; 1: not different at all.",
)
@click.option(
    "--size-confounding",
    type=SHARE,
    default=0.3,
    show_default=True,
    help="How strongly the number of images depends on the label; about 0.5 in the challenge.",
)
@click.option(
    "--attribute-strength",
    type=SHARE,
    default=0.5,
    show_default=True,
    help="How strongly age and lymphocyte count depend on the label.",
)
@click.option(
    "--plate",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw sample cells of each class to this PNG file; works without --out.",
)
@seed_option
@force_option
@output_options
def command(
    out: Path | None,
    plate: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Write a synthetic cohort in the layout of the real one.

    Renders smears in the challenge's layout, including its quirks. Tumoral patients have a share of
    atypical cells, reactive patients have none; truth.csv lists them, for scoring only, never for
    training. The same options give the same bytes. A finished cohort with the same settings is
    kept; one with different settings is replaced only with --force, which never touches files
    that synth did not write.
    """
    if out is None and plate is None:
        raise click.UsageError("give a folder with --out DIR, or a figure with --plate FILE.png.")
    from lymphfeat.synthetic.cohort import SyntheticSettings, write_plate

    settings = SyntheticSettings(**chosen)
    written: dict[str, object] = {}
    if plate is not None:
        written["plate"] = write_plate(settings, plate, force=force)
    if out is not None:
        written |= _write_cohort(settings, out, force, quiet)
    if as_json:
        show_json(written)
    else:
        _show(written)


def _write_cohort(
    settings: "SyntheticSettings", out: Path, force: bool, quiet: bool
) -> dict[str, object]:
    from lymphfeat.synthetic.cohort import TRUTH, count_synthetic_cohort, write_synthetic_cohort

    with progress_bar("rendering cells", quiet) as progress:
        write_synthetic_cohort(settings, out, force=force, progress=progress)
    return {"cohort": out, "truth": out / TRUTH, **count_synthetic_cohort(out)}


def _show(written: dict[str, object]) -> None:
    for name in ("plate", "cohort", "truth"):
        if name in written:
            click.echo(f"{name:7} {written[name]}")
    if "cohort" in written:
        rows = [
            ("labelled", written["reactive"], written["tumoral"]),
            ("test", written["test_reactive"], written["test_tumoral"]),
        ]
        show_table("Patients", ["split", "reactive", "tumoral"], rows)
        click.echo(f"{written['images']} images, {written['atypical']} of them of atypical cells")
