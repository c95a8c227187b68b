"""`lymphfeat extract`: cohort -> feature store."""

from datetime import datetime
from pathlib import Path

import click

from lymphfeat_cli.options import (
    cache_path,
    cohort_options,
    device_option,
    force_option,
    is_first,
    load_cohort,
    note,
    output_options,
    precision_option,
    progress_bar,
    show_json,
    threads_option,
    weights_option,
)


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
@cohort_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The store to write. [default: cache/features.h5]",
)
@click.option(
    "--backbone",
    default="resnet18",
    show_default=True,
    help="Any timm model that returns feature maps.",
)
@weights_option
@click.option(
    "--crop", type=int, default=112, show_default=True, help="Side of the centre crop in pixels."
)
@click.option(
    "--normalization",
    type=click.Choice(["imagenet", "challenge"]),
    default="imagenet",
    show_default=True,
    help="Channel means and scales; use those the weights were trained with.",
)
@click.option(
    "--output-stride",
    type=click.Choice(["8", "16", "32"]),
    help="Stride of the feature maps, by dilation. [default: the backbone's own]",
)
@click.option(
    "--views",
    type=click.IntRange(1, 4),
    default=1,
    show_default=True,
    help="Views stored per image, in this order: identity, hflip, vflip, both.",
)
@precision_option(default="auto")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Images per batch.",
)
@click.option(
    "--finetune-epochs",
    type=click.IntRange(1),
    help="Fine-tune one backbone per split (see --splits) on its training patients for this many "
    "epochs; fit-head then uses each split's own features. [default: no fine-tuning]",
)
@click.option(
    "--splits",
    help="Splits to fine-tune for: kfold:5, kfold:5x10 (ten repeats), kfold:5+inner (10 more "
    "backbones, needed for out-of-fold thresholds), report:10, all, or a splits.json. "
    "[default with --finetune-epochs: kfold:5]",
)
@click.option(
    "--finetune-agg",
    default="bnsigmoid",
    show_default=True,
    help="Aggregator used for fine-tuning; see --agg of endtoend.",
)
@click.option(
    "--finetune-lr", type=float, default=1e-4, show_default=True, help="Learning rate (Adam)."
)
@click.option(
    "--finetune-images-per-patient",
    type=click.IntRange(1),
    help="Images drawn per patient at every step of fine-tuning. [default: all]",
)
@click.option(
    "--finetune-gradient",
    type=click.Choice(["subset", "exact"]),
    default="subset",
    show_default=True,
    help="See --gradient of endtoend.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Random seed of --weights none and --splits.",
)
@device_option
@threads_option
@force_option
@output_options
def command(
    cohort: Path | None,
    table: Path | None,
    allow_missing: bool,
    reference_date: datetime,
    out: Path | None,
    backbone: str,
    weights: str,
    crop: int,
    normalization: str,
    output_stride: str | None,
    views: int,
    precision: str,
    batch_size: int,
    finetune_epochs: int | None,
    splits: str | None,
    finetune_agg: str,
    finetune_lr: float,
    finetune_images_per_patient: int | None,
    finetune_gradient: str,
    seed: int,
    device: str,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write one spatial feature map per image to an HDF5 feature store.

    Run the same command again to resume an interrupted extraction. A finished store with the same
    recipe is reused; a different number of threads, device or torch version changes only rounding
    and is reported.

    With --finetune-epochs, one backbone per split is trained first; the weights are kept in the
    folder OUT.backbones.
    """
    from lymphfeat.cohort.splits import find_splits
    from lymphfeat.extraction import extract
    from lymphfeat.settings import BackboneSettings, EndToEndSettings, ExtractSettings, HeadSettings

    finetune = finetune_epochs and EndToEndSettings(
        epochs=finetune_epochs,
        head=HeadSettings(agg=finetune_agg, lr=finetune_lr),
        images_per_patient=finetune_images_per_patient,
        gradient=finetune_gradient,
    )
    if finetune and splits is None:
        splits = "kfold:5"
    patients = load_cohort(cohort, table, allow_missing, reference_date, quiet)
    settings = ExtractSettings(
        backbone=BackboneSettings(
            backbone=backbone,
            weights=weights,
            crop=crop,
            normalization=normalization,
            output_stride=int(output_stride) if output_stride else None,
            weights_seed=seed,
        ),
        views=views,
        precision=precision,
        batch_size=batch_size,
        finetune=finetune or None,
        device=device,
        threads=threads,
    )
    with progress_bar("extracting", quiet) as progress:
        store = extract(
            patients,
            out or cache_path("features.h5"),
            settings,
            splits=find_splits(splits, patients.ids, patients.labels, seed=seed) if splits else (),
            force=force,
            progress=progress,
        )
    for line in store.notes:
        note(line)
    seen = store.images_seen(next(iter(store.feature_sets)))
    if seen:
        note(
            f"The weights were pre-trained on images of {len(seen)} of the {len(store.ids)} "
            "patients, without labels: no label leak, but mention it when you report results."
        )
    if not is_first():
        return  # of several processes only the first shows the result
    if as_json:
        show_json(store.describe())
        return
    shape = store.shape
    click.echo(
        f"{store.path}: {len(store.image_names)} images of {len(store.ids)} patients, "
        f"{shape.views} view(s) of {shape.channels}×{shape.height}×{shape.width} ({backbone}, "
        f"weights {store.recipe['weights']}, {store.recipe['precision']})"
    )
    if store.splits:
        click.echo(
            f"One backbone was fine-tuned per split, for {len(store.splits)} splits: "
            f"{', '.join(split.id for split in store.splits)}."
        )
