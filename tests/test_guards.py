"""Leak guards: in each test the leak is built in, and must be caught (METHOD §4, §6).

Others are tested with what they guard: backbones fine-tuned on the patients measured
(test_protocol), splits of images (test_splits), what is learnt from validation patients
(test_evaluation), features and scorers of the head engine (here).
"""

from pathlib import Path

import numpy as np
import pytest

from lymphfeat.cohort.attributes import attribute_matrix, choose_attributes
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Plan, Split, kfold_splits
from lymphfeat.errors import LeakageError
from lymphfeat.evaluation.baselines import fit_baselines
from lymphfeat.evaluation.leakage import SharedImage, find_shared_images, refuse_shared_images
from lymphfeat.evaluation.scores import PlannedPatients, measure
from lymphfeat.features.store import FeatureStore
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.settings import HeadSettings
from tests.cohorts import write_bags, write_text
from tests.stores import made_up_cohort, made_up_maps, open_writer


def store_with_copies(tmp_path: Path, *, same_file: bool) -> list[tuple[tuple[str, ...], ...]]:
    """Write a store in which P0's second image is also P3's first; return what is found."""
    cohort = made_up_cohort((2, 1, 3, 2))
    maps = made_up_maps(8)
    crc32 = np.arange(8, dtype=np.uint32)
    crc32[4] = crc32[0]  # two files whose checksums collide: P0 and P2
    if same_file:
        maps[6] = maps[1] * 1.001  # the rounding of another batch
        crc32[6] = crc32[1]
    else:
        maps[6] = maps[1]  # the same pixels in another file
    with open_writer(tmp_path / "features.h5", cohort) as writer:
        writer.write(0, {"frozen": maps}, crc32)
        writer.finish()

    found = find_shared_images(FeatureStore.open(tmp_path / "features.h5"), "frozen")
    return [(shared.patients, shared.names) for shared in found]


@pytest.mark.parametrize("same_file", [True, False])
def test_the_same_image_in_two_patients_is_found(tmp_path: Path, same_file: bool) -> None:
    assert store_with_copies(tmp_path, same_file=same_file) == [
        (("P0", "P3"), ("001.png", "000.png"))
    ]


def test_a_shared_image_torn_apart_by_a_split_is_refused() -> None:

    shared = [SharedImage(patients=("P0", "P3"), names=("001.png", "000.png"))]
    together = Split(id="a", seed=0, repeat=0, train=("P0", "P3"), validation=("P1",))
    torn = Split(id="b", seed=0, repeat=0, train=("P0", "P1"), validation=("P3",))
    refuse_shared_images([together], shared)
    with pytest.raises(
        LeakageError, match=r"001.png of P0 = 000.png of P3, on both sides of split b"
    ):
        refuse_shared_images([together, torn], shared)


def test_nothing_of_a_dates_spelling_reaches_a_feature(tmp_path: Path) -> None:
    """The spelling alone gives the label; the dates, and so the ages, say nothing."""
    matrices = []
    for spelling in ("given away", "one form"):
        root = tmp_path / spelling
        rows = []
        for i in range(30):
            month, day = 1 + i % 12, 1 + i % 28
            tumoral = i % 3 > 0
            dashed = tumoral and spelling == "given away"
            year = 1950 + (7 * i) % 40
            dob = f"{day:02d}-{month:02d}-{year}" if dashed else f"{month}/{day}/{year}"
            rows.append(f"P{i},{int(tumoral)},{dob}")
        write_text(root / "patients.csv", "id,label,dob", *rows)
        write_bags(root, dict.fromkeys([f"P{i}" for i in range(30)], 1))
        cohort = Cohort.load(root)
        matrices.append(attribute_matrix(cohort.table, choose_attributes(cohort.table)))
    np.testing.assert_array_equal(matrices[0], matrices[1])
    labels = cohort.labels
    repeats = kfold_splits(cohort.ids, labels, folds=3, seeds=2)
    plan = Plan.flat([split for repeat in repeats for split in repeat.outer])
    patients = PlannedPatients(cohort.ids, labels, plan)
    clinical = fit_baselines(patients, cohort.n_images, matrices[0])[-1]
    auc = measure(patients, clinical).runs["auc"].mean()
    assert abs(auc - 0.5) < 0.2
    leaked = (labels == 1).astype(float)[:, None]  # what the spelling would have given
    given_away = fit_baselines(patients, cohort.n_images, leaked)[-1]
    assert measure(patients, given_away).runs["auc"].mean() == 1


@pytest.mark.parametrize("agg", ["mean", "topk", "bnsigmoid"])
def test_a_head_learns_nothing_of_its_validation_patients(agg: str) -> None:
    """Neither their labels nor their features (scalers!) change a scorer, to the last bit."""
    rng = np.random.default_rng(0)
    ids, labels = [f"P{i}" for i in range(12)], np.array([0, 1] * 6)
    maps = rng.normal(size=(36, 5, 1, 1)).astype(np.float16)
    offsets = np.arange(0, 37, 3)
    split = Split(id="s", seed=0, repeat=0, train=tuple(ids[:8]), validation=tuple(ids[8:]))

    def weights(maps: np.ndarray, labels: np.ndarray) -> np.ndarray:
        pooled = maps[..., 0, 0].astype(np.float32)
        features = Features(maps, pooled, offsets, ids, labels)
        head = HeadSettings(agg=agg, unit="image", k_agg=2, lr=0.1)
        fitted = fit_stacked(
            features, [Fit(head=head, split=split)], epochs=3, sampling=Sampling(batch_size=4)
        )
        return np.append(fitted.weight[0], fitted.bias[0])

    changed_maps, changed_labels = maps.copy(), labels.copy()
    changed_maps[24:] *= 100
    changed_labels[8:] = 1 - labels[8:]
    before = weights(maps, labels)
    np.testing.assert_array_equal(before, weights(changed_maps, changed_labels))
    changed_maps[:24] *= 2  # the guard sees what it should: training patients do matter
    assert not np.array_equal(before, weights(changed_maps, labels))
