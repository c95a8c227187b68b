"""`lymphfeat export`: feature store -> bags of features in the format of another tool."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.settings import ExportFormat, choices
from lymphfeat_cli.options import FOLDER, PATH, Output, writing_options

if TYPE_CHECKING:
    from lymphfeat.exporting import Export


@click.command(
    "export",
    epilog="""\b
Examples:
  lymphfeat export cache/features.h5 --format clam --out clam
  lymphfeat export cache/features.h5 --format anndata --out anndata
`lymphfeat import` reads these folders without losing whose labels were seen.""",
)
@click.argument("store", type=PATH)
@click.option(
    "--format",
    required=True,
    type=click.Choice(choices(ExportFormat)),
    help="clam: h5_files, pt_files, also for TRIDENT. torchmil: features, labels. anndata: "
    "features.h5ad, an observation per image. npz: a file per patient.",
)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option(
    "--features",
    default="",
    help="Set of features, where a store has several: the id of a split. [default: frozen]",
)
@writing_options
def command(store: Path, format: ExportFormat, out: Path, features: str, output: Output) -> None:
    """Write a store's features, one vector per image, for another tool.

    The folder also has labels, splits and attributes (patients.csv), and says where the features
    come from.
    """
    from lymphfeat.exporting import export_bags

    found = export_bags(store, out, format, features=features, force=output.force)
    output.show(lambda: _result(found), lambda: _show(found))


def _result(found: "Export") -> dict[str, object]:
    return {
        "folder": str(found.folder),
        "format": found.format,
        "features": found.features,
        "patients": found.patients,
        "images": found.images,
        "channels": found.channels,
        "files": [str(path) for path in found.files],
    }


def _show(found: "Export") -> None:
    click.echo(
        f"{found.folder}: {found.images} vectors of {found.channels} numbers, of "
        f"{found.patients} patients, for {found.format}; {len(found.files)} files"
    )
