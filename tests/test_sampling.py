"""What a split's heads are shown: batches, images and views, drawn by one generator."""

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.sampling import Sampler, Sampling, batched

SIZES = [3, 1, 8, 5, 2]
BOUNDS = np.cumsum([0, *SIZES])


def sampler(seed: int = 0, train: tuple[int, ...] = (0, 2, 3, 4), **sampling: Any) -> Sampler:
    maps = np.zeros((sum(SIZES), 1, 2, 1), np.float16)
    ids = [f"P{i}" for i in range(len(SIZES))]
    labels = np.zeros(len(SIZES), np.int64)
    features = Features(maps, maps.mean((2, 3), dtype=np.float32), BOUNDS, ids, labels)
    generator = torch.Generator().manual_seed(seed)
    return Sampler(np.array(train), features.of_unit("pixel"), Sampling(**sampling), generator)


def test_an_epoch_is_every_training_patient_once_but_for_an_incomplete_batch() -> None:
    batches = sampler(batch_size=2).epoch()
    assert sorted(p for batch in batches for p in batch.patients.tolist()) == [0, 2, 3, 4]
    assert all(batch.images is None and batch.views is None for batch in batches)
    for batch in batches:
        assert batch.sizes.tolist() == [SIZES[p] for p in batch.patients.tolist()]
    assert [len(batch.patients) for batch in sampler(batch_size=3).epoch()] == [3]
    assert [len(batch.patients) for batch in sampler(batch_size=9).epoch()] == [4]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_drawn_images_are_the_patients_own(most: int, views: int, seed: int) -> None:
    draws = sampler(seed, batch_size=2, images_per_patient=most, views=views)
    for batch in draws.epoch():
        assert batch.images is not None
        parts = torch.split(batch.images, batch.sizes.tolist())
        for patient, images in zip(batch.patients.tolist(), parts, strict=True):
            assert len(set(images.tolist())) == min(most, SIZES[patient])
            assert BOUNDS[patient] <= min(images)
            assert max(images) < BOUNDS[patient + 1]
        if views > 1:
            assert batch.views is not None
            assert batch.views.shape == batch.images.shape
            assert batch.views.min() >= 0
            assert batch.views.max() < views
        else:
            assert batch.views is None


def test_images_and_views_are_drawn_anew_at_every_step() -> None:
    draws = sampler(train=(2,), batch_size=1, images_per_patient=4, views=4)
    seen = [draws.epoch()[0] for _ in range(60)]
    images = {i for batch in seen if batch.images is not None for i in batch.images.tolist()}
    views = {i for batch in seen if batch.views is not None for i in batch.views.tolist()}
    assert images == set(range(BOUNDS[2], BOUNDS[3]))
    assert views == {0, 1, 2, 3}


@given(st.integers(1, 20), st.integers(1, 6))
def test_batches_keep_the_order_and_pad_a_lone_one(n: int, size: int) -> None:
    rows = batched(torch.arange(n)[:, None], size, -1)[..., 0]
    flat = rows.flatten().tolist()
    assert rows.shape == (max(1, n // size), size)
    assert flat == (list(range(n)) + [-1] * size)[: len(flat)]
