"""`lymphfeat rerun`: a result, made again and compared with itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat.settings import FitSettings
from lymphfeat_cli.main import EXIT_FAILED
from lymphfeat_cli.options import (
    COHORT_VARIABLE,
    EXISTING_FILE,
    PATH,
    Output,
    gather,
    run_stores_option,
    show_table,
    writing_options,
)

if TYPE_CHECKING:
    from lymphfeat.repetition.comparison import Repetition

_PLACES = {
    "stores": run_stores_option,
    "truth": click.option(
        "--truth",
        type=EXISTING_FILE,
        help="Where the truth that a run was fitted with is now. [default: where it was]",
    ),
    "cohort": click.option(
        "--cohort",
        type=PATH,
        envvar=COHORT_VARIABLE,
        help="Cohort folder that a store or a model was made of; they hold no path to it. "
        f"[env: {COHORT_VARIABLE}]",
    ),
    "table": click.option(
        "--table",
        type=PATH,
        help="Where the cohort's CSV file is now, if it was not in the cohort folder.",
    ),
    "weights": click.option(
        "--weights",
        type=PATH,
        help="Where the weights file that a store or a model was made with is now. "
        "[default: where it was; of a store, the file of that name in the current folder]",
    ),
    "init_head": click.option(
        "--init-head",
        type=PATH,
        help="Where the run that a model's head started from is now. [default: where it was]",
    ),
}
# Facts that results of earlier versions do not hold.
_FACTS = {
    "reference_date": click.option(
        "--reference-date",
        type=click.DateTime(["%Y-%m-%d"]),
        help="Date by which ages were computed. [default: the recorded one, or 2021-01-01]",
    ),
    "allow_missing": click.option(
        "--allow-missing",
        is_flag=True,
        default=None,
        help="Patients without images were skipped. [default: as recorded]",
    ),
    "on_error": click.option(
        "--on-error",
        type=click.Choice(["stop", "skip"]),
        help="What was done about images that cannot be used. [default: as recorded]",
    ),
    "seed": click.option(
        "--seed",
        type=click.IntRange(0),
        help="Seed of a store's random weights. [default: as recorded]",
    ),
}
_COMPUTING = {
    "device": click.option(
        "--device",
        type=click.Choice(FitSettings.about()["device"].choices),
        help="Compute device. [default: that of the result]",
    ),
    "threads": click.option(
        "--threads", type=click.IntRange(1), help="CPU threads. [default: as many as then]"
    ),
}


def _here(values: dict[str, Any]) -> dict[str, Any]:
    moment = values["reference_date"]
    return {**values, "reference_date": moment and moment.date()}


@click.command(
    "rerun",
    epilog="""\b
Examples:
  lymphfeat rerun runs/topk-honest
  lymphfeat rerun runs/topk-honest --store elsewhere/features.h5 --out again
  lymphfeat rerun cache/features.h5 --cohort DIR
  lymphfeat rerun models/endtoend --cohort DIR --threads 1
Ends with status 0 if the result is the same, 1 if it differs, 2 for a mistake.""",
)
@click.argument("result", type=PATH)
@gather("here", _PLACES | _FACTS | _COMPUTING, _here)
@click.option(
    "--out", type=PATH, help="Folder (of a store: file) of the repeat. [default: RESULT-again]"
)
@writing_options
def command(result: Path, here: dict[str, Any], out: Path | None, output: Output) -> None:
    """Repeat a run of `fit-head`, a store of `extract` or a model of `endtoend`, and compare.

    Settings, seeds and splits are those that the result records. The files of a folder are compared
    byte for byte; of those that differ, the largest difference of two numbers is shown. Stores are
    compared by patient. Shown, too, is what differs in versions, device, processor and threads
    between then and now.
    """
    from lymphfeat.repetition.repetition import rerun

    with output.progress("repeating") as progress:
        found = rerun(result, out, force=output.force, progress=progress, **here)
    output.show(lambda: _result(found), lambda: _show(found))
    if not found.same:
        click.get_current_context().exit(EXIT_FAILED)


def _result(found: "Repetition") -> dict[str, object]:
    return {
        "result": str(found.result),
        "out": str(found.out),
        "same": found.same,
        "files": [vars(each) for each in found.files],
        "figures": [vars(each) for each in found.figures],
        "changed": list(found.changed),
    }


def _show(found: "Repetition") -> None:
    things = "parts" if found.result.is_file() else "files"
    if found.same:
        click.echo(
            f"The same: {len(found.files)} {things} of {found.out} are those of {found.result}."
        )
    else:
        rows = [
            [each.name, "–" if each.largest is None else f"{each.largest:.3g}", each.where]
            for each in found.different
        ]
        title = f"{len(rows)} of {len(found.files)} {things} differ"
        show_table(title, [things[:-1], "largest difference", "in"], rows)
    drawn = [each.name for each in found.figures if not each.same]
    if drawn:
        click.echo(f"Figures that differ: {', '.join(drawn)}.")
    for line in found.changed:
        click.echo(f"Changed since: {line}.")
    click.echo(f"The repeat is in {found.out}.")
