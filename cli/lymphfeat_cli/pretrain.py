"""`lymphfeat pretrain`: unlabelled cells -> backbone weights."""

from pathlib import Path

import click

from lymphfeat_cli.options import (
    device_option,
    force_option,
    note,
    output_options,
    precision_option,
    progress_bar,
    seed_option,
    show_json,
    threads_option,
)


@click.command(
    "pretrain",
    epilog="""\b
Examples:
  lymphfeat pretrain my-cohort --out mine.safetensors
  lymphfeat pretrain my-cohort --minutes 20 --out mine.safetensors
  lymphfeat pretrain my-cohort --patient-pairs 0.5 --epochs 40 --out mine.safetensors
  lymphfeat pretrain folder-of-class-folders --init none --out cells.safetensors
  lymphfeat extract --cohort my-cohort --weights mine.safetensors""",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Weights file to write (.safetensors).",
)
@click.option(
    "--backbone",
    default="resnet18",
    show_default=True,
    help="Any timm model that returns feature maps.",
)
@click.option(
    "--init",
    default="auto",
    show_default=True,
    help="Initial weights: bloodcells, none (random), imagenet or a .safetensors/.pth file; "
    "auto is bloodcells for resnet18, otherwise none.",
)
@click.option(
    "--groups",
    type=click.Choice(["auto", "patients", "classes", "none"]),
    default="auto",
    show_default=True,
    help="What each image folder is; auto: a patient if there is a table, otherwise a class. "
    "The table is not read.",
)
@click.option(
    "--patient-pairs",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of pairs made of two cells of one patient; the rest are two views of one cell.",
)
@click.option(
    "--supervised",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Weight of the classification loss, if folders are classes.",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=10, show_default=True, help="Training epochs."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Train for about this many minutes instead of --epochs.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="Pairs of views per step.",
)
@click.option(
    "--view-size",
    type=click.IntRange(32),
    default=96,
    show_default=True,
    help="Side of a view in pixels.",
)
@click.option(
    "--field",
    type=click.IntRange(32),
    default=144,
    show_default=True,
    help="Side, in pixels, of the central region that views are taken from.",
)
@click.option(
    "--zoom",
    type=(float, float),
    default=(0.8, 1.15),
    show_default=True,
    metavar="LOW HIGH",
    help="Range of magnification of a view; 1 is the original scale.",
)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate.")
@precision_option(default="auto")
@seed_option
@device_option
@threads_option
@force_option
@output_options
def command(
    folder: Path,
    out: Path,
    backbone: str,
    init: str,
    groups: str,
    patient_pairs: float,
    supervised: float,
    epochs: int,
    minutes: float | None,
    batch_size: int,
    view_size: int,
    field: int,
    zoom: tuple[float, float],
    lr: float,
    precision: str,
    seed: int,
    device: str,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a backbone on the cell images in FOLDER, without patient labels.

    FOLDER is a cohort (its labels are not read) or any folder of cell images; if its folders are
    classes, a supervised loss is added. Writes the weights and a training curve (.csv, .png). Run
    the same command again to resume an interrupted training. Requires the extra
    lymphfeat[pretrain].
    """
    from lymphfeat.errors import SettingsError
    from lymphfeat.settings import PretrainSettings

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
    settings = PretrainSettings(
        backbone=backbone,
        init=init,
        epochs=epochs,
        minutes=minutes,
        batch_size=batch_size,
        view_size=view_size,
        field=field,
        zoom=zoom,
        patient_pairs=patient_pairs,
        supervised=supervised,
        lr=lr,
        seed=seed,
        precision=precision,
        device=device,
        threads=threads,
    )
    with progress_bar("pre-training", quiet) as progress:
        trained = pretrain(cells, out, settings, force=force, progress=progress)
    if as_json:
        files = [str(path) for path in trained.files]
        result = {"weights": str(out), "sha256": trained.sha256, "curve": trained.curve}
        show_json(result | {"files": files})
        return
    click.echo(f"{out}: {backbone}, sha256 {trained.sha256[:12]}…")
    if cells.grouping != "none":
        what = {"patients": "patient", "classes": "class"}[cells.grouping]
        before, *_, after = (row["probe"] for row in trained.curve)
        click.echo(
            f"Nearest cell from the same {what}: {before:.3f} before, {after:.3f} after training"
        )
    for path in trained.files:
        click.echo(f"wrote {path}")
