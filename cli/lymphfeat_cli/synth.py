"""`lymphfeat synth`: write a synthetic cohort, or a plate of its cells to look at."""

from pathlib import Path

import click

from lymphfeat.settings import SyntheticSettings
from lymphfeat_cli.options import FILE, PATH, Output, show_table, writing_options
from lymphfeat_cli.settings_options import settings_options


@click.command(
    "synth",
    epilog="""\b
Examples:
  lymphfeat synth --out made-up
  lymphfeat synth --out hard --difficulty 0.6 --witness-share 0.03 0.1 --patients 200
  lymphfeat synth --out alike --sign variety --size-confounding 0
  lymphfeat synth --plate cells.png --difficulty 0.6
Next, run `lymphfeat audit --cohort made-up`, or pass the folder to any other command.""",
)
@click.option("--out", type=PATH, help="Folder to write the cohort into.")
@settings_options(SyntheticSettings())
@click.option(
    "--plate",
    type=FILE,
    help="Draw sample cells of each class, or of some patients, to this PNG file; works without "
    "--out.",
)
@writing_options
def command(
    out: Path | None, settings: SyntheticSettings, plate: Path | None, output: Output
) -> None:
    """Write a synthetic cohort in the layout of the real one.

    Renders smears in the challenge's layout, including its quirks. Tumoral patients differ from
    reactive ones by --sign; by default they have a share of atypical cells, which reactive patients
    do not have, and truth.csv lists these cells, for scoring only, never for training. The same
    options give the same bytes. A finished cohort with the same settings is kept; one with
    different settings is replaced only with --force, which never touches files that synth did not
    write.
    """
    if out is None and plate is None:
        raise click.UsageError("give a folder with --out DIR, or a figure with --plate FILE.png.")
    from lymphfeat.synthetic.cohort import write_plate

    written: dict[str, object] = {}
    if plate is not None:
        written["plate"] = write_plate(settings, plate, force=output.force)
    if out is not None:
        written |= _write_cohort(settings, out, output)
    output.show(lambda: written, lambda: _show(written))


def _write_cohort(settings: SyntheticSettings, out: Path, output: Output) -> dict[str, object]:
    from lymphfeat.synthetic.cohort import TRUTH, count_synthetic_cohort, write_synthetic_cohort

    with output.progress("rendering cells") as progress:
        write_synthetic_cohort(settings, out, force=output.force, progress=progress)
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
        atypical = written["atypical"]
        suffix = f", {atypical} of them of atypical cells" if atypical else ""
        click.echo(f"{written['images']} images{suffix}")
