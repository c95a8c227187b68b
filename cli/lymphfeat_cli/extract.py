"""`lymphfeat extract`: cohort -> feature store."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lymphfeat.settings import EndToEndSettings, ExtractSettings
from lymphfeat_cli.options import (
    FILE,
    CohortChoice,
    Output,
    cache_path,
    images_options,
    note,
    writing_options,
)
from lymphfeat_cli.settings_options import settings_options

if TYPE_CHECKING:
    from lymphfeat.cohort.cohort import Cohort
    from lymphfeat.cohort.splits import Split
    from lymphfeat.features.store import FeatureStore


@click.command(
    "extract",
    epilog="""\b
Examples:
  lymphfeat extract
  lymphfeat extract --cohort DIR --weights resnet18.safetensors --views 4
  lymphfeat extract --cohort DIR --backbone efficientnet_b0 --weights imagenet
  lymphfeat extract --cohort DIR --finetune-epochs 20 --splits kfold:5 --out cache/tuned.h5
  torchrun --nproc-per-node 8 -m lymphfeat_cli extract --cohort DIR""",
)
@images_options
@click.option("--out", type=FILE, help="The store to write. [default: cache/features.h5]")
@settings_options(ExtractSettings())
@click.option(
    "--finetune-epochs",
    type=click.IntRange(1),
    help="Fine-tune one backbone per split (see --splits) on its training patients for this many "
    "epochs; fit-head then uses each split's own features. [default: no fine-tuning]",
)
@click.option(
    "--splits",
    help="Splits to fine-tune for: kfold:5, kfold:5x10 (ten repeats), kfold:5+inner (10 more "
    "backbones, needed for out-of-fold thresholds), report:10, all, a splits.json or a CSV of "
    "folds. [default with --finetune-epochs: kfold:5]",
)
@settings_options(
    EndToEndSettings(),
    "finetune",
    only=("agg", "lr", "images_per_patient", "gradient"),
    prefix="finetune-",
)
@writing_options
def command(
    cohort: CohortChoice,
    out: Path | None,
    settings: ExtractSettings,
    finetune_epochs: int | None,
    splits: str | None,
    finetune: EndToEndSettings,
    output: Output,
) -> None:
    """Write one spatial feature map per image to an HDF5 feature store.

    Run the same command again to resume an interrupted extraction. A finished store with the same
    recipe is reused; another batch size, device or torch version changes only rounding
    and is reported.

    With --finetune-epochs, one backbone per split is trained first; the weights are kept in the
    folder OUT.backbones.
    """
    from lymphfeat.extraction import extract

    if finetune_epochs:
        settings = replace(settings, finetune=replace(finetune, epochs=finetune_epochs))
        splits = splits or "kfold:5"
    patients = cohort.usable(cohort.load(output), settings.backbone.crop, output)
    with output.progress("extracting") as progress:
        store = extract(
            patients,
            out or cache_path("features.h5"),
            settings,
            splits=_splits(splits, patients, settings),
            force=output.force,
            progress=progress,
        )
    _show_notes(store)
    output.show(store.describe, lambda: _show(store))


def _splits(text: str | None, cohort: "Cohort", settings: ExtractSettings) -> "tuple[Split, ...]":
    from lymphfeat.cohort.splits import find_splits

    if text is None:
        return ()
    return tuple(find_splits(text, cohort.ids, cohort.labels, seed=settings.backbone.weights_seed))


def _show_notes(store: "FeatureStore") -> None:
    for line in store.notes:
        note(line)
    seen = store.images_seen(next(iter(store.feature_sets)))
    if seen:
        note(
            f"The weights were pre-trained on images of {len(seen)} of the {len(store.ids)} "
            "patients, without labels: no label leak, but mention it when you report results."
        )


def _show(store: "FeatureStore") -> None:
    shape = store.shape
    click.echo(
        f"{store.path}: {len(store.image_names)} images of {len(store.ids)} patients, "
        f"{shape.views} view(s) of {shape.channels}×{shape.height}×{shape.width} "
        f"({store.recipe['backbone']}, weights {store.recipe['weights']}, "
        f"{store.recipe['precision']})"
    )
    if left_out := store.recipe.get("left_out"):
        click.echo(
            f"Left out because they cannot be used: {sum(map(len, left_out.values()))} images of "
            f"{len(left_out)} patients (`lymphfeat info` lists them)."
        )
    if store.splits:
        click.echo(
            f"One backbone was fine-tuned per split, for {len(store.splits)} splits: "
            f"{', '.join(split.id for split in store.splits)}."
        )
