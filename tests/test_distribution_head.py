"""Heads of a model: what they keep and read out, and those of the family `distribution` as modules.

A head of this family is solved exactly on random instances, then becomes a module.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.engine.exact import solve_head
from lymphfeat.heads.exact_head import ExactHead
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.registry import AGGREGATORS, LinearAggregator
from lymphfeat.heads.stack import HeadStack
from lymphfeat.model.model import Model
from lymphfeat.model.predictions import Predictions
from lymphfeat.settings import HeadSettings, PredictSettings, Unit
from tests.test_model import make_model, pixels_of
from tests.tiny import write_red_cohort

SIZES = [1, 2, 15, 16, 17, 30] * 2
AGGS = (
    *("mean", "std", "logstd", "gini", "quantiles", "kernel-mean", "prototypes", "mean+std"),
    "gini+prototypes",
)
LINEAR = [name for name, row in AGGREGATORS.items() if isinstance(row, LinearAggregator)]


def solve(agg: str, channels: int, unit: Unit = "image") -> ExactHead:
    """Solve a head on random instances of patients whose cells differ by their label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(SIZES)) % 2
    settings = resolve(HeadSettings(agg=agg, solver="exact", unit=unit, prototypes=3, penalty=0.01))
    shape = (sum(SIZES), 4 if settings.unit == "pixel" else 1, channels)
    spread = (1 + labels).repeat_interleave(torch.tensor(SIZES))[:, None, None]
    instances = 1 + spread * torch.randn(shape, generator=generator)
    return solve_head(settings, instances, np.array(SIZES), labels)


def draw(channels: int, per_image: int = 1) -> tuple[Tensor, Bags]:
    """Draw instances (N, U, C) of new patients."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SIZES), per_image, channels, generator=generator), Bags.of(SIZES)


@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("agg", AGGS)
def test_a_module_is_the_head_it_was_made_of(agg: str, unit: Unit) -> None:
    solved = solve(agg, 4, unit)
    head = DistributionHead(solved)
    instances, images = draw(4, 1 if solved.settings.unit == "image" else 4)
    kept = head.keep(instances)
    read = head.read_out(kept, images)
    flat, bags = instances.flatten(0, 1), images.times(instances.shape[1])
    expected = solved.patient_logits([(flat, bags)]).float()
    assert expected.std() > 0.01
    torch.testing.assert_close(read.total, expected)
    torch.testing.assert_close(read.probability, expected.sigmoid())
    assert torch.equal(head.patient_probability(kept, images), read.probability)
    shares = solved.shares([(flat, bags)]).float().view(kept.shape[:2]).sum(1)
    torch.testing.assert_close(read.contribution, shares)
    torch.testing.assert_close(images.mean(read.score[:, None])[:, 0], expected)
    for score, share in torch.split(torch.stack([read.score, shares]), SIZES, dim=1):
        torch.testing.assert_close(score - score[0], len(share) * (share - share[0]))
    assert (read.weight >= 0).all()
    torch.testing.assert_close(images.sum(read.weight[:, None])[:, 0], torch.ones(len(SIZES)))
    for patient in torch.split(torch.stack([read.weight, shares.abs()]), SIZES, dim=1):
        torch.testing.assert_close(patient[0] * patient[1].sum(), patient[1])


def test_weights_are_equal_where_nothing_contributes() -> None:
    head = DistributionHead.empty(resolve(HeadSettings(agg="mean+std")), 4)
    read = head.read_out(*draw(4))
    torch.testing.assert_close(
        read.weight, 1 / torch.tensor(SIZES).repeat_interleave(torch.tensor(SIZES))
    )


@pytest.mark.parametrize("agg", AGGS)
def test_an_empty_head_has_room_for_what_was_learnt(agg: str) -> None:
    solved = DistributionHead(solve(agg, 4))
    empty = DistributionHead.empty(solved.settings[0], 4)
    assert {key: (value.shape, value.dtype) for key, value in solved.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in empty.state_dict().items()
    }
    empty.load_state_dict(solved.state_dict())
    kept, images = draw(4)
    assert torch.equal(empty.read_out(kept, images).total, solved.read_out(kept, images).total)
    assert empty.exact.penalty == solved.exact.penalty > 0


def test_all_but_weights_and_intercept_stay() -> None:
    names = [name for name, _ in DistributionHead(solve("logstd+prototypes", 4)).named_parameters()]
    assert names == ["intercept", *(f"blocks.{block}.weight" for block in range(3))]


@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("agg", LINEAR)
def test_contributions_of_linear_heads_add_up(agg: str, unit: Unit) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = resolve(HeadSettings(agg=agg, unit=unit, k_agg=2))
    weight = torch.randn(1, 4, generator=generator)
    head = HeadStack([settings], weight, torch.tensor([0.3])).train()  # read out in eval mode
    head.running_mean.fill_(0.5)
    instances, images = draw(4, 3)
    kept = head.keep(instances)
    read = head.read_out(kept, images)
    torch.testing.assert_close(read.score, (instances.mean(1) @ weight.T + 0.3)[:, 0])
    own = images.sum(read.contribution[:, None])[:, 0]
    if agg != "lse":  # whose log-mean-exp is more than its weighted mean
        torch.testing.assert_close(own, read.total)
    ranked = AGGREGATORS[agg].family == "ranking"
    torch.testing.assert_close(read.probability, read.total if ranked else read.total.sigmoid())
    assert head.running_mean.item() == 0.5
    if not ranked:
        total = head.eval().patient_logits(kept, images)
        torch.testing.assert_close(total.detach(), read.total)


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path / "cohort", "01010??"))


def make_distribution_model(agg: str) -> Model:
    linear = make_model()
    head = DistributionHead(solve(agg, linear.backbone.channels))
    return Model(linear.backbone, head, recipe=linear.recipe, facts=linear.facts)


def predict(model: Model, cohort: Cohort, *, tta: bool = False) -> Predictions:
    settings = PredictSettings(device="cpu", precision="float32", threads=1, tta=tta)
    return model.predict(cohort, settings)


@pytest.mark.parametrize("agg", AGGS)
def test_a_model_is_saved_loaded_and_predicts_the_same(
    agg: str, cohort: Cohort, tmp_path: Path
) -> None:
    model = make_distribution_model(agg)
    model.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    assert loaded.head_settings == model.head_settings
    expected, found = predict(model, cohort), predict(loaded, cohort)
    assert expected.patients.equals(found.patients)
    assert expected.images.equals(found.images)


def test_predictions_are_the_heads_of_the_pooled_maps(cohort: Cohort) -> None:
    model = make_distribution_model("mean+std")
    found = predict(model, cohort)
    with torch.no_grad():
        maps = model.backbone(pixels_of(model, [path for own in cohort.images for path in own]))
        expected = model.head.read_out(maps.mean((2, 3))[:, None], Bags.of(cohort.n_images))
    assert found.patients["probability"].to_numpy() == pytest.approx(
        expected.probability.numpy(), abs=1e-5
    )
    for column, values in (
        ("logit", expected.score),
        ("weight", expected.weight),
        ("contribution", expected.contribution),
    ):
        assert found.images[column].to_numpy() == pytest.approx(values.numpy(), rel=1e-3, abs=1e-5)
    averaged = predict(model, cohort, tta=True)
    assert (averaged.patients["probability"] != found.patients["probability"]).any()
