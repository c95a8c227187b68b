"""Scores, contributions, deletions, overlap and the page, each against the obvious way."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.calibration import Calibration
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.explanation.explanation import Explanation, explain
from lymphfeat.explanation.faithfulness import overlap_with_cells
from lymphfeat.explanation.figures import smooth_map
from lymphfeat.explanation.page import render_page
from lymphfeat.explanation.report import worst_first, write_cell, write_report
from lymphfeat.explanation.scores import probability_without, ranks
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.stack import NetworkHead
from lymphfeat.model.model import Model
from lymphfeat.settings import ExplainSettings, HeadSettings, Precision, PredictSettings, Unit
from lymphfeat.synthetic.cohort import SyntheticSettings, cell_extents, write_synthetic_cohort
from lymphfeat.synthetic.rendering import render_cell
from tests.test_model import make_model, reference_logits
from tests.tiny import SIDE, write_red_cohort

ON_CPU = ExplainSettings(device="cpu", precision="float32")
AGGS = ["mean", "max", "lse", "bnsigmoid", "top1", "topk", "topbottomk"]


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path / "cohort", "010101??"))


def explained(cohort: Cohort, agg: str, unit: Unit = "") -> Explanation:
    return explain(make_model(agg, unit), cohort, ON_CPU)


def single(found: Explanation) -> Model:
    assert isinstance(found.model, Model)
    return found.model


@pytest.mark.seconds
@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("unit", ["pixel", "image"])
def test_contributions_add_up_and_agree_with_predict(agg: str, unit: Unit, cohort: Cohort) -> None:
    found = explained(cohort, agg, unit)
    predictions = found.model.predict(cohort, PredictSettings(device="cpu", precision="float32"))
    patients, images = predictions.patients, predictions.images
    assert found.predicted == pytest.approx(patients["probability"].to_numpy(), abs=1e-5)
    assert found.logit == pytest.approx(images["logit"].to_numpy(), abs=1e-4)
    assert found.decisions.weight == pytest.approx(images["weight"].to_numpy(), abs=1e-5)
    sums = found.images.groupby("patient", sort=False)["contribution"].sum().to_numpy()
    total = found.decisions.total
    assert sums + found.decisions.rest == pytest.approx(total, abs=1e-4)
    if agg != "lse":
        assert found.decisions.rest == pytest.approx(0, abs=1e-4)
    logit = found.decisions.additive == "logit"
    probability = 1 / (1 + np.exp(-total)) if logit else total
    assert probability == pytest.approx(found.decisions.probability, abs=1e-5)


@pytest.mark.seconds
@pytest.mark.parametrize("agg", AGGS)
def test_logits_beyond_what_exp_holds(agg: str, cohort: Cohort, tmp_path: Path) -> None:
    model = make_model(agg)
    torch.nn.init.constant_(model.head.get_parameter("bias"), -1000)
    found = explain(model, cohort, ON_CPU)
    assert (found.images["probability"] == 0).all()
    images = model.predict(cohort, PredictSettings(device="cpu", precision="float32")).images
    assert (images["probability"] == 0).all()
    write_report(found, tmp_path / "report.html")
    image = cohort.images[0][0]
    assert (
        write_cell(model, image, tmp_path / "cell.png", ExplainSettings(device="cpu")).probability
        == 0
    )
    assert np.isfinite(found.patients["probability"]).all()


@pytest.mark.seconds
@pytest.mark.parametrize("agg", ["attention", "lstm"])
def test_networks_are_explained_without_maps(agg: str, cohort: Cohort, tmp_path: Path) -> None:
    linear = make_model("mean")
    channels = linear.backbone.channels
    generator = torch.Generator().manual_seed(0)
    head = NetworkHead.initial(
        resolve(HeadSettings(agg=agg)), torch.zeros(channels), 50 * torch.ones(channels), generator
    )
    model = Model(linear.backbone, head, recipe=linear.recipe, facts=linear.facts)
    found = explain(model, cohort, ON_CPU)
    predictions = model.predict(cohort, ON_CPU.scoring)
    assert found.predicted == pytest.approx(predictions.patients["probability"], abs=1e-5)
    for name in ("logit", "weight", "contribution"):
        expected = predictions.images[name].to_numpy()
        assert found.images[name].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert found.maps.shape[1:] == (1, 1)
    files = write_report(found, tmp_path / "report.html", replace(ON_CPU, plates=1))
    assert not any(path.name.startswith("grids") for path in files)
    assert "This head has no maps" in (tmp_path / "report.html").read_text()
    with pytest.raises(SettingsError, match="must score single cells"):
        write_cell(model, cohort.images[0][0], tmp_path / "cell.png")


def test_maps_against_image_by_image(cohort: Cohort) -> None:
    found = explained(cohort, "topk")  # scores images, yet has maps
    paths = [path for paths in cohort.images for path in paths]
    for path, grid in zip(paths, found.maps, strict=True):
        reference = reference_logits(single(found), path)
        assert grid.ravel() == pytest.approx(reference.numpy(), abs=1e-3)


def test_precision_is_that_of_predict(auto_precision: Precision, cohort: Cohort) -> None:
    model = make_model("topk")
    cases: tuple[tuple[Explanation, Precision], ...] = (
        (explain(model, cohort, ExplainSettings(device="cpu")), "float32"),
        (explain(model, cohort, ExplainSettings(device="cpu", precision="auto")), auto_precision),
    )
    for found, precision in cases:
        images = model.predict(cohort, PredictSettings(device="cpu", precision=precision)).images
        assert found.logit == pytest.approx(images["logit"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize("agg", AGGS)
def test_deleting_against_a_loop(agg: str, cohort: Cohort) -> None:
    found = explained(cohort, agg)
    head = single(found).head
    left_out = np.random.default_rng(0).random(len(found.maps)) < 0.5
    kept = torch.from_numpy(found.maps).flatten(1)[:, :, None]  # (N, h · w, 1)
    if head.settings[0].unit == "image":
        kept = kept.mean(1, keepdim=True)
    fast = probability_without(found.subject, [kept], cohort.n_images, left_out)
    for patient, value in enumerate(fast):
        own = found.maps[(found.patient == patient) & ~left_out]
        if not len(own):
            assert np.isnan(value)
            continue
        pixels = torch.from_numpy(own).flatten(1)
        unit = head.settings[0].unit
        logits = pixels if unit == "pixel" else pixels.mean(1, keepdim=True)
        alone = head.read_out(logits[:, :, None], Bags.of([len(own)])).probability
        assert value == pytest.approx(float(alone[0]), abs=1e-5)


def test_ranks_break_ties_in_order() -> None:
    logit = np.array([1, 3, 3, 2, 5], np.float32)
    assert ranks(logit, np.array([4, 1])).tolist() == [3, 0, 1, 2, 0]


def test_marks_are_what_the_aggregator_counted(cohort: Cohort) -> None:
    found = explained(cohort, "topbottomk", "image")  # k 2
    for patient, n in enumerate(cohort.n_images):
        own = found.patient == patient
        expected = np.where(found.rank[own] < 2, 1, np.where(found.rank[own] >= n - 2, -1, 0))
        assert found.decisions.mark[own].tolist() == expected.tolist()


def test_smooth_maps_keep_place_and_range() -> None:
    grid = np.zeros((4, 4), np.float32)
    grid[0, 3] = 1
    fine = smooth_map(grid, 112)
    assert fine.shape == (112, 112)
    assert 0 <= fine.min() < fine.max() <= 1
    y, x = np.unravel_index(fine.argmax(), fine.shape)
    assert (int(y) // 28, int(x) // 28) == (0, 3)
    assert fine[50:, :60].max() < 0.1


def test_overlap_with_cells() -> None:
    extent = np.zeros((1, 40, 40), np.float32)
    extent[0, 10:30, 10:30] = 1
    grid = np.zeros((1, 4, 4), np.float32)
    grid[0, 1:3, 1:3] = 1
    inside, outside = overlap_with_cells(grid, extent), overlap_with_cells(-grid, extent)
    assert inside is not None
    assert outside is not None
    assert (inside.auc, inside.pointing, inside.cell_share) == (1, 1, 0.25)
    assert (outside.auc, outside.pointing) == (0, 0)
    assert overlap_with_cells(grid, np.zeros_like(extent)) is None


def test_extents_are_of_the_cells_rendered(tmp_path: Path) -> None:
    """The darkest parts of an image, its nuclei, lie in the cell."""
    settings = SyntheticSettings(patients=2, test_patients=0, images=3)
    root = write_synthetic_cohort(settings, tmp_path / "made")
    cohort = Cohort.load(root)
    extents = cell_extents(root, [cohort.images[0][0]])
    from lymphfeat.cohort.images import decode_crop

    pixels = decode_crop(cohort.images[0][0], 224).pixels.mean(0)
    dark = pixels < np.quantile(pixels, 0.03)
    assert (extents[0] > 0.5)[dark].mean() > 0.97
    assert 0.03 < (extents[0] > 0.5).mean() < 0.2
    assert render_cell(np.random.default_rng(0), False, 0.3).shape == (224, 224, 3)


def test_truth_scores_and_overlap_of_a_synthetic_cohort(tmp_path: Path) -> None:
    settings = SyntheticSettings(patients=4, test_patients=0, images=4)
    root = write_synthetic_cohort(settings, tmp_path / "made")
    truth = Truth.read([root / "truth.csv"])
    found = explain(make_model(), Cohort.load(root), ExplainSettings(device="cpu"), truth=truth)
    assert 0 <= found.truth_scores()["witness_auc_all"] <= 1
    assert truth.images is not None
    assert found.overlap is None or found.overlap.images <= truth.images["witness"].sum()
    assert found.deletion is not None
    assert (found.deletion.highest >= 0).all()


def test_roles_and_errors_first(cohort: Cohort) -> None:
    found = explained(cohort, "mean")
    assert list(found.patients["role"][:4]) == ["train", "train", "validation", "new"]
    ordered = found.patients.set_index("id").loc[worst_first(found)]
    wrong = ordered["error"].fillna(False).to_numpy(bool)
    assert (np.diff(wrong.astype(int)) <= 0).all()


def test_calibrated_where_the_model_is(cohort: Cohort) -> None:
    model = make_model("mean")
    assert explain(model, cohort, ExplainSettings(device="cpu")).patients["calibrated"].isna().all()
    model.decision = replace(model.decision, calibration=Calibration(slope=2.0))
    found = explain(model, cohort, ExplainSettings(device="cpu")).patients
    raw = found["probability"].to_numpy(np.float64)
    odds = (raw / (1 - raw)) ** 2
    assert found["calibrated"].to_numpy() == pytest.approx(odds / (1 + odds), abs=1e-5)


# --- the page -------------------------------------------------------------------------------------


def _data(page: str, id: str) -> Any:
    match = re.search(rf'<script type="application/json" id="{id}">(.*?)</script>', page)
    assert match
    return json.loads(match[1])


def test_text_of_tables_is_escaped(tmp_path: Path) -> None:
    root = write_red_cohort(tmp_path / "<b>mine&", "0101")
    table = (root / "cohort.csv").read_text().splitlines()
    evil = "</script><script>alert(1)</script>"
    lines = [table[0] + ",note<i>", *(f"{line},{evil}" for line in table[1:])]
    (root / "cohort.csv").write_text("".join(f"{line}\n" for line in lines))
    page = render_page(explained(Cohort.load(root), "mean"))
    assert "alert(1)" in page
    assert evil not in page
    assert "<i>" not in page
    assert "<strong>&lt;b&gt;mine&amp;</strong>" in page
    told = _data(page, "data")
    assert told["attributes"] == ["note<i>"]


def test_budget_leaves_the_middle_out_and_says_so(cohort: Cohort) -> None:
    found = explained(cohort, "topk")
    whole = render_page(found)
    assert "left out to keep" not in whole
    small = render_page(found, budget=640_000)
    assert len(small.encode()) <= 640_000
    bare = render_page(found, budget=1)
    assert f"{len(found.maps)} of {len(found.maps)} pictures are left out" in bare
    told = _data(bare, "data")["pictures"]
    assert told["missing"]["0"] == list(range(int(cohort.n_images[0])))
    assert _data(bare, "s0") == [""]


def test_pictures_are_made_while_images_are_scored(cohort: Cohort) -> None:
    images = [np.asarray(Image.open(path).convert("RGB"), np.float32) for path in cohort.images[3]]
    found = explained(cohort, "topk")
    assert len(found.patients) == len(cohort.ids)  # who they are is told by their files
    shutil.rmtree(cohort.root)  # which are not read again
    (sheet,) = _data(render_page(found), "s3")
    with Image.open(io.BytesIO(base64.b64decode(sheet))) as opened:
        pixels = np.asarray(opened, np.float32)  # (SIDE, n · SIDE, 3)
    shown = pixels.reshape(SIDE, len(images), SIDE, 3).mean((0, 2))  # (n, 3)
    np.testing.assert_allclose(shown, np.mean(images, axis=(1, 2)), atol=6)
    assert shown[0, 0] > shown[1, 0] + 50  # the first one is reddish


def test_nothing_is_loaded_from_elsewhere(cohort: Cohort) -> None:
    page = render_page(explained(cohort, "bnsigmoid"))
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(|@import|fetch\(""", page)
    assert "default-src 'none'" in page
    assert f"crop of {SIDE} px" in page
