"""Made-up cohorts without images, and stores written from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.features.store import FeatureSet, FeatureStore, MapShape
from lymphfeat.features.store_writer import StoreWriter

SHAPE = MapShape(views=2, channels=3, height=2, width=1)
FROZEN = FeatureSet(name="frozen", backbone="tiny", weights_sha256="0" * 64)
RECIPE = {"backbone": "tiny", "crop": 8, "versions": {"torch": "2.0"}}


def made_up_cohort(counts: Sequence[int] = (2, 1, 4), **covariates: Any) -> Cohort:
    """Return patients with `counts` images each; labels 0, 1, -1 in turn; covariates as given."""
    ids = [f"P{number}" for number in range(len(counts))]
    table = pd.DataFrame(
        {"label": [number % 3 - (number % 3 == 2) * 3 for number in range(len(counts))]},
        index=pd.Index(ids, name="id", dtype="str"),
        dtype="int64",
    )
    table["split"] = ["test" if label < 0 else "train" for label in table["label"]]
    for name, values in covariates.items():
        table[name] = values
    return Cohort(
        root=Path(),
        table=table,
        images=tuple(
            tuple(Path(id) / f"{index:03d}.png" for index in range(n))
            for id, n in zip(ids, counts, strict=True)
        ),
        submission_ids=tuple(table.index[table["label"] < 0])[::-1],
    )


def made_up_maps(n: int, shape: MapShape = SHAPE, seed: int = 0) -> NDArray[np.float32]:
    """Return maps (n, V, C, h, w) over many orders of magnitude."""
    normal = np.random.default_rng(seed).normal(0, 3, shape.rows(n))
    magnitude: NDArray[np.float64] = 10 ** np.abs(normal).clip(0, 4)
    return (np.sign(normal) * magnitude).astype(np.float32)


def open_writer(path: Path, cohort: Cohort, **changes: Any) -> StoreWriter:
    """Open a writer with the made-up recipe, shape and feature set, or what `changes` says."""
    arguments = {"recipe": RECIPE, "shape": SHAPE, "feature_sets": [FROZEN], **changes}
    return StoreWriter(path, cohort=cohort, **arguments)


def write_rows(writer: StoreWriter, maps: NDArray[np.float32], start: int, stop: int) -> None:
    """Write one block of `maps`; an image's checksum is its row."""
    writer.write(start, {"frozen": maps[start:stop]}, np.arange(start, stop, dtype=np.uint32))


def write_store(path: Path, cohort: Cohort | None = None, block: int = 3) -> FeatureStore:
    """Write a whole store block by block and open it."""
    cohort = made_up_cohort() if cohort is None else cohort
    n = int(cohort.offsets[-1])
    with open_writer(path, cohort) as writer:
        for start in range(0, n, block):
            write_rows(writer, made_up_maps(n), start, min(start + block, n))
        writer.finish()
    return FeatureStore.open(path)
