"""`lymphfeat fit-head`: feature store -> heads fitted on every split, and a table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lymphfeat.runtime.files import check_folder, files_in, recover
from lymphfeat.settings import FitSettings, HeadGrid, ProtocolName, choices
from lymphfeat_cli.options import (
    EXISTING,
    EXISTING_FILE,
    FOLDER,
    PATH,
    Output,
    cache_path,
    gather,
    note,
    number,
    show_table,
    with_interval,
    writing_options,
)
from lymphfeat_cli.settings_options import grid_options, settings_options

if TYPE_CHECKING:
    import pandas as pd

    from lymphfeat.cohort.splits import Split
    from lymphfeat.evaluation.protocol import FinishedHead, Outcome
    from lymphfeat.features.store import FeatureStore
    from lymphfeat.fitting import Run
    from lymphfeat.settings import HeadSettings


def _read_splits(values: dict[str, Any]) -> "list[Split] | None":
    from lymphfeat.cohort.splits import read_splits

    return read_splits(values["splits"]) if values["splits"] else None


splits_option = gather(
    "splits",
    {
        "splits": click.option(
            "--splits",
            type=EXISTING,
            help="Use these splits instead of the protocol's own: the splits.json of another run, "
            "a CSV (id,fold or id,split), or CLAM's splits_0.csv or its folder.",
        )
    },
    _read_splits,
)


@click.command(
    "fit-head",
    epilog="""\b
Examples:
  lymphfeat fit-head --agg topk
  lymphfeat fit-head --agg all --protocol both --seeds 10
  lymphfeat fit-head --agg topk --fusion late --model-out models/topk
  lymphfeat fit-head --agg distribution --agg mean+std
  lymphfeat fit-head --agg mean+std --groups laboratory
  lymphfeat fit-head --store a.h5 --store b.h5 --agg mean+std --agg quantiles@1+mean@2
  lymphfeat fit-head --agg topk --agg bnsigmoid --k-agg 1,5,10,20 --lr 1e-3,1e-2
  lymphfeat fit-head --agg topk --k-agg 5,10 --k-percent 5,10 --unit image,pixel
  torchrun --nproc-per-node 2 -m lymphfeat_cli fit-head --agg all
