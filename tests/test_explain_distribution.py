"""Explanations of heads that score statistics of a patient's cells: maps, findings, plates."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError
from lymphfeat.explanation.explanation import Explanation, explain
from lymphfeat.explanation.faithfulness import delete_images
from lymphfeat.explanation.findings import Finding, Findings, cell_distances
from lymphfeat.explanation.maps import has_map, map_patient
from lymphfeat.explanation.page import render_page
from lymphfeat.explanation.report import write_cell, write_report
from lymphfeat.explanation.scores import probability_without, score_cohort
from lymphfeat.explanation.subjects import subject_of
from lymphfeat.explanation.text import describe_finding
from lymphfeat.explanation.wording import Wording
from lymphfeat.heads.aggregators.distribution import confidence
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.exact_head import ExactHead
from lymphfeat.model.scoring import CohortScorer
from lymphfeat.runtime.progress import silent
from lymphfeat.settings import ExplainSettings, Unit
from tests.test_distribution_head import AGGS, make_distribution_model, solve
from tests.tiny import write_red_cohort

ON_CPU = ExplainSettings(device="cpu", precision="float32", threads=1)
CHANNELS = 4
# Their shares add up, whatever the bag: not those of logarithms, nor of kinds without a cell.
ADDITIVE = [agg for agg in AGGS if "logstd" not in agg and "prototypes" not in agg]
HEADS = {agg: solve(agg, CHANNELS) for agg in AGGS}
sizes_of_bags = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def draw(sizes: list[int], seed: int, per_image: int = 1) -> Tensor:
    """Draw skewed instances (N, U, C)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(sizes), per_image, CHANNELS, generator=generator).exp()


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path / "cohort", "010101??"))


def explained(cohort: Cohort, agg: str) -> Explanation:
    return explain(make_distribution_model(agg), cohort, ON_CPU)


# --- contributions --------------------------------------------------------------------------------


def rest_of(head: ExactHead, sizes: list[int]) -> Tensor:
    """Return what belongs to no image of patients with `sizes` images, by hand: (P,)."""
    parts = []
    for block in head.blocks:
        own = block.statistic
        missing = (1 - confidence(torch.tensor(sizes))) * own.statistic.spread  # (P,)
        assumed = missing[:, None] * own.typical - own.mean  # (P, D)
        parts.append((assumed * own.scale) @ block.weight)
    return torch.stack(parts).sum(0) + head.intercept


