"""Heads that read several stores of the same images."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError, StoreError
from lymphfeat.features.store import FeatureStore, MapShape
from lymphfeat.fitting import Run, fit_heads
from lymphfeat.settings import FitSettings, HeadSettings
from lymphfeat_cli.main import cli
from tests.stores import made_up_cohort, open_writer

SETTINGS = FitSettings(seeds=1, folds=3, epochs=1, device="cpu", threads=1)
COUNTS = [3 + number % 4 for number in range(48)]


def write(
    path: Path, channels: int, seed: int, cohort: Cohort | None = None, lean: float = 0.3
) -> FeatureStore:
    """Write a store of one backbone, whose features lean towards the label."""
    cohort = cohort or made_up_cohort(COUNTS)
    rng = np.random.default_rng(seed)
    n = int(cohort.offsets[-1])
    labels = np.repeat(cohort.labels, cohort.n_images)[:, None, None, None, None]
    maps: NDArray[np.float32] = rng.normal(size=(n, 1, channels, 2, 1)).astype(np.float32)
    maps = maps * (1 + 0.5 * labels) + lean * labels
    shape = MapShape(views=1, channels=channels, height=2, width=1)
    with open_writer(path, cohort, shape=shape) as writer:
        writer.write(0, {"frozen": maps}, np.arange(n, dtype=np.uint32))
        writer.finish()
    return FeatureStore.open(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    return [write(folder / "a.h5", 3, 0), write(folder / "b.h5", 5, 1)]


def probabilities(run: Run, head: str) -> NDArray[np.float64]:
    table = run.outcome.predictions
    return table.loc[table["head"] == head, "probability"].to_numpy(float)


def test_a_statistic_reads_every_store_or_the_one_it_names(stores: list[FeatureStore]) -> None:
    both = fit_heads(stores, agg=["mean+std", "mean@1+std@1", "std@2"], settings=SETTINGS)
    first = fit_heads(stores[0], agg="mean+std", settings=SETTINGS)
    second = fit_heads(stores[1:], agg="std", settings=SETTINGS)
    np.testing.assert_array_equal(
        probabilities(both, "mean@1+std@1"), probabilities(first, "mean+std")
    )
    np.testing.assert_array_equal(probabilities(both, "std@2"), probabilities(second, "std"))
    assert not np.allclose(probabilities(both, "mean+std"), probabilities(first, "mean+std"))


def test_the_order_of_stores_does_not_matter(stores: list[FeatureStore]) -> None:
    one = fit_heads(stores, agg="std", settings=SETTINGS)
    other = fit_heads(stores[::-1], agg="std", settings=SETTINGS)
    np.testing.assert_allclose(probabilities(one, "std"), probabilities(other, "std"), rtol=1e-5)


def test_a_store_twice_is_the_store_once(stores: list[FeatureStore]) -> None:
    once = fit_heads(stores[:1], agg="std", settings=SETTINGS)
    twice = fit_heads([stores[0], stores[0]], agg="std", settings=SETTINGS)
    np.testing.assert_allclose(probabilities(once, "std"), probabilities(twice, "std"), rtol=1e-5)


def test_a_penalty_at_an_end_of_its_path_is_a_warning(tmp_path: Path) -> None:
    apart = write(tmp_path / "apart.h5", 3, 0, lean=9.0)
    alike = write(tmp_path / "alike.h5", 3, 2, lean=0.0)
    for store, end in ((apart, "1e-05, the smallest"), (alike, "10, the largest")):
        run = fit_heads(store, agg="mean", settings=SETTINGS)
        (line,) = (each for each in run.outcome.warnings if "penalty" in each)
        assert re.match(rf"mean exact in \d of 3 splits: chose the penalty {end}: ", line)


@pytest.mark.parametrize("agg", ["topk", "bnsigmoid", "attention"])
def test_other_families_read_one_store(stores: list[FeatureStore], agg: str) -> None:
    with pytest.raises(SettingsError, match=rf"agg \(={agg}\) must be one of std, "):
        fit_heads(stores, agg=agg, settings=SETTINGS)


@pytest.mark.parametrize("number", ["0", "3", "b", ""])
def test_a_store_that_does_not_exist(stores: list[FeatureStore], number: str) -> None:
    with pytest.raises(SettingsError, match=r"must name one of the 2 stores after @"):
        fit_heads(stores, [HeadSettings(agg=f"std@{number}")], settings=SETTINGS)


def test_stores_must_be_of_the_same_images(stores: list[FeatureStore], tmp_path: Path) -> None:
    fewer = write(tmp_path / "fewer.h5", 3, 2, made_up_cohort(COUNTS[:-1]))
    with pytest.raises(StoreError, match=r"fewer.h5: must have the patients of .*got none instead"):
        fit_heads([stores[0], fewer], agg="std", settings=SETTINGS)
    other = write(tmp_path / "other.h5", 3, 2, made_up_cohort([COUNTS[0] + 1, *COUNTS[1:]]))
    with pytest.raises(
        StoreError, match=r"other.h5: must have the images of .*of P0 is not in both"
    ):
        fit_heads([stores[0], other], agg="std", settings=SETTINGS)
    changed = replace(stores[1], crc32=stores[1].crc32 + 1)
    with pytest.raises(StoreError, match=r"image 000.png of P0 is not in both, or differs"):
        fit_heads([stores[0], changed], agg="std", settings=SETTINGS)


def test_the_command_takes_several_stores(stores: list[FeatureStore], tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(
        cli,
        [
            *("fit-head", "--store", str(stores[0].path), "--store", str(stores[1].path)),
            *("--agg", "std", "--agg", "mean@2", "--seeds", "1", "--folds", "3", "-q"),
            *("--device", "cpu", "--out", str(out)),
        ],
    )
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert config["store"]["path"] == str(stores[0].path)
    assert [other["path"] for other in config["other_stores"]] == [str(stores[1].path)]
    assert "average of 2 heads" in (out / "summary.json").read_text()
