"""A synthetic cohort: the same bytes, the challenge's layout and quirks, and a truth that holds."""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import CohortError, OutputError, SettingsError
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.settings import Sign
from lymphfeat.synthetic import cohort as synthetic
from lymphfeat.synthetic import rendering
from lymphfeat.synthetic.cohort import (
    CELL_CLASSES,
    SyntheticSettings,
    write_plate,
    write_synthetic_cohort,
)
from lymphfeat.synthetic.patients import plan_patients
from lymphfeat.synthetic.rendering import (
    TRAITS,
    Look,
    Slide,
    draw_slide,
    draw_traits,
    render_cell,
)
from lymphfeat.synthetic.signs import SPREAD_DISTANCE, draw_look
from lymphfeat_cli.main import cli

SMALL = SyntheticSettings(patients=5, test_patients=3, images=4, image_size=48)
TEXTS = {  # of SMALL: the first digits of their sha256
    "synthetic.json": "cbfe018051389699",
    "clinical_annotation.csv": "0b02436a2a426d01",
    "truth.csv": "da053f5138a7b7c9",
}


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small finished cohort, for reading only."""
    return write_synthetic_cohort(SMALL, tmp_path_factory.mktemp("cohort") / "small")


# --- the same bytes ---------------------------------------------------------------------------


def test_same_settings_give_same_bytes_with_any_number_of_workers(
    cohort: Path, tmp_path: Path
) -> None:
    again = write_synthetic_cohort(SMALL, tmp_path / "again", workers=3)
    assert contents(again) == contents(cohort)


def test_another_seed_gives_other_patients_and_other_images(cohort: Path, tmp_path: Path) -> None:
    other = contents(write_synthetic_cohort(replace(SMALL, seed=1), tmp_path / "other"))
    images = {name: data for name, data in contents(cohort).items() if name.endswith(".jpg")}
    assert other["clinical_annotation.csv"] != contents(cohort)["clinical_annotation.csv"]
    assert not set(other.values()) & set(images.values())


def test_the_bytes_of_earlier_versions_stay(cohort: Path) -> None:
    tables = {name: contents(cohort)[name] for name in TEXTS}
    assert {name: hashlib.sha256(data).hexdigest()[:16] for name, data in tables.items()} == TEXTS


@pytest.mark.parametrize(
    ("atypical", "greens"),
    [
        (False, [179, 184, 227, 227, 38, 26, 31, 115, 173, 168, 167, 163]),
        (True, [145, 218, 206, 182, 58, 63, 62, 66, 227, 231, 231, 207]),
    ],
)
def test_the_cells_of_earlier_versions_stay(atypical: bool, greens: list[int]) -> None:
    cell = render(0, atypical, 0.3, 48)
    assert cell[24, 2::4, 1].tolist() == pytest.approx(greens, abs=2)  # processors round otherwise


def test_no_image_occurs_twice(cohort: Path) -> None:
    images = [data for name, data in contents(cohort).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images)


def test_a_cut_off_cohort_is_finished_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cohort: Path
) -> None:
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "render_cell", fail_after(9))
        with pytest.raises(RuntimeError, match="cut off"):
            write_synthetic_cohort(SMALL, out, workers=1)
    kept = sorted(out.rglob("*.jpg"))
    assert len(kept) == 9
    assert not (out / "truth.csv").exists()
    before = [path.stat().st_mtime_ns for path in kept]
    write_synthetic_cohort(SMALL, out)
    assert contents(out) == contents(cohort)
    assert [path.stat().st_mtime_ns for path in kept] == before


def fail_after(count: int) -> Any:
    remaining = iter(range(count))

    def render(*args: Any, **options: Any) -> NDArray[np.uint8]:
        if next(remaining, None) is None:
            raise RuntimeError("cut off")
        return render_cell(*args, **options)

    return render


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = write_synthetic_cohort(
        SMALL, tmp_path / "c", progress=lambda done, total, text="": calls.append((done, total))
    )
    images = len(list(out.rglob("*.jpg")))
    assert calls[-1] == (images, images)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


# --- layout and quirks ------------------------------------------------------------------------


def test_the_table_has_the_challenges_header_and_shuffled_rows(cohort: Path) -> None:
    lines = (cohort / "clinical_annotation.csv").read_text().splitlines()
    assert lines[0] == ",ID,LABEL,GENDER,DOB,LYMPH_COUNT"
    numbers = [int(line.split(",")[0]) for line in lines[1:]]
    ids = [line.split(",")[1] for line in lines[1:]]
    assert numbers == list(range(8))
    assert sorted(ids) == [f"P{k}" for k in range(8)]
    assert ids != sorted(ids)


def test_splits_lie_in_their_folders_with_stray_tables_inside(cohort: Path) -> None:
    table = rows(cohort / "clinical_annotation.csv")
    train = {row["ID"] for row in table if row["LABEL"] != "-1"}
    test = {row["ID"] for row in table if row["LABEL"] == "-1"}
    assert (len(train), len(test)) == (5, 3)
    assert {path.name for path in (cohort / "trainset").iterdir()} == train | {"trainset_true.csv"}
    assert {path.name for path in (cohort / "testset").iterdir()} == test | {"testset_data.csv"}
    assert {row["ID"] for row in rows(cohort / "trainset" / "trainset_true.csv")} == train
    assert {row["LABEL"] for row in rows(cohort / "testset" / "testset_data.csv")} == {"-1"}
    submitted = {row["Id"] for row in rows(cohort / "sample_submission.csv")}
    assert submitted < test


def test_values_have_the_quirks_of_the_challenge() -> None:
    patients = plan_patients(SyntheticSettings(patients=163, test_patients=42))
    dashed = [p.dob for p in patients if re.fullmatch(r"\d\d-\d\d-\d{4}", p.dob)]
    slashed = [p.dob for p in patients if re.fullmatch(r"[1-9]\d?/[1-9]\d?/\d{4}", p.dob)]
    assert len(dashed) == 29
    assert len(dashed) + len(slashed) == 205
    assert sorted({p.gender for p in patients}) == ["F", "M", "f"]
    assert sum(p.gender == "f" for p in patients) == 1
    counts = np.array([float(p.lymph_count) for p in patients])
    assert 2 <= counts.min() < 6
    assert 60 < counts.max() <= 295
    test = [p.number for p in patients if p.split == "testset"]
    assert len(test) == 42
    assert test != list(range(test[0], test[0] + 42))  # interleaved


def test_the_reader_takes_the_cohort_without_a_complaint(cohort: Path) -> None:
    loaded = Cohort.load(cohort)
    assert loaded.ids == tuple(f"P{k}" for k in range(8))
    assert loaded.covariates == ("gender", "age", "lymph_count")
    planned = plan_patients(SMALL)
    assert loaded.n_images.tolist() == [patient.images for patient in planned]
    known = [-1 if patient.split == "testset" else patient.label for patient in planned]
    assert loaded.labels.tolist() == known
    assert loaded.table["age"].between(18, 98).all()
    assert set(loaded.submission_ids) == {p.id for p in planned if p.split == "testset"}


def test_images_are_jpegs_numbered_from_zero(cohort: Path) -> None:
    for patient in plan_patients(SMALL):
        names = sorted(path.name for path in (cohort / patient.folder).iterdir())
        assert names == [f"{k:06d}.jpg" for k in range(patient.images)]
    with Image.open(cohort / plan_patients(SMALL)[0].folder / "000000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))


def test_a_cohort_without_test_patients_has_no_testset(tmp_path: Path) -> None:
    few = replace(SMALL, patients=2, test_patients=0, images=1)
    out = write_synthetic_cohort(few, tmp_path / "c")
    assert not (out / "testset").exists()
    assert Cohort.load(out).labels.tolist() in ([0, 1], [1, 0])


# --- truth ------------------------------------------------------------------------------------


def test_truth_names_every_image_and_agrees_with_the_labels(cohort: Path) -> None:
    truth = rows(cohort / "truth.csv")
    assert list(truth[0]) == ["SPLIT", "ID", "FILE", "LABEL", "CELL_CLASS", "IS_WITNESS"]
    named = {f"{row['SPLIT']}/{row['ID']}/{row['FILE']}" for row in truth}
    assert named == {name for name in contents(cohort) if name.endswith(".jpg")}
    for row in rows(cohort / "trainset" / "trainset_true.csv"):
        assert {t["LABEL"] for t in truth if t["ID"] == row["ID"]} == {row["LABEL"]}
    for row in truth:
        assert row["CELL_CLASS"] in CELL_CLASSES
        assert (row["CELL_CLASS"] == "atypical_lymphocyte") == (row["IS_WITNESS"] == "1")
    read = Truth.read([cohort / "truth.csv"])
    assert read.images is not None
    assert read.labels is not None
    assert len(read.images) == len(truth)
    assert set(read.labels.index) == {f"P{k}" for k in range(8)}


def witness_counts(settings: SyntheticSettings) -> Iterator[tuple[int, int, int]]:
    """Yield label, witnesses, images of each patient."""
    for patient in plan_patients(settings):
        truth = list(synthetic._truth_rows(settings, patient))
        yield patient.label, sum(int(str(row[-1])) for row in truth), len(truth)


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    patients=st.integers(2, 12),
    test_patients=st.integers(0, 6),
    images=st.integers(1, 40),
    tumoral=st.floats(0.01, 0.99),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 2**40),
)
def test_only_tumoral_patients_have_witnesses_in_the_share_asked_for(
    patients: int,
    test_patients: int,
    images: int,
    tumoral: float,
    shares: list[float],
    seed: int,
) -> None:
    low, high = shares
    settings = SyntheticSettings(
        patients=patients,
        test_patients=test_patients,
        images=images,
        tumoral=tumoral,
        witness_share=(low, high),
        seed=seed,
    )
    planned = plan_patients(settings)
    assert [p.split for p in planned].count("testset") == test_patients
    assert {p.label for p in planned if p.split == "trainset"} == {0, 1}
    for label, witnesses, count in witness_counts(settings):
        assert max(1, images / 2) <= count <= max(1, images * 5 / 3)
        if label == 0:
            assert witnesses == 0
        else:
            assert max(1, low * count - 1) <= witnesses <= max(1, high * count + 1)


def auc_of_size(confounding: float) -> float:
    planned = plan_patients(SyntheticSettings(patients=600, size_confounding=confounding))
    return float(roc_auc_score([p.label for p in planned], [p.images for p in planned]))


def test_bag_size_tells_of_the_label_as_much_as_asked() -> None:
    assert auc_of_size(0) == pytest.approx(0.5, abs=0.06)
    assert auc_of_size(0.5) == pytest.approx(0.8, abs=0.06)  # the challenge's, METHOD §4
    assert auc_of_size(1) > 0.9


def auc_of_attributes(strength: float) -> tuple[float, float]:
    planned = plan_patients(SyntheticSettings(patients=600, attribute_strength=strength))
    labels = [p.label for p in planned]
    years = [-int(re.split("[/-]", p.dob)[2]) for p in planned]
    counts = [float(p.lymph_count) for p in planned]
    return float(roc_auc_score(labels, years)), float(roc_auc_score(labels, counts))


def test_attributes_tell_of_the_label_as_much_as_asked() -> None:
    assert auc_of_attributes(0) == pytest.approx((0.5, 0.5), abs=0.06)
    assert auc_of_attributes(0.5) == pytest.approx((0.76, 0.76), abs=0.06)
    assert min(auc_of_attributes(1)) > 0.88


# --- the cells --------------------------------------------------------------------------------


def render(seed: int, atypical: bool, difficulty: float, size: int = 224) -> NDArray[np.uint8]:
    return render_cell(np.random.default_rng(seed), atypical, difficulty, size=size)


@pytest.mark.parametrize("size", [32, 97, 224, 300])
def test_a_cell_is_a_photograph_of_the_size_asked_for(size: int) -> None:
    cell = render(0, True, 0.3, size)
    assert (cell.shape, cell.dtype) == ((size, size, 3), np.dtype(np.uint8))
    assert cell.flags["C_CONTIGUOUS"]


def test_a_dark_violet_nucleus_lies_in_the_middle_of_a_cream_ground() -> None:
    cells = np.stack([render(seed, False, 0.3) for seed in range(12)]).astype(float)
    red, green, blue = cells[:, 102:122, 102:122].mean((0, 1, 2))  # within the nucleus
    assert green < red < blue < 160
    ground = np.percentile(cells.reshape(-1, 3), 90, axis=0)
    assert ground[0] > ground[1] > ground[2] > 180


def test_at_difficulty_one_an_atypical_cell_is_a_normal_one() -> None:
    for seed in range(4):
        assert np.array_equal(render(seed, True, 1, 64), render(seed, False, 1, 64))


def difference(difficulty: float) -> NDArray[np.float64]:
    """Return how far the mean atypical and normal image are apart, (112, 112), at size 112."""
    means = [
        np.mean([render(seed, atypical, difficulty, 112) for seed in range(60)], axis=0)
        for atypical in (True, False)
    ]
    return np.asarray(np.abs(means[0] - means[1]).mean(-1), np.float64)


def test_atypical_cells_differ_within_the_centre_crop_and_less_so_the_harder() -> None:
    plain, hard = difference(0.0), difference(0.8)
    centre = np.zeros((112, 112), np.bool_)
    centre[28:84, 28:84] = True
    assert plain[centre].mean() > 2.5 * plain[~centre].mean()
    assert plain[centre].mean() > 2 * hard[centre].mean()


def test_the_largest_lymphocyte_lies_whole_in_the_centre_crop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slide = draw_slide(np.random.default_rng(0))
    traits = draw_traits(np.random.default_rng(0), True, 0, slide, True)
    largest = replace(traits, nucleus=36.0, cytoplasm=13.0, irregularity=0.1, basophilia=1.2)
    monkeypatch.setattr(rendering, "draw_traits", lambda *_: largest)
    monkeypatch.setattr(rendering, "_add_platelets", lambda *_: None)
    for seed in range(40):
        cell = render_cell(np.random.default_rng(seed), True, 0, slide=slide)
        stained = cell[..., 0] < 120  # only nuclei and basophilic cytoplasm absorb that much red
        assert stained[56:168, 56:168].sum() > 1000
        stained[57:167, 57:167] = False  # the crop but for its edge, where a cell would be cut
        assert not stained.any()


# --- signs ------------------------------------------------------------------------------------


def draw_looks(sign: Sign, label: int, difficulty: float, count: int = 150) -> list[Look]:
    """Draw the looks of patients who differ by their slides, which do not depend on the label."""
    looks = []
    for seed in range(count):
        rng = np.random.default_rng(seed + label * count)
        look = draw_look(rng, sign, label, difficulty, draw_slide(rng))
        assert look is not None
        looks.append(look)
    return looks


def centres(looks: list[Look]) -> NDArray[np.float64]:
    return np.stack([look.centre for look in looks])  # (P, T)


def test_cells_of_a_witness_cohort_look_as_drawn() -> None:
    rng = np.random.default_rng(0)
    assert draw_look(rng, "witness", 1, 0, draw_slide(rng)) is None


@pytest.mark.parametrize("difficulty", [0.0, 0.5])
def test_under_variety_the_cells_of_tumoral_patients_are_more_alike(difficulty: float) -> None:
    reactive, tumoral = (draw_looks("variety", label, difficulty) for label in (0, 1))
    logs = [np.log([look.spread for look in looks]) for looks in (reactive, tumoral)]
    apart = float(logs[0].mean() - logs[1].mean())
    assert apart == pytest.approx((1 - difficulty) * SPREAD_DISTANCE, abs=0.1)
    error = np.sqrt(2 / 150) * centres(reactive).std(0)
    difference = centres(reactive).mean(0) - centres(tumoral).mean(0)  # (T,)
    assert (np.abs(difference) < 4 * error).all()


def test_under_shift_the_centres_of_tumoral_patients_are_moved_along_some_traits() -> None:
    reactive, tumoral = (draw_looks("shift", label, 0) for label in (0, 1))
    deviations = (centres(tumoral).mean(0) - centres(reactive).mean(0)) / centres(reactive).std(0)
    moved = {name for name, by in zip(TRAITS, deviations, strict=True) if abs(by) > 0.5}
    assert moved == {"nucleus", "grain", "contrast", "density", "basophilia"}
    spreads = [np.log([look.spread for look in looks]).mean() for looks in (reactive, tumoral)]
    assert spreads[0] == pytest.approx(spreads[1], abs=0.1)


@pytest.mark.parametrize("sign", ["variety", "shift"])
def test_at_difficulty_one_no_sign_depends_on_the_label(sign: Sign) -> None:
    slide = draw_slide(np.random.default_rng(0))
    one, other = (draw_look(np.random.default_rng(1), sign, k, 1, slide) for k in (0, 1))
    assert one is not None
    assert other is not None
    assert np.array_equal(one.centre, other.centre)
    assert one.spread == other.spread


def test_a_look_spreads_the_traits_of_the_cells_round_its_centre() -> None:
    slide = draw_slide(np.random.default_rng(0))
    look = draw_look(np.random.default_rng(1), "variety", 1, 0.5, slide)
    assert look is not None

    def traits(slide: Slide) -> NDArray[np.float64]:
        rngs = [np.random.default_rng(seed) for seed in range(9)]
        return np.array([astuple(draw_traits(rng, False, 0, slide, False)) for rng in rngs])

    expected = look.centre + look.spread * (traits(slide) - look.middle)
    limited = np.clip(expected, rendering._LOWEST, rendering._HIGHEST)
    assert np.array_equal(traits(replace(slide, look=look)), limited)
    assert (limited == expected).mean() > 0.5


@pytest.mark.parametrize("sign", ["variety", "shift"])
def test_where_no_cell_is_foreign_no_image_is_a_witness(sign: Sign, tmp_path: Path) -> None:
    settings = replace(SMALL, sign=sign)
    out = write_synthetic_cohort(settings, tmp_path / "c")
    truth = rows(out / "truth.csv")
    assert {row["IS_WITNESS"] for row in truth} == {"0"}
    assert {row["CELL_CLASS"] for row in truth} == {"small_lymphocyte", "large_lymphocyte"}
    assert contents(write_synthetic_cohort(settings, tmp_path / "again")) == contents(out)
    with pytest.raises(CohortError, match=rf"sign \(={sign}\) where witness is asked for"):
        write_synthetic_cohort(SMALL, out)
    images = Cohort.load(out).images[0]
    extents = synthetic.cell_extents(out, images)
    for path, extent in zip(images, extents, strict=True):
        with Image.open(path) as image:
            red = np.asarray(image)[..., 0]
        assert (extent > 0.5)[red <= np.quantile(red, 0.03)].mean() > 0.95  # nuclei


def test_a_cohort_can_have_the_shape_of_the_challenges() -> None:
    settings = SyntheticSettings(
        patients=163,
        tumoral=0.693,
        images=69,
        image_range=(16, 198),
        size_confounding=0.5,
    )
    planned = [patient for patient in plan_patients(settings) if patient.split == "trainset"]
    reactive, tumoral = ([p.images for p in planned if p.label == label] for label in (0, 1))
    assert (len(reactive), len(tumoral)) == (50, 113)
    assert min(reactive + tumoral) in range(16, 24)
    assert max(reactive + tumoral) in range(180, 199)
    assert np.median(reactive + tumoral) == pytest.approx(66, abs=6)
    assert roc_auc_score([p.label for p in planned], [p.images for p in planned]) > 0.7


# --- what is in the way -----------------------------------------------------------------------


def test_a_finished_cohort_is_left_as_it_is(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "render_cell", fail_after(0))
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    write_synthetic_cohort(SMALL, cohort)
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


def test_another_setting_is_named_and_force_replaces(tmp_path: Path) -> None:
    out = write_synthetic_cohort(SMALL, tmp_path / "c")
    other = replace(SMALL, patients=3, difficulty=0.5)
    with pytest.raises(CohortError, match=r"patients \(=5\) where 3 .*difficulty \(=0.3\) where"):
        write_synthetic_cohort(other, out)
    write_synthetic_cohort(other, out, force=True)
    fresh = write_synthetic_cohort(other, tmp_path / "fresh")
    assert contents(out) == contents(fresh)


def test_a_folder_with_other_things_needs_force_which_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CohortError, match=r"holds notes\.txt.*--force"):
        write_synthetic_cohort(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write_synthetic_cohort(SMALL, tmp_path, force=True)
    write_synthetic_cohort(replace(SMALL, seed=5), tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "truth.csv").exists()


@pytest.mark.parametrize("name", ["clinical_annotation.csv", "synthetic.json", "truth.csv"])
def test_force_never_overwrites_a_file_that_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CohortError, match=re.escape(name)):
        write_synthetic_cohort(SMALL, tmp_path, force=True)
    assert contents(tmp_path) == {name: b"{}"}


def test_images_of_others_are_never_mixed_with_ours(tmp_path: Path) -> None:
    out = write_synthetic_cohort(SMALL, tmp_path / "c")
    strange = out / plan_patients(SMALL)[0].folder / "000999.jpg"
    strange.write_bytes(b"real")
    before = contents(out)
    with pytest.raises(CohortError, match=r"000999\.jpg.*does not remove"):
        write_synthetic_cohort(replace(SMALL, seed=1), out, force=True)
    assert contents(out) == before


def test_a_manifest_that_names_files_elsewhere_is_not_trusted(tmp_path: Path) -> None:
    out = write_synthetic_cohort(SMALL, tmp_path / "c")
    victim = tmp_path / "other" / "000000.jpg"
    victim.parent.mkdir()
    victim.write_bytes(b"real")
    manifest = json.loads((out / "synthetic.json").read_text())
    manifest["images"]["trainset/../../other"] = 1
    (out / "synthetic.json").write_text(json.dumps(manifest))
    with pytest.raises(CohortError, match="in its way"):
        write_synthetic_cohort(SMALL, out, force=True)
    assert victim.read_bytes() == b"real"


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("")
    with pytest.raises(CohortError, match="is a file"):
        write_synthetic_cohort(SMALL, path)
    with pytest.raises(OutputError, match=r"cannot be written \(Not a directory\); choose another"):
        write_synthetic_cohort(SMALL, path / "below", force=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patients": 1}, r"patients \(=1\) must be at least 2"),
        ({"tumoral": 0.0}, r"tumoral \(=0\.0\) must lie in \(0, 1\)"),
        ({"witness_share": (0.5, 0.2)}, r"witness_share \(=\(0\.5, 0\.2\)\)"),
        ({"difficulty": 1.5, "images": 0}, r"images \(=0\) .*; difficulty \(=1\.5\)"),
        ({"images": 5, "image_range": (6, 9)}, r"image_range \(=\(6, 9\)\) .*images \(=5\)"),
        ({"sign": "size"}, r"sign \(=size\) must be one of witness, variety, shift"),
        ({"difficulty": float("nan")}, r"difficulty \(=nan\)"),
    ],
)
def test_settings_out_of_range_are_all_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SyntheticSettings(**wrong)


# --- the command ------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["synth", *arguments])


def test_the_command_writes_and_counts(tmp_path: Path) -> None:
    out = str(tmp_path / "c")
    options = ["--out", out, "--patients", "3", "--test-patients", "2", "--images", "2"]
    result = run(*options, "--witness-share", "0.5", "0.5", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    truth = rows(tmp_path / "c" / "truth.csv")
    assert told["reactive"] + told["tumoral"] == 3
    assert told["test_reactive"] + told["test_tumoral"] == 2
    assert told["images"] == len(truth)
    assert told["atypical"] == sum(row["IS_WITNESS"] == "1" for row in truth)
    assert told["truth"] == str(tmp_path / "c" / "truth.csv")
    shown = run(*options, "--witness-share", "0.5", "0.5")
    assert f"{len(truth)} images" in shown.stdout
    other = run(*options, "--seed", "1")
    assert other.exit_code == 2
    assert "seed (=0) where 1 is asked for" in other.stderr


@pytest.mark.seconds
def test_the_plate_shows_a_row_for_each_class(tmp_path: Path) -> None:
    path = tmp_path / "plate.png"
    assert run("--plate", str(path)).exit_code == 0
    with Image.open(path) as image:
        assert image.size == (8 * 224, 3 * (224 + 24))
    first = path.read_bytes()
    again = run("--plate", str(path))
    assert again.exit_code == 2
    assert "exists" in again.stderr
    write_plate(SyntheticSettings(), path, force=True)
    assert path.read_bytes() == first


def test_the_plate_shows_patients_of_both_classes_where_no_cell_is_foreign(tmp_path: Path) -> None:
    path = tmp_path / "plate.png"
    options = ("--sign", "variety", "--patients", "4", "--test-patients", "0")
    assert run("--plate", str(path), *options, "--tumoral-share", "0.5").exit_code == 0
    with Image.open(path) as image:
        assert image.size == (8 * 224, 4 * (224 + 24))


def test_the_command_counts_no_atypical_cells_where_there_are_none(tmp_path: Path) -> None:
    options = ["--patients", "2", "--test-patients", "0", "--sign", "shift"]
    sizes = ["--images", "2", "--image-range", "1", "3"]
    result = run("--out", str(tmp_path / "c"), *options, *sizes)
    assert result.exit_code == 0, result.output
    assert "atypical" not in result.stdout


def test_the_command_needs_something_to_write() -> None:
    result = run()
    assert result.exit_code == 2
    assert "--out" in result.stderr
