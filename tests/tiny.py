"""A cohort and a backbone that train in a second: reddish images make a patient tumoral."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lymphfeat.settings import BackboneSettings, EndToEndSettings, HeadSettings, PretrainSettings

SIDE = 64
BACKBONE = BackboneSettings(backbone="test_efficientnet", crop=SIDE)
PRETRAINING = PretrainSettings(
    backbone=BACKBONE.backbone,
    epochs=3,
    batch_size=4,
    view_size=32,
    field=48,
    projection=16,
    precision="float32",
    threads=1,
    device="cpu",
)


def tiny_settings(agg: str = "bnsigmoid", **changes: Any) -> EndToEndSettings:
    """Return settings that learn `write_red_cohort` in a few epochs."""
    settings = EndToEndSettings(
        backbone=BACKBONE,
        head=HeadSettings(agg=agg, lr=3e-3),
        epochs=2,
        batch_size=4,
        max_forward_size=6,
        max_backward_size=8,
        precision="float32",
        threads=1,
        device="cpu",
    )
    return replace(settings, **changes)


def write_red_cohort(
    root: Path,
    labels: str = "0101010101??",
    truth: bool = False,
    side: int = SIDE,
    *,
    seed: int = 0,
    prefix: str = "P",
) -> Path:
    """Write patients P0, P1, … with the labels given (? unknown), one to four images each.

    The first image of a tumoral patient is reddish; so is that of an unlabelled one of odd number.
    """
    rng = np.random.default_rng(seed)
    table, witnesses = ["id,label"], ["ID,FILE,LABEL,IS_WITNESS"]
    for number, label in enumerate(labels):
        table.append(f"{prefix}{number},{label.replace('?', '')}")
        for index in range(1 + number % 4):
            red = index == 0 and (label == "1" or (label == "?" and number % 2 == 1))
            pixels = rng.integers(0, 120, (side, side, 3)) + np.array([100 * red, 0, 0])
            path = root / f"{prefix}{number}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            witnesses.append(f"{prefix}{number},{path.name},{number % 2},{int(red)}")
    (root / "cohort.csv").write_text("".join(f"{line}\n" for line in table), encoding="utf-8")
    if truth:
        (root / "truth.csv").write_text(
            "".join(f"{line}\n" for line in witnesses), encoding="utf-8"
        )
    return root


def write_cohort_with_a_copy(root: Path) -> Path:
    """Write a cohort in which P1 has P8's only image among its own, under another name."""
    write_red_cohort(root)
    shutil.copy(root / "P8" / "0.png", root / "P1" / "1.png")
    return root