@pytest.mark.parametrize("agg", ADDITIVE)
@given(seed=st.integers(0, 1000), sizes=sizes_of_bags)
def test_contributions_and_rest_add_up_to_the_total(agg: str, seed: int, sizes: list[int]) -> None:
    read = DistributionHead(HEADS[agg]).read_out(draw(sizes, seed), Bags.of(sizes))
    sums = torch.stack([own.sum() for own in torch.split(read.contribution, sizes)])
    torch.testing.assert_close(
        sums + rest_of(HEADS[agg], sizes).float(), read.total, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("agg", AGGS)
@given(seed=st.integers(0, 1000), sizes=sizes_of_bags)
def test_the_order_of_images_does_not_matter(agg: str, seed: int, sizes: list[int]) -> None:
    instances, images, head = draw(sizes, seed), Bags.of(sizes), DistributionHead(HEADS[agg])
    rng = np.random.default_rng(seed)
    starts = np.cumsum(sizes) - sizes
    order = np.concatenate([a + rng.permutation(n) for a, n in zip(starts, sizes, strict=True)])
    read, moved = head.read_out(instances, images), head.read_out(instances[order], images)
    torch.testing.assert_close(moved.total, read.total, rtol=1e-4, atol=1e-5)
    for name in ("contribution", "score", "weight"):
        own = getattr(read, name)[order]
        torch.testing.assert_close(getattr(moved, name), own, rtol=1e-4, atol=1e-4)
    pooled = instances.mean(1)
    torch.testing.assert_close(
        cell_distances(HEADS[agg], pooled[order], images),
        cell_distances(HEADS[agg], pooled, images)[order],
    )


@pytest.mark.seconds
@pytest.mark.parametrize("agg", AGGS)
def test_an_explanation_agrees_with_predict(agg: str, cohort: Cohort) -> None:
    found = explained(cohort, agg)
    predictions = found.model.predict(cohort, ON_CPU.scoring)
    images = predictions.images
    assert found.predicted == pytest.approx(predictions.patients["probability"], abs=1e-5)
    for name in ("logit", "weight", "contribution"):
        assert found.images[name].to_numpy() == pytest.approx(images[name].to_numpy(), abs=1e-4)
    sums = found.images.groupby("patient", sort=False)["contribution"].sum().to_numpy()
    assert sums + found.decisions.rest == pytest.approx(found.decisions.total, abs=1e-4)
    assert (found.decisions.mark == 0).all()


@pytest.mark.parametrize("agg", ["mean+std", "gini+prototypes"])
def test_deleting_against_a_loop(agg: str, cohort: Cohort) -> None:
    model = make_distribution_model(agg)
    subject = subject_of(model, cohort.table)
    (kept,) = score_cohort(subject, cohort, ON_CPU.scoring).kept
    left_out = np.random.default_rng(0).random(len(kept)) < 0.5
    fast = probability_without(subject, [kept], cohort.n_images, left_out)
    patient = np.repeat(np.arange(len(cohort.ids)), cohort.n_images)
    for number, value in enumerate(fast):
        own = kept[torch.from_numpy((patient == number) & ~left_out)]
        if len(own):
            alone = model.head.read_out(own, Bags.of([len(own)])).probability
            assert value == pytest.approx(float(alone[0]), abs=1e-6)
        else:
            assert np.isnan(value)
    deletion = delete_images(subject, [kept], cohort.n_images, draws=3)
    assert deletion is not None
    assert (deletion.highest >= 0).all()


# --- maps -----------------------------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize("agg", AGGS)
def test_the_mean_of_a_map_is_the_score(agg: str, cohort: Cohort) -> None:
    found = explained(cohort, agg)
    assert found.maps.mean((1, 2)) == pytest.approx(found.logit, abs=1e-5)
    means = [own.mean() for own in np.split(found.logit, cohort.offsets[1:-1])]
    assert means == pytest.approx(found.decisions.total, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("agg", AGGS)
def test_maps_are_what_a_small_step_changes(agg: str, n: int) -> None:
    head = HEADS[agg]
    pixels = draw([n], 3, per_image=4).double()
    pixels[:, :, 0] = 1  # a feature that does not vary
    found, pooled, bags = map_patient(head, pixels), pixels.mean(1), Bags.of([n])
    mapped = [block for block in head.blocks if has_map(block.statistic.statistic)]

    def score(instances: Tensor) -> Tensor:
        parts = [block.statistic.score(instances, bags, block.weight)[0] for block in mapped]
        return torch.stack([torch.zeros((), dtype=torch.float64), *parts]).sum()

    for image, field in ((0, 0), (n - 1, 3)):
        step = torch.zeros_like(pooled)
        step[image] = 1e-6 * (pixels[image, field] - pooled[image])
        change = n * (score(pooled + step) - score(pooled - step)) / 2e-6
        expected = change + found[image].mean()
        torch.testing.assert_close(found[image, field], expected, rtol=1e-4, atol=1e-4)


def test_a_map_of_the_mean_is_that_of_a_scorer() -> None:
    head = HEADS["mean"]
    assert head.scorer is not None
    weight, bias = head.scorer
    pixels = draw([5], 0, per_image=4).double()
    torch.testing.assert_close(map_patient(head, pixels), pixels @ weight + bias)


@pytest.mark.parametrize("unit", ["image", "pixel"])
def test_maps_of_either_unit(unit: Unit) -> None:
    head = solve("std", CHANNELS, unit)
    pixels = draw([6], 1, per_image=4)
    found = map_patient(head, pixels)
    kept = pixels if unit == "pixel" else pixels.mean(1, keepdim=True)
    read = DistributionHead(head).read_out(kept, Bags.of([6]))
    torch.testing.assert_close(found.mean(1).float(), read.score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agg", [*AGGS, "kernel-mean+std"])
def test_heads_without_maps_are_said_to_have_none(agg: str) -> None:
    head = solve(agg, CHANNELS)
    flat = map_patient(head, draw([20], 0, per_image=4)).std(1).max() < 1e-9
    wording = Wording.of(head.settings)
    assert wording.mapped is not bool(flat)
    partly = any(not has_map(block.statistic.statistic) for block in head.blocks)
    assert ("spread evenly" in wording.maps) is (partly and wording.mapped)


def test_patients_are_scored_one_after_another(cohort: Cohort) -> None:
    model = make_distribution_model("std")
    settings = replace(ON_CPU.scoring, batch_size=3)
    scorer = CohortScorer(
        model.backbone, model.head, model.recipe, settings, views=("identity",), unit="pixel"
    )
    whole = scorer.score(cohort, silent)
    done: list[int] = []
    parts: list[Tensor] = []
    for part in scorer.score_patients(cohort, lambda so_far, *_: done.append(so_far)):
        parts.append(part)
        read = max(done, default=0)
        assert read <= sum(own.shape[1] for own in parts) + 3  # no more than a batch ahead
    assert [part.shape[1] for part in parts] == list(cohort.n_images)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


# --- findings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("agg", AGGS)
@given(seed=st.integers(0, 1000), sizes=sizes_of_bags)
def test_findings_add_up_to_the_total(agg: str, seed: int, sizes: list[int]) -> None:
    head, kept, images = HEADS[agg], draw(sizes, seed), Bags.of(sizes)
    found = Findings.of_head(head, kept, images)
    total = head.patient_logits([(kept[:, 0], images)])
    added = found.intercept + sum(each.score for each in found.statistics)
    np.testing.assert_allclose(added, total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("agg", ["std", "gini", "logstd"])
def test_cells_that_differ_more_are_said_to(agg: str) -> None:
    sizes = [20, 20, 20]
    kept = torch.randn(60, 1, CHANNELS, generator=torch.Generator().manual_seed(0))
    kept *= torch.tensor([0.01, 100.0, 1.5]).repeat_interleave(20)[:, None, None]
    (found,) = Findings.of_head(HEADS[agg], kept, Bags.of(sizes)).statistics
    assert list(found.differing[:2]) == [0, 1]
    own = HEADS[agg].blocks[0].statistic
    described = own.statistic.describe(kept[:, 0], Bags.of(sizes))[2]
    above = [float(a > b) for a, b in zip(described, own.typical, strict=True)]
    assert found.differing[2] == np.mean(above)


def test_a_slope_is_the_change_by_a_standard_deviation() -> None:
    head = HEADS["std"]
    own = head.blocks[0].statistic
    (found,) = Findings.of_head(head, draw([20], 0), Bags.of([20])).statistics
    deviation = 1 / (own.scale * CHANNELS**0.5)  # of the training patients
    here = own.apply(own.mean[None], torch.tensor([20])) @ head.blocks[0].weight
    there = own.apply((own.mean + deviation)[None], torch.tensor([20])) @ head.blocks[0].weight
    assert found.slope == pytest.approx(float(there - here))


def test_single_images_show_no_difference() -> None:
    found = Findings.of_head(HEADS["mean+std"], draw([1, 20], 0), Bags.of([1, 20]))
    mean, std = found.statistics
    assert np.isnan(mean.differing).all()
    assert list(np.isnan(std.differing)) == [True, False]
    assert list(std.certain) == [0, 1]
    assert found.distance is not None
    assert found.distance[0] == 0


@pytest.mark.parametrize("agg", ["std", "logstd", "gini", "quantiles", "mean+std"])
def test_the_cell_apart_is_the_most_different(agg: str) -> None:
    cells = torch.randn(10, CHANNELS, generator=torch.Generator().manual_seed(0))
    cells[7] += 30
    distance = cell_distances(HEADS[agg], cells, Bags.of([10]))
    assert distance.argmax() == 7
    assert distance.mean() == pytest.approx(1)


def test_distances_follow_what_the_head_reads() -> None:
    head = HEADS["std"]
    (block,) = head.blocks
    cells = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 0]])
    strength = (block.weight * block.statistic.scale).abs()
    away = (cells - cells.mean(0)).abs().double() @ strength
    torch.testing.assert_close(cell_distances(head, cells, Bags.of([4])), away / away.mean())


def test_heads_that_read_no_differences_measure_none() -> None:
    for agg in ("mean", "kernel-mean", "prototypes"):
        assert Findings.of_head(HEADS[agg], draw([3], 0), Bags.of([3])).distance is None


@pytest.mark.parametrize(
    ("unit", "name", "per_image"), [("image", "cell", 1), ("pixel", "pixel", 4)]
)
def test_every_statistic_has_words_of_its_own(unit: Unit, name: str, per_image: int) -> None:
    head = solve("mean+std+logstd+gini+quantiles+kernel-mean+prototypes", CHANNELS, unit)
    found = Findings.of_head(head, draw([20], 0, per_image), Bags.of([20]))
    told = [each.about for each in found.statistics]
    assert len(set(told)) == len(told) == 8
    assert all(name in about for about in told)


# --- in words -------------------------------------------------------------------------------------


def finding(score: float, differing: float, certain: float = 1, *, spread: bool = True) -> Finding:
    return Finding(
        about="how much the cells differ from their average",
        spread=spread,
        score=np.array([score]),
        differing=np.array([differing]),
        certain=np.array([certain]),
        slope=-1.0,
    )


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (finding(1.2, 0.22), ["is evidence for tumoral (+1.20)", "differ less", "in 78%"]),
        (finding(-0.4, 0.9), ["is evidence for reactive (−0.40)", "differ more", "in 90%"]),
        (finding(0.04, 0.5), ["hardly evidence for either class", "about as much as"]),
        (finding(0.0, np.nan, 0), ["A single image does not show"]),
        (finding(0.3, 0.9, 0.4), ["Fewer than 16 images", "it counts 40%"]),
    ],
)
def test_findings_in_words(found: Finding, told: list[str]) -> None:
    sentence = describe_finding(found, 0)
    assert all(part in sentence for part in told), sentence
    assert ("Fewer than" in sentence) is bool(0 < found.certain[0] < 1)


