"""The audit finds what was planted, and nothing in a clean cohort."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lymphfeat import auditing
from lymphfeat.auditing import Audit
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.shortcuts import Predictor, delong_auc
from lymphfeat_cli.main import cli
from tests.cohorts import write_challenge, write_image, write_own

CROP = 12


def audit(root: Path, crop: int = CROP) -> Audit:
    return auditing.audit(Cohort.load(root), crop=crop)


def find(result: Audit, name: str) -> Predictor:
    return next(predictor for predictor in result.predictors if predictor.name == name)


def write_pair(root: Path) -> Path:
    """Write a reactive, a tumoral and an unlabelled patient, with two images each."""
    return write_own(root, "id,label", "a,0", "b,1", "c,-1")


# --- counts -----------------------------------------------------------------------------------


def test_a_clean_cohort_has_counts_and_no_finding(tmp_path: Path) -> None:
    result = audit(write_challenge(tmp_path, suffix=".png"))
    told = [(g.split, g.label, g.patients, g.images) for g in result.groups]
    assert told == [("test", -1, 3, 7), ("train", 0, 2, 4), ("train", 1, 2, 4)]
    assert [(g.fewest, g.median, g.most) for g in result.groups] == [
        (1, 2, 4),
        (1, 2, 3),
        (2, 2, 2),
    ]
    assert result.formats == {"PNG RGB": 15}
    assert result.sizes == {"16x16": 15}
    assert result.findings == ()
    assert result.verdict == "nothing to fix in 7 patients, 15 images"
    assert len(result.quirks) > 3
    ranges = {attribute.name: attribute for attribute in result.attributes}
    assert ranges["gender"].counts == {"F": 4, "M": 2}
    assert [ranges[name].missing for name in ("gender", "age", "lymph_count")] == [1, 1, 1]
    count = ranges["lymph_count"]
    assert (count.minimum, count.median, count.maximum) == (2.28, 8.5, 295)


def test_formats_and_sizes_are_counted(tmp_path: Path) -> None:
    write_pair(tmp_path)
    Image.new("L", (20, 30)).save(tmp_path / "a" / "grey.bmp")
    Image.new("RGB", (16, 16)).save(
        tmp_path / "b" / "stack.tif",
        save_all=True,
        append_images=[Image.new("RGB", (16, 16), "red")],
    )
    result = audit(tmp_path)
    assert result.formats == {
        "PNG RGB": 6,
        "BMP L": 1,
        "TIFF RGB (2 frames, only the first is used)": 1,
    }
    assert result.sizes == {"16x16": 7, "20x30": 1}


def test_images_that_make_the_decoder_warn_are_read(tmp_path: Path) -> None:
    write_pair(tmp_path)
    palette = Image.new("P", (16, 16), 3)
    palette.putpalette([7] * 768)
    palette.save(tmp_path / "a" / "palette.png", transparency=b"\x00\x40\x80\xff")
    with (
        Image.open(tmp_path / "a" / "palette.png") as image,
        pytest.warns(UserWarning, match="(?i)transparency"),
    ):
        image.convert("RGB")
    result = audit(tmp_path)
    assert (result.unreadable, result.formats["PNG P"]) == ((), 1)


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_truncated_images_are_named(tmp_path: Path, suffix: str) -> None:
    write_pair(tmp_path)
    whole = write_image(tmp_path / "a" / f"whole{suffix}", 77, side=32)
    (tmp_path / "a" / f"cut{suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    result = audit(tmp_path)
    assert [(fault.patient, fault.path) for fault in result.unreadable] == [("a", f"a/cut{suffix}")]
    assert result.unreadable[0].reason
    assert result.findings == ("broken: 1 unreadable image(s); restore or remove them",)


def test_truncated_images_are_refused_whatever_the_process_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    write_pair(tmp_path)
    whole = write_image(tmp_path / "a" / "whole.jpg", 77, side=32)
    whole.write_bytes(whole.read_bytes()[:-200])
    assert len(audit(tmp_path).unreadable) == 1
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # as it was


def test_why_an_image_cannot_be_read(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "text.jpg").write_bytes(b"<html>not found</html>")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.fromarray(np.ones((16, 16), dtype=np.uint16)).save(tmp_path / "a" / "deep.tif")
    reasons = {fault.path: fault.reason for fault in audit(tmp_path).unreadable}
    assert list(reasons) == ["a/deep.tif", "a/empty.png", "a/gone.png", "a/text.jpg"]
    assert "8 bits per channel" in reasons["a/deep.tif"]
    assert reasons["a/empty.png"] == "the file is empty"
    assert reasons["a/gone.png"] == "No such file or directory"
    assert reasons["a/text.jpg"] == "not an image of any known format"


@pytest.mark.seconds
@given(st.data())
def test_no_damage_stops_the_audit(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    suffix = data.draw(st.sampled_from([".png", ".jpg", ".bmp", ".tif"]))
    root = write_own(tmp_path_factory.mktemp("cohort"), "id,label", "a,1", bags={})
    content = bytearray(write_image(root / "a" / f"x{suffix}", 1).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (root / "a" / f"x{suffix}").write_bytes(
        bytes(content[: data.draw(st.integers(0, len(content)))])
    )
    result = audit(root)
    assert len(result.unreadable) + sum(result.formats.values()) == 1


def test_images_smaller_than_the_crop_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    Image.new("RGB", (CROP, CROP), "red").save(tmp_path / "b" / "just.png")
    Image.new("RGB", (40, CROP - 1)).save(tmp_path / "b" / "flat.png")
    result = audit(tmp_path)
    assert [(f.patient, f.path, f.reason) for f in result.too_small] == [
        ("b", "b/flat.png", f"40x{CROP - 1}")
    ]
    assert result.findings == (
        f"broken: 1 image(s) smaller than the crop (={CROP}); restore them or choose a "
        "smaller crop",
    )


def test_the_crop_must_be_a_pixel(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="crop"):
        audit(write_pair(tmp_path), crop=0)


# --- copies -----------------------------------------------------------------------------------


def test_copies_are_found_by_pixels_whatever_the_format(tmp_path: Path) -> None:
    write_pair(tmp_path)
    with Image.open(tmp_path / "a" / "000000.png") as image:
        image.save(tmp_path / "b" / "copy.bmp")
    result = audit(tmp_path)
    assert result.repeated == ()
    (shared,) = result.shared
    assert (shared.patients, shared.labels, shared.images) == (("a", "b"), (0, 1), 1)
    assert shared.example == ("a/000000.png", "b/copy.bmp")
    assert result.findings == (
        "leak: 1 image(s) shared by different patients (2 of them)",
        "contradiction: 1 of them shared by reactive and tumoral patients",
    )


def test_copies_between_labelled_and_unlabelled_patients_are_a_leak_of_their_own(
    tmp_path: Path,
) -> None:
    write_pair(tmp_path)
    for name in ("000000.png", "000001.png"):
        shutil.copy(tmp_path / "b" / name, tmp_path / "c" / f"copy{name}")
    result = audit(tmp_path)
    assert [(s.patients, s.images) for s in result.shared] == [(("b", "c"), 2)]
    assert "leak: 2 of them shared by labelled and unlabelled patients" in result.findings
    assert not any("contradiction" in finding for finding in result.findings)


def test_repeats_within_a_patient_are_no_leak(tmp_path: Path) -> None:
    write_pair(tmp_path)
    for name in ("x.png", "y.png"):
        shutil.copy(tmp_path / "a" / "000001.png", tmp_path / "a" / name)
    result = audit(tmp_path)
    assert result.shared == ()
    (repeated,) = result.repeated
    assert (repeated.patients, repeated.images) == (("a",), 1)
    assert repeated.example == ("a/000001.png", "a/x.png", "a/y.png")


def test_the_same_bytes_in_another_shape_are_no_copy(tmp_path: Path) -> None:
    write_pair(tmp_path)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a" / "tall.png")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "b" / "wide.png")
    assert audit(tmp_path).shared == ()


# --- what predicts the label ------------------------------------------------------------------


def slow_auc(scores: list[float], labels: list[int]) -> tuple[float, float]:
    """DeLong, DeLong & Clarke-Pearson 1988, equations 4 to 8, pair by pair."""
    positive = [s for s, y in zip(scores, labels, strict=True) if y == 1]
    negative = [s for s, y in zip(scores, labels, strict=True) if y == 0]
    psi = {(i, j): 1.0 if x > y else 0.5 if x == y else 0.0
           for (i, x), (j, y) in product(enumerate(positive), enumerate(negative))}  # fmt: skip
    m, n = len(positive), len(negative)
    auc = sum(psi.values()) / (m * n)
    v10 = [sum(psi[i, j] for j in range(n)) / n for i in range(m)]
    v01 = [sum(psi[i, j] for i in range(m)) / m for j in range(n)]
    s10 = sum((v - auc) ** 2 for v in v10) / (m - 1)
    s01 = sum((v - auc) ** 2 for v in v01) / (n - 1)
    return auc, (s10 / m + s01 / n) ** 0.5


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), max_size=30))
def test_delong_agrees_with_the_slow_reference(pairs: list[tuple[int, int]]) -> None:
    pairs += [(3, 0), (5, 0), (4, 1), (4, 1)]  # two of each class at least
    scores, labels = [float(s) for s, _ in pairs], [y for _, y in pairs]
    fast = delong_auc(np.array(scores), np.array(labels))
    assert fast == pytest.approx(slow_auc(scores, labels), abs=1e-12)


def write_patients(root: Path, rows: list[tuple[int, str]], column: str, images: list[int]) -> Path:
    """Write labelled patients with one attribute, and as many images as told."""
    lines = [f"P{k},{label},{value}" for k, (label, value) in enumerate(rows)]
    bags = {f"P{k}": count for k, count in enumerate(images)}
    return write_own(root, f"id,label,{column}", *lines, bags=bags)


def test_bag_size_that_gives_the_label_is_a_shortcut(tmp_path: Path) -> None:
    rows = [(k % 2, str(k // 2)) for k in range(20)]
    sizes = [3 if k % 2 else 1 for k in range(18)] + [3, 1]  # one patient of each class contrary
    result = audit(write_patients(tmp_path, rows, "x", sizes))
    bag, x = find(result, "bag size"), find(result, "x")
    assert bag.auc == pytest.approx(0.9)
    assert (bag.tumoral_is, bag.patients) == ("higher", 20)
    auc, error = slow_auc([float(size) for size in sizes], [label for label, _ in rows])
    assert (bag.low, bag.high) == pytest.approx((auc - 1.959964 * error, 1.0), abs=1e-6)
    assert x.auc == 0.5
    assert [finding[:30] for finding in result.findings] == ["shortcut: bag size alone predi"]


def test_orientation_is_told_and_missing_values_are_left_out(tmp_path: Path) -> None:
    rows = [(1, "1"), (1, "2"), (1, ""), (0, "2"), (0, "3"), (0, "9"), (-1, "0")]
    result = audit(write_patients(tmp_path, rows, "x", [1] * 7))
    x, given_ = find(result, "x"), find(result, "x given or not")
    assert (x.tumoral_is, x.patients) == ("lower", 5)
    assert (given_.role, given_.patients) == ("missing", 6)
    assert [x.auc, given_.auc] == pytest.approx([5.5 / 6, 4 / 6])
    assert all(predictor.name != "bag size" for predictor in result.predictors)  # all the same


def test_a_category_is_measured_by_its_best_value(tmp_path: Path) -> None:
    rows = [(1, "A"), (1, "A"), (1, "B"), (1, "C"), (0, "B"), (0, "C"), (0, "C"), (0, "C")]
    site = find(audit(write_patients(tmp_path, rows, "site", [1] * 8)), "site")
    # A: sensitivity 2/4, specificity 4/4; C: 1/4 and 1/4, the same balanced accuracy when turned
    assert (site.category, site.tumoral_is) == ("A", "in")
    assert site.auc == pytest.approx(0.75)


def test_an_attribute_that_is_the_label_is_a_leak(tmp_path: Path) -> None:
    rows = [(k % 2, "yes" if k % 2 else "no") for k in range(200)]
    root = write_patients(tmp_path, rows, "treated", [1] * 200)
    result = audit(root)
    treated = find(result, "treated")
    assert (treated.auc, treated.high) == (1, 1)
    assert treated.low == pytest.approx(0.025 ** (1 / 100))  # not 1: 200 patients prove no more
    assert result.findings[0].startswith(
        "leak: treated alone almost determines the label (AUC 1.00"
    )


def test_how_images_are_stored_can_be_a_shortcut(tmp_path: Path) -> None:
    rows = [(k % 2, "") for k in range(16)]
    write_patients(tmp_path, rows, "x", [0] * 16)
    for k in range(16):
        write_image(tmp_path / f"P{k}" / ("a.png" if k % 2 else "a.bmp"), k)
    result = audit(tmp_path)
    storage = find(result, "image format")
    assert (storage.role, storage.auc) == ("storage", 1)
    assert result.findings[0].startswith("shortcut: image format alone predicts the label")


def test_one_class_alone_predicts_nothing(tmp_path: Path) -> None:
    assert audit(write_patients(tmp_path, [(1, "2"), (1, "3")], "x", [1, 2])).predictors == ()


def test_one_patient_in_a_class_has_no_interval(tmp_path: Path) -> None:
    result = audit(write_patients(tmp_path, [(1, "2"), (0, "3"), (0, "1")], "x", [1, 1, 1]))
    assert find(result, "x").auc == 0.5
    assert np.isnan([find(result, "x").low, find(result, "x").high]).all()
    parted = audit(write_patients(tmp_path / "2", [(1, "9"), (0, "3"), (0, "1")], "x", [1, 1, 1]))
    assert np.isnan([find(parted, "x").low, find(parted, "x").high]).all()
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["predictors"][0]["low"] is None


# --- the command ------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


def test_command_prints_tables_findings_and_a_verdict(tmp_path: Path) -> None:
    write_challenge(tmp_path, suffix=".png")
    shutil.copy(tmp_path / "testset" / "P3" / "000000.png", tmp_path / "testset" / "P11" / "x.png")
    (tmp_path / "testset" / "P3" / "bad.jpg").write_bytes(b"")
    result = run("--cohort", tmp_path, "--crop", CROP)
    assert result.exit_code == 0
    assert "P3 (-1), P11 (-1): 1 image(s), e.g. testset/P3/000000.png = testset/P11/x.png" in (
        result.stdout
    )
    assert "testset/P3/bad.jpg: the file is empty" in result.stdout
    assert "lymph_count" in result.stdout
    assert result.stdout.rstrip().endswith("Verdict: 2 findings, listed above.")
    assert result.stderr == ""


def test_command_prints_json_and_writes_it(tmp_path: Path) -> None:
    write_challenge(tmp_path / "cohort", suffix=".png")
    out = tmp_path / "audit.json"
    options = ("--cohort", tmp_path / "cohort", "--crop", CROP, "--json", "-q", "--out", out)
    result = run(*options)
    assert result.exit_code == 0
    told: dict[str, Any] = json.loads(result.stdout)
    assert told == json.loads(out.read_text())
    assert told["patients"] == 7
    assert told["findings"] == []
    assert [path.name for path in tmp_path.iterdir() if path.name != "cohort"] == ["audit.json"]
    refused = run(*options)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert run(*options, "--force").exit_code == 0


def test_square_brackets_in_names_are_shown(tmp_path: Path) -> None:
    lines = [f"[b]{k},{k % 2},[red]x{k % 3}" for k in range(6)]
    write_own(tmp_path, "id,label,[i]site", *lines)
    out = run("--cohort", tmp_path, "--crop", CROP).stdout
    assert "[red]x0 2" in out
    assert "[i]site" in out


@pytest.mark.parametrize("arguments", [("--cohort", "nowhere"), ("--crop", "0"), ("--table", "x")])
def test_unusable_input_is_exit_2_in_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run("--cohort", write_pair(tmp_path), *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("Error: ")


def test_missing_images_are_an_error_unless_allowed(tmp_path: Path) -> None:
    write_pair(tmp_path)
    shutil.rmtree(tmp_path / "b")
    refused = run("--cohort", tmp_path)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "1 patient(s) without images: b" in refused.stderr
    allowed = run("--cohort", tmp_path, "--allow-missing", "--crop", CROP)
    assert allowed.exit_code == 0
    assert "left out 1 patient(s) without images: b" in allowed.stdout


def test_the_reference_date_reaches_the_ages(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label,dob", "a,0,1/1/1950", "b,1,01-01-1950")
    result = run("--cohort", tmp_path, "--reference-date", "1960-01-01", "--json")
    (age,) = json.loads(result.stdout)["attributes"]
    assert age["median"] == pytest.approx(10, abs=0.01)


def test_help_has_an_example() -> None:
    assert re.search(r"Example:\s+lymphfeat audit --cohort", run("--help").stdout)
