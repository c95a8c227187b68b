"""`lymphfeat compare`: rows of several runs, compared and paired by split."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lymphfeat_cli.options import (
    FILE,
    FOLDER,
    Output,
    interval,
    number,
    show_table,
    writing_options,
)

if TYPE_CHECKING:
    from lymphfeat.evaluation.comparison import Comparison


@click.command(
    "compare",
    epilog="""\b
Examples:
  lymphfeat compare runs/topk-honest runs/bnsigmoid-honest
  lymphfeat compare runs/all-honest --head bnsigmoid --head mean --metric auc
  lymphfeat compare runs/all-honest --against "bag size" --out against-bag-size.png""",
)
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--metric",
    type=click.Choice(["ba", "sensitivity", "specificity", "auc", "log_loss", "brier"]),
    default="ba",
    show_default=True,
    help="Metric to compare.",
)
@click.option("--head", "heads", multiple=True, help="Row to compare. Repeatable. [default: all]")
@click.option(
    "--against",
    help="Reference row that the others are compared with. [default: first row of the first run]",
)
@click.option(
    "--all-pairs", is_flag=True, help="Compare all pairs, not only those with the reference row."
)
@click.option(
    "--out",
    type=FILE,
    default="comparison.png",
    show_default=True,
    help="Figure to write.",
)
@writing_options
def command(runs: tuple[Path, ...], out: Path, output: Output, **chosen: Any) -> None:
    """Compare the rows of runs of `lymphfeat fit-head`, split by split.

    Prints the metric of each row, and each difference with its interval and p-value. Intervals are
    Nadeau–Bengio corrected for overlapping training sets; intervals of differences hold for all
    comparisons simultaneously, and p-values are Holm-adjusted. The runs must use the same splits:
    if they do not, refit one with the --splits of the other.
    """
    output.claim(out)
    from lymphfeat.comparison import compare
    from lymphfeat.plots.comparison import draw_comparison

    found = compare(runs, **chosen)
    draw_comparison(found, out)
    output.show(lambda: _result(found, out), lambda: _show(found, out))


def _result(found: "Comparison", out: Path) -> dict[str, object]:
    return {
        "metric": found.metric,
        "protocol": found.protocol,
        "splits": len(found.values),
        "rows": found.rows.to_dict("records"),
        "pairs": found.pairs.to_dict("records"),
        "figure": str(out),
    }


def _show(found: "Comparison", out: Path) -> None:
    _show_rows(found)
    _show_pairs(found)
    for sentence in found.sentences:
        click.echo(sentence)
    if found.protocol == "report":
        click.echo(
            "Rows of the report protocol are means of the ten best epochs: optimistic, but equally "
            "so for all heads. Baselines have a single epoch, so they are compared with the last "
            "epoch of the heads."
        )
    click.echo(f"Wrote {out}")


def _show_rows(found: "Comparison") -> None:
    rows = [
        [row["name"], number(row["mean"]), interval(row["low"], row["high"])]
        for row in found.rows.to_dict("records")
    ]
    title = f"{found.protocol} protocol, {len(found.values)} splits"
    show_table(title, ["row", found.metric, "95 % interval"], rows)


def _show_pairs(found: "Comparison") -> None:
    rows = [
        [
            pair["name"],
            pair["reference"],
            number(pair["difference"], "+.3f"),
            interval(pair["low"], pair["high"], "+.3f"),
            number(pair["p"], ".2g"),
            number(pair["p_adjusted"], ".2g"),
        ]
        for pair in found.pairs.to_dict("records")
    ]
    comparisons = f"{len(rows)} comparison{'s' if len(rows) > 1 else ''}"
    title = f"Differences, paired by split, corrected for {comparisons}"
    show_table(title, ["row", "minus", "difference", "95 % interval", "p", "p adjusted"], rows)
