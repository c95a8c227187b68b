"""`lymphfeat pretrain`: unlabelled cells -> backbone weights."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.errors import SettingsError
from lymphfeat.settings import PretrainSettings
from lymphfeat_cli.options import FILE, PATH, Output, note, writing_options
from lymphfeat_cli.settings_options import settings_options

if TYPE_CHECKING:
    from lymphfeat.cohort.image_folders import Cells
    from lymphfeat.pretraining.run import Pretrained


@click.command(
    "pretrain",
    epilog="""\b
Examples:
  lymphfeat pretrain my-cohort --out mine.safetensors
  lymphfeat pretrain my-cohort --minutes 120 --out mine.safetensors
  lymphfeat pretrain my-cohort --patient-pairs 0.5 --epochs 40 --out mine.safetensors
  lymphfeat pretrain folder-of-class-folders --init none --out cells.safetensors
  lymphfeat pretrain my-cohort --teachers tf_efficientnet_lite0 --out distilled.safetensors
  lymphfeat extract --cohort my-cohort --weights mine.safetensors""",
)
@click.argument("folder", type=PATH)
@click.option("--out", type=FILE, required=True, help="Weights file to write (.safetensors).")
@click.option(
    "--groups",
    type=click.Choice(["auto", "patients", "classes", "none"]),
    default="auto",
    show_default=True,
    help="What each image folder is; auto: a patient if there is a table, otherwise a class. "
    "The table is not read.",
)
@settings_options(PretrainSettings())
@writing_options
def command(
    folder: Path, out: Path, groups: str, settings: PretrainSettings, output: Output
) -> None:
    """Train a backbone on the cell images in FOLDER, without patient labels.

    FOLDER is a cohort (its labels are not read) or any folder of cell images; if its folders are
    classes, a supervised loss is added. Writes the weights and a training curve (.csv, .png). Run
    the same command again to resume an interrupted training. Requires the extra
    lymphfeat[pretrain].
    """
    try:
        from lymphfeat.pretraining.run import pretrain
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "lightly":
            raise
        raise SettingsError(
            "pretrain needs lightly; install it with: pip install 'lymphfeat[pretrain]'"
        ) from None
    from lymphfeat.cohort.image_folders import Cells

    cells = Cells.find(folder, groups)
    note(f"{folder}: {len(cells.paths)} images in {len(cells.names)} folder(s): {cells.grouping}")
    with output.progress("pre-training") as progress:
        trained = pretrain(cells, out, settings, force=output.force, progress=progress)
    output.show(lambda: _result(trained), lambda: _show(trained, cells, settings.backbone))


def _result(trained: "Pretrained") -> dict[str, object]:
    return {
        "weights": str(trained.weights),
        "sha256": trained.sha256,
        "curve": trained.curve,
        "files": [str(path) for path in trained.files],
    }


def _show(trained: "Pretrained", cells: "Cells", backbone: str) -> None:
    click.echo(f"{trained.weights}: {backbone}, sha256 {trained.sha256[:12]}…")
    if cells.grouping != "none":
        what = {"patients": "patient", "classes": "class"}[cells.grouping]
        before, *_, after = (row["probe"] for row in trained.curve)
        click.echo(
            f"Nearest cell from the same {what}: {before:.3f} before, {after:.3f} after training"
        )
    for path in trained.files:
        click.echo(f"wrote {path}")
