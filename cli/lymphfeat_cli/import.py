"""`lymphfeat import`: bags of features of another tool -> feature store."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat_cli.options import (
    FILE,
    PATH,
    Output,
    cache_path,
    note,
    reference_date_option,
    writing_options,
)

if TYPE_CHECKING:
    from lymphfeat.features.store import FeatureStore


@click.command(
    "import",
    epilog="""\b
Examples:
  lymphfeat import BAGS --table labels.csv
  lymphfeat import features_uni --table labels.csv --backbone uni --out cache/uni.h5
  lymphfeat import SCEMILA --tumoral AML-PML-RARA --tumoral AML-NPM1
BAGS holds a file per patient, <id>.h5 (CLAM, TRIDENT, STAMP), .pt, .npy or .npz; the folders
of torchmil (features, labels) or SCEMILA (data/<label>/<id>/*.npy); or one .h5ad.""",
)
@click.argument("source", type=PATH)
@click.option(
    "--table",
    type=PATH,
    help="CSV with the columns id and label, and any attributes. [default: the one in the folder; "
    "else the labels of the layout]",
)
@click.option("--out", type=FILE, help="The store to write. [default: cache/features.h5]")
@click.option(
    "--backbone",
    default="imported",
    show_default=True,
    help="Name of what made the features. A model predicts stores of the same backbone only.",
)
@click.option(
    "--tumoral",
    multiple=True,
    help="Label of SCEMILA that counts as tumoral; all others count as reactive. Repeatable.",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Skip patients without features and bags without a table row (each is reported).",
)
@reference_date_option
@writing_options
def command(
    source: Path,
    table: Path | None,
    out: Path | None,
    backbone: str,
    tumoral: tuple[str, ...],
    allow_missing: bool,
    reference_date: datetime,
    output: Output,
) -> None:
    """Write bags of features that another tool has made to a feature store.

    Heads, protocols and models then work without images. Run the same command again to resume an
    interrupted import; a finished store of the same bags is reused.
    """
    from lymphfeat.importing import import_bags

    with output.progress("importing") as progress:
        store = import_bags(
            source,
            out or cache_path("features.h5"),
            table=table,
            backbone=backbone,
            tumoral=tumoral,
            allow_missing=allow_missing,
            reference_date=reference_date.date(),
            force=output.force,
            progress=progress,
        )
    for line in store.notes:
        note(line)
    output.show(store.describe, lambda: _show(store))


def _show(store: "FeatureStore") -> None:
    shape = store.shape
    click.echo(
        f"{store.path}: {len(store.image_names)} instances of {len(store.ids)} patients "
        f"({int((store.labels >= 0).sum())} labelled), {shape.channels}×{shape.height}×"
        f"{shape.width} ({store.recipe['backbone']}, {store.recipe['imported']['layout']})"
    )