Options with several values form a grid: each combination is one head; all are fitted together.
Run the same command again to resume an interrupted one: finished heads are kept.""",
)
@click.option(
    "--store",
    "stores",
    type=PATH,
    multiple=True,
    help="Feature store written by `lymphfeat extract`. Repeatable: heads of the family "
    "distribution read several stores of the same images together. [default: cache/features.h5]",
)
@grid_options()
@click.option(
    "--protocol",
    type=click.Choice([*choices(ProtocolName), "both"]),
    default="honest",
    show_default=True,
    help=f"{FitSettings.about()['protocol'].help} both: run both and measure the optimism.",
)
@splits_option
@settings_options(FitSettings(), omit=("protocol",))
@click.option(
    "--truth",
    type=EXISTING_FILE,
    help="CSV (ID, FILE, IS_WITNESS) of witness images, to measure how well each head finds them.",
)
@click.option("--save", is_flag=True, help="Save the weights of the heads (heads.safetensors).")
@click.option(
    "--out",
    type=FOLDER,
    help="Run folder. [default: runs/<aggregators>-<protocol>, numbered if it exists]",
)
@click.option(
    "--model-out",
    type=FOLDER,
    help="Also make a model for new patients, as `lymphfeat finalize` does, in this folder.",
)
@click.option(
    "--model-row",
    default="",
    help="Row of the table that --model-out is made of. [default: the head chosen inside, fused if "
    "there are fusions]",
)
@writing_options
def command(
    stores: tuple[Path, ...],
    grid: HeadGrid,
    protocol: ProtocolName | Literal["both"],
    settings: FitSettings,
    out: Path | None,
    model_out: Path | None,
    model_row: str,
    output: Output,
    **given: Any,
) -> None:
    """Fit MIL heads on cached feature maps, over all seeds and splits at once.

    Prints one row per head, best first, and writes a run folder with the table, all epochs,
    predictions and splits, and a figure. Each head is shown on stderr as soon as it is finished.
    """
    from lymphfeat.features.store import FeatureStore
    from lymphfeat.fitting import Run, fit_both, fit_heads
    from lymphfeat.heads.grid import expand

    heads = expand(grid)
    if model_out:  # refused before anything is fitted
        _check_final(model_out, protocol, output)
    named = _named_folders(f"{'+'.join(dict.fromkeys(grid.agg))}-{protocol}")
    folders = [out] if out else named
    settings = settings if protocol == "both" else replace(settings, protocol=protocol)
    inside = "honest" if protocol == "both" else ""  # the run of which a model is made
    opened = [FeatureStore.open(path) for path in stores or [cache_path("features.h5")]]
    if model_out and not output.force:
        made = _find_made(folders, inside, opened, heads, settings, given)
        if made:
            note(f"{made} holds this run already; only its model was missing.")
            _finalize(made / inside, model_out, model_row, force=False)
            output.show(lambda: _result(made, made / inside), lambda: _show_files(made))
            return
    folder = folders[-1]
    with output.progress(f"fitting {len(heads)} heads") as progress:
        found = (fit_both if protocol == "both" else fit_heads)(
            opened,
            heads,
            settings,
            folder,
            force=output.force,
            tell=lambda head: progress.say(_finished(head, named=protocol == "both")),
            progress=progress,
            **given,  # splits, truth, save
        )
    runs = [found] if isinstance(found, Run) else [found.report, found.honest]
    optimism = None if isinstance(found, Run) else found.table
    if model_out:
        _finalize(folder / inside, model_out, model_row, force=output.force)
    output.show(lambda: _result(folder, folder / inside), lambda: _show(folder, runs, optimism))


def _find_made(
    folders: "list[Path]",
    inside: str,
    stores: "list[FeatureStore]",
    heads: "list[HeadSettings]",
    settings: FitSettings,
    given: dict[str, Any],
) -> Path | None:
    """Return the folder to which an earlier call, interrupted as it made the model, wrote the run.

    None if there is none. `inside` is the run's own folder in it.
    """
    from lymphfeat.fitting import holds_run

    for folder in reversed(folders):
        recover(folder)
        if holds_run(folder / inside, stores, heads, settings, **given):
            return folder
    return None


def _finalize(run: Path, out: Path, row: str, *, force: bool) -> None:
    # Imported here because backbones take seconds to import, and heads on a store need none.
    from lymphfeat.finalization import finalize

    model = finalize(run, out, row=row, force=force)
    note(f"Model of {model.row}: {out}")


def _check_final(out: Path, protocol: str, output: Output) -> None:
    from lymphfeat.finalization import FINAL_MODEL
    from lymphfeat.runtime.processes import is_started_alone

    if protocol == "report":
        raise click.UsageError(
            "--model-out must go with --protocol honest or both: a model needs out-of-fold "
            "probabilities."
        )
    if not is_started_alone():
        raise click.UsageError(
            "--model-out must be used without torchrun; run `lymphfeat finalize` on the run "
            "afterwards."
        )
    recover(out)
    check_folder(out, FINAL_MODEL, force=output.force)


def _finished(head: "FinishedHead", *, named: bool) -> str:
    """Describe a finished head in a line; `named` adds its protocol."""
    parts = [
        f"BA {with_interval(head.ba, head.ba_low, head.ba_high)}",
        f"AUC {number(head.auc)}",
        "kept from before" if head.seconds is None else f"{head.seconds:.1f} s",
    ]
    name = f"{head.protocol}, {head.name}" if named else head.name
    return f"{name}: {', '.join(parts)}"


def _result(folder: Path, run: Path) -> dict[str, object]:
    """Return what the folder of a run holds; of both protocols, `run` is that of the honest one."""
    from lymphfeat.fitting import GROUPS_FILE, OPTIMISM_FILES

    result: dict[str, object] = {
        "folder": str(folder),
        "summary": _read_json(run / "summary.json"),
        "warnings": (run / "warnings.txt").read_text(encoding="utf-8").splitlines(),
        "files": [str(path) for path in files_in(folder)],
    }
    if (run / GROUPS_FILE).is_file():
        result["groups"] = _read_rows(run / GROUPS_FILE)
    if run != folder:
        result["report"] = _read_json(folder / "report" / "summary.json")
        result["optimism"] = _read_rows(folder / OPTIMISM_FILES[0])
    return result


def _read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_rows(path: Path) -> list[dict[str, object]]:
    """Read a table of figures; names stay texts."""
    import pandas as pd

    texts = dict.fromkeys(("head", "kind", "group"), str)
    table = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _show(folder: Path, runs: "list[Run]", optimism: "pd.DataFrame | None") -> None:
    for run in runs:
        _show_run(run.outcome, run.settings)
        if run.by_group is not None:
            _show_groups(run.by_group, run.settings.groups)
    if optimism is not None:
        _show_optimism(optimism)
    for warning in runs[-1].outcome.warnings:
        click.echo(f"Warning: {warning}")
    _show_files(folder)


def _show_files(folder: Path) -> None:
    click.echo("Wrote " + ", ".join(map(str, files_in(folder))))


def _show_groups(table: "pd.DataFrame", column: str) -> None:
    """Show the first row of the summary in every group."""
    first = table["head"].iloc[0]
    measured = ("auc", "sensitivity", "specificity")
    rows = [
        [
            *(row[name] for name in ("group", "reactive", "tumoral")),
            *(
                with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"])
                for name in measured
            ),
        ]
        for row in table[table["head"] == first].to_dict("records")
    ]
    titles = ["AUC (95 %)", "sensitivity (95 %)", "specificity (95 %)"]
    show_table(
        f"{first} in each {column}, held out whole (first repeat; all rows are in groups.csv)",
        [column, "reactive", "tumoral", *titles],
        rows,
    )


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


def _named_folders(name: str) -> list[Path]:
    """Return runs/<name>, runs/<name>-2, … up to the first that does not exist yet."""
    folders = [Path("runs") / name]
    while folders[-1].exists():
        folders.append(Path("runs") / f"{name}-{len(folders) + 1}")
    return folders


# Columns of the summary, by the titles shown.
_COLUMNS = {"sensitivity": "sensitivity", "specificity": "specificity", "AUC": "auc"}
_OF_PROTOCOL = {
    "report": {
        "± uncorrected": "ba_half_width_uncorrected",
        "± as published": "ba_half_width_published",
        "BA last epoch": "ba_last",
        "BA oracle (optimistic)": "ba_oracle",
    },
    "honest": {
        "log loss": "log_loss",
        "log loss calibrated": "log_loss_calibrated",
        "ECE": "ece",
        "ECE calibrated": "ece_calibrated",
    },
}
_AT_TIMES = {"p shift by bfloat16": "bfloat16_change", "cell AUC": "witness_auc"}


def _show_run(outcome: "Outcome", settings: FitSettings) -> None:
    columns = _COLUMNS | _OF_PROTOCOL[settings.protocol] | _AT_TIMES
    shown = {title: name for title, name in columns.items() if name in outcome.summary}
    rows = [
        [
            f"baseline: {row['head']}" if row["kind"] == "baseline" else row["head"],
            with_interval(row["ba"], row["ba_low"], row["ba_high"]),
            *(number(row[name]) for name in shown.values()),
        ]
        for row in outcome.summary.to_dict("records")
    ]
    show_table(_title(outcome, settings), ["head", "BA (95 %)", *shown], rows)


def _title(outcome: "Outcome", settings: FitSettings) -> str:
    runs = int(outcome.summary["runs"].iloc[0])
    if settings.protocol == "report":
        return (
            f"report protocol: {runs} splits, threshold 0.5, mean of the 10 best epochs per split "
            "(chosen on the evaluated patients: optimistic)"
        )
    return (
        f"honest protocol: {runs} splits per row, {settings.epoch} epoch, threshold "
        f"{outcome.thresholds}"
    )
