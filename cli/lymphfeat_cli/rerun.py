"""`lymphfeat rerun`: a run, repeated and compared with itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat.settings import FitSettings
from lymphfeat_cli.main import EXIT_FAILED
from lymphfeat_cli.options import (
    EXISTING_FILE,
    FOLDER,
    PATH,
    Output,
    run_stores_option,
    show_table,
    writing_options,
)

if TYPE_CHECKING:
    from lymphfeat.repetition import Repetition


@click.command(
    "rerun",
    epilog="""\b
Examples:
  lymphfeat rerun runs/topk-honest
  lymphfeat rerun runs/topk-honest --store elsewhere/features.h5 --out again
Ends with status 0 if the result is the same, 1 if it differs, 2 for a mistake.""",
)
@click.argument("run", type=PATH)
@run_stores_option
@click.option(
    "--truth",
    type=EXISTING_FILE,
    help="Where the truth is now that the run was fitted with. [default: where it was]",
)
@click.option(
    "--device",
    type=click.Choice(FitSettings.about()["device"].choices),
    help="Compute device. [default: the run's]",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: the run's]")
@click.option("--out", type=FOLDER, help="Folder of the repeat. [default: RUN-again]")
@writing_options
def command(run: Path, out: Path | None, output: Output, **given: Any) -> None:
    """Repeat a run of `fit-head` from what its folder holds, and compare the results.

    Files are compared byte for byte; of those that differ, the largest difference of two numbers is
    shown. So is what differs in versions, device, processor and threads between then and now.
    """
    from lymphfeat.repetition import rerun

    with output.progress("repeating") as progress:
        found = rerun(run, out, force=output.force, progress=progress, **given)
    output.show(lambda: _result(found), lambda: _show(found))
    if not found.same:
        click.get_current_context().exit(EXIT_FAILED)


def _result(found: "Repetition") -> dict[str, object]:
    return {
        "run": str(found.run),
        "out": str(found.out),
        "same": found.same,
        "files": [vars(each) for each in found.files],
        "figures": [vars(each) for each in found.figures],
        "changed": list(found.changed),
    }


def _show(found: "Repetition") -> None:
    if found.same:
        click.echo(f"The same: {len(found.files)} files of {found.out} are those of {found.run}.")
    else:
        rows = [
            [each.name, "–" if each.largest is None else f"{each.largest:.3g}", each.where]
            for each in found.different
        ]
        title = f"{len(rows)} of {len(found.files)} files differ"
        show_table(title, ["file", "largest difference", "in"], rows)
    drawn = [each.name for each in found.figures if not each.same]
    if drawn:
        click.echo(f"Figures that differ: {', '.join(drawn)}.")
    for line in found.changed:
        click.echo(f"Changed since: {line}.")
    click.echo(f"The repeat is in {found.out}.")
