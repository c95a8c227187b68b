"""`lymphfeat compare`: the rows of several runs side by side, paired by split."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.runtime.files import check_file
from lymphfeat_cli.options import (
    force_option,
    interval,
    number,
    output_options,
    show_json,
    show_table,
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
@click.argument("runs", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--metric",
    type=click.Choice(["ba", "sensitivity", "specificity", "auc", "log_loss", "brier"]),
    default="ba",
    show_default=True,
)
@click.option("--head", "heads", multiple=True, help="Rows to take. Repeatable. [default: all]")
@click.option(
    "--against", help="The row all others are set against. [default: the first run's first]"
)
@click.option("--all-pairs", is_flag=True, help="Every pair, not only those with the reference.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="comparison.png",
    show_default=True,
    help="The figure.",
)
@force_option
@output_options
def command(
    runs: tuple[Path, ...],
    metric: str,
    heads: tuple[str, ...],
    against: str | None,
    all_pairs: bool,
    out: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the rows of runs of `lymphfeat fit-head`, split by split.

    Prints each row's figure and each difference with interval and p. Intervals of rows are
    Nadeau–Bengio corrected for overlapping training sets; those of differences hold for all
    comparisons at once, and p is Holm's. Runs on different splits are refused: fit one again with
    the --splits of the other.
    """
    check_file(out, force=force)
    from lymphfeat.comparison import compare
    from lymphfeat.plots.comparison import draw_comparison

    found = compare(runs, metric=metric, heads=heads, against=against, all_pairs=all_pairs)
    draw_comparison(found, out)
    if as_json:
        show_json(
            {
                "metric": metric,
                "protocol": found.protocol,
                "splits": len(found.values),
                "rows": found.rows.to_dict("records"),
                "pairs": found.pairs.to_dict("records"),
                "figure": str(out),
            }
        )
        return
    _show(found)
    click.echo(f"Wrote {out}")


def _show(found: "Comparison") -> None:
    show_table(
        f"{found.protocol} protocol, {len(found.values)} splits",
        ["row", found.metric, "95 % interval"],
        [
            [row["name"], number(row["mean"]), interval(row["low"], row["high"])]
            for row in found.rows.to_dict("records")
        ],
    )
    show_table(
        f"Differences, paired by split, corrected for {len(found.pairs)} comparison"
        f"{'s' if len(found.pairs) > 1 else ''}",
        ["row", "minus", "difference", "95 % interval", "p", "p adjusted"],
        [
            [
                pair["name"],
                pair["reference"],
                number(pair["difference"], "+.3f"),
                interval(pair["low"], pair["high"], "+.3f"),
                number(pair["p"], ".2g"),
                number(pair["p_adjusted"], ".2g"),
            ]
            for pair in found.pairs.to_dict("records")
        ],
    )
    for sentence in found.sentences:
        click.echo(sentence)
    if found.protocol == "report":
        click.echo(
            "Rows of the report protocol are means of ten best epochs: optimistic, but alike for "
            "all heads. A baseline has one epoch, so heads are compared with it at their last one."
        )