def test_appearance_is_not_compared() -> None:
    sentence = describe_finding(finding(1.2, np.nan, spread=False), 0)
    assert sentence.endswith("is evidence for tumoral (+1.20).")


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize("agg", ["mean+std", "kernel-mean"])
def test_page_and_figures(agg: str, cohort: Cohort, tmp_path: Path) -> None:
    found = explained(cohort, agg)
    files = write_report(found, tmp_path / "report.html", replace(ON_CPU, plates=3))
    kinds = {path.name.split("-")[0].split(".")[0] for path in files if path.parent != tmp_path}
    plates = {"plate", "weights", "cohort", "extremes", "deletion", "subgroups"}
    assert kinds == plates | ({"differences", "grids"} if agg == "mean+std" else set())
    page = render_page(found)
    assert "What the head looks at" in page
    assert "The head looks at the" in page
    assert "removing one changes theirs" in page
    assert ("This head has no maps" in page) is (agg == "kernel-mean")


def test_distances_are_of_heads_that_read_differences(cohort: Cohort) -> None:
    found = explained(cohort, "std")
    assert found.distance is not None
    assert found.images["distance"].notna().all()
    assert explained(cohort, "mean").images["distance"].isna().all()


def test_one_image_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must score single cells to explain one image"):
        write_cell(make_distribution_model("std"), cohort.images[0][0], tmp_path / "cell.png")
