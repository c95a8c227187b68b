"""What is measured on: rendered photographs, cohorts dealt out of them, stores of random values.

Nothing here says anything about accuracy.
"""

import os
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import lymphfeat as lf
from benchmarks.bench.measure import Bench
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.evaluation.providers import SharedFeatures
from lymphfeat.features.store import FeatureSet, FeatureStore, MapShape
from lymphfeat.features.store_writer import StoreWriter
from lymphfeat.heads.engine.instances import Features
from lymphfeat.settings import SyntheticSettings
from lymphfeat.synthetic.cohort import write_synthetic_cohort

# The challenge: all patients and images, and the labelled ones among them.
PATIENTS, IMAGES, LABELLED, LABELLED_IMAGES = 205, 16_711, 163, 13_453
MAPS = MapShape(views=1, channels=512, height=4, width=4)  # of ResNet-18 at a crop of 112 px


def photographs(bench: Bench) -> Path:
    """Render a cohort of JPEGs of 224 px, once: 80 patients, about 2,000 images."""
    settings = SyntheticSettings(
        patients=bench.size(80, 6), test_patients=0, images=bench.size(25, 4)
    )
    return write_synthetic_cohort(settings, bench.folder / "photographs")


def dealt_out(bench: Bench, sizes: NDArray[np.int64]) -> Path:
    """Make a cohort of patients with this many images each, links to the photographs."""
    known = lf.Cohort.load(photographs(bench))
    paths = cycle([path for own in known.images for path in own])
    root = bench.new("cohort")
    for patient, size in enumerate(sizes.tolist()):
        folder = root / f"P{patient}"
        folder.mkdir(parents=True)
        for number, path in enumerate(islice(paths, size)):
            os.link(path, folder / f"{number:06d}.jpg")
    rows = [f"P{patient},{patient % 2}" for patient in range(len(sizes))]
    (root / "patients.csv").write_text("\n".join(["id,label", *rows, ""]), encoding="utf-8")
    return root


def bag_sizes(patients: int, images: int) -> NDArray[np.int64]:
    """Draw how many images each patient has, spread as in the challenge (16 to 198)."""
    rng = np.random.default_rng(0)
    sizes = np.clip(np.exp(rng.normal(4.2, 0.6, patients)), 16, 198)
    rounded: NDArray[np.int64] = np.round(sizes * images / sizes.sum()).clip(1).astype(np.int64)
    rounded[rounded.argmax()] += images - rounded.sum()
    return rounded


def challenge_sizes(bench: Bench) -> NDArray[np.int64]:
    """Return the sizes of the challenge's bags, those of labelled patients first."""
    if bench.quick:
        return bag_sizes(24, 400)
    others = bag_sizes(PATIENTS - LABELLED, IMAGES - LABELLED_IMAGES)
    return np.concatenate([bag_sizes(LABELLED, LABELLED_IMAGES), others])


def challenge_store(bench: Bench) -> Path:
    """Write a store of the challenge's size, 0.31 GB, once; 42 patients have no label."""
    path = bench.folder / "challenge.h5"
    if not path.exists():
        labelled = bench.size(LABELLED, 20)
        write_random_store(path, challenge_sizes(bench), MAPS, labelled=labelled)
    return path


def challenge_features(bench: Bench) -> SharedFeatures:
    """Read the maps of its labelled patients, the first ones, in float32."""
    store = FeatureStore.open(challenge_store(bench))
    patients = int((store.labels >= 0).sum())
    images = int(store.offsets[patients])
    features = Features(
        store.features()[:images],
        store.pooled()[:images],
        store.offsets[: patients + 1],
        store.ids[:patients],
        store.labels[:patients],
    )
    return SharedFeatures.of(features)


def write_random_store(
    path: Path, sizes: NDArray[np.int64], shape: MapShape, *, labelled: int | None = None
) -> None:
    """Write a store of random maps; the labels of the first patients are random, too."""
    rng = np.random.default_rng(0)
    labels = (rng.random(len(sizes)) < 0.69).astype(np.int64)
    labels[:2] = 0, 1
    labels[len(sizes) if labelled is None else labelled :] = -1
    ids = [f"P{patient}" for patient in range(len(sizes))]
    table = pd.DataFrame(
        {"label": labels, "split": "train"}, index=pd.Index(ids, name="id", dtype="str")
    )
    images = tuple(
        tuple(Path(id) / f"{number:06d}.jpg" for number in range(size))
        for id, size in zip(ids, sizes.tolist(), strict=True)
    )
    cohort = Cohort(root=Path(), table=table, images=images, submission_ids=())
    frozen = FeatureSet(name="frozen", backbone="random", weights_sha256="0" * 64)
    recipe = {"backbone": "random"}
    total = int(sizes.sum())
    with StoreWriter(
        path, recipe=recipe, cohort=cohort, shape=shape, feature_sets=[frozen]
    ) as writer:
        for start in range(0, total, 512):
            rows = np.arange(start, min(start + 512, total), dtype=np.uint32)
            maps = rng.standard_normal(shape.rows(len(rows)), dtype=np.float32).clip(min=0)
            writer.write(start, {"frozen": maps}, rows)  # the rows are checksums: no two alike
        writer.finish()
