"""`lymphfeat rerun`: the same bytes from what a folder holds, or what differs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import lymphfeat as lf
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Plan, read_splits, write_splits
from lymphfeat.features.store import FeatureSet, MapShape
from lymphfeat.features.store_writer import StoreWriter
from lymphfeat.fitting import fit_both, fit_heads, holds_run
from lymphfeat.runtime.differences import compare_files, largest_difference
from lymphfeat.settings import FitSettings, HeadGrid, HeadSettings
from lymphfeat_cli.main import cli
from tests.cohorts import write_bags, write_text
from tests.test_json import validator

PATIENTS, IMAGES = 18, 2
HEADS = [HeadSettings(agg="topk", k_agg=2), HeadSettings(agg="mean")]
SETTINGS = FitSettings(seeds=2, folds=3, epochs=2, threads=1, device="cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cohort, two stores of its images and their truth."""
    root: Path = tmp_path_factory.mktemp("home")
    ids = [f"P{number}" for number in range(PATIENTS)]
    write_bags(root / "cohort", dict.fromkeys(ids, IMAGES))
    rows = [f"{id},{n % 2},{50 + 7 * n % 30},{'ABC'[n // 2 % 3]}" for n, id in enumerate(ids)]
    write_text(root / "cohort" / "patients.csv", "id,label,age,ward", *rows)
    cohort = Cohort.load(root / "cohort")
    for number, name in enumerate(("store.h5", "other.h5")):
        write_maps(root / name, cohort, number)
    names = lf.FeatureStore.open(root / "store.h5").image_names
    lines = [f"{ids[n // IMAGES]},{name},{int(n % 4 == 2)}" for n, name in enumerate(names)]
    write_text(root / "truth.csv", "ID,FILE,IS_WITNESS", *lines)
    return root


def write_maps(path: Path, cohort: Cohort, seed: int) -> None:
    n = PATIENTS * IMAGES
    maps = np.random.default_rng(seed).normal(size=(n, 1, 4, 2, 2)).astype(np.float32)
    maps[IMAGES :: 2 * IMAGES, :, 0] += 3
    with StoreWriter(
        path,
        recipe={"backbone": "none", "seed": seed},
        cohort=cohort,
        shape=MapShape(views=1, channels=4, height=2, width=2),
        feature_sets=[FeatureSet(name="frozen", backbone="none", weights_sha256="0")],
    ) as writer:
        writer.write(0, {"frozen": maps}, np.zeros(n, np.uint32))
        writer.finish()


def plain(home: Path, out: Path) -> None:
    fit_heads(home / "store.h5", HEADS, SETTINGS, out)


def with_everything(home: Path, out: Path) -> None:
    settings = FitSettings(
        seeds=1, folds=3, epochs=2, threads=1, fusions=("late",), attributes=("age",)
    )
    fit_heads(home / "store.h5", HEADS, settings, out, truth=home / "truth.csv", save=True)


def of_groups(home: Path, out: Path) -> None:
    settings = FitSettings(epochs=2, threads=1, groups="ward")
    fit_heads(home / "store.h5", HEADS, settings, out)


def of_two_stores(home: Path, out: Path) -> None:
    stores = [home / "store.h5", home / "other.h5"]
    fit_heads(stores, HeadGrid(agg=("mean+std", "mean@2")), SETTINGS, out)


def of_both_protocols(home: Path, out: Path) -> None:
    fit_both(home / "store.h5", HEADS, SETTINGS, out, save=True)


def of_nested_splits(home: Path, out: Path) -> None:
    store = lf.FeatureStore.open(home / "store.h5")
    labels = dict(zip(store.ids, store.labels.tolist(), strict=True))
    outer = lf.fit_heads(store, agg="mean", settings=SETTINGS).outcome.splits[:3]
    # Not the inner splits that the protocol would make of these.
    plan = Plan.nested(outer[:1], labels, folds=4)
    write_splits([*plan.outer, *plan.inner_once], out.with_suffix(".json"))
    fit_heads(store, HEADS, SETTINGS, out, splits=read_splits(out.with_suffix(".json")))


RUNS = (plain, with_everything, of_groups, of_two_stores, of_both_protocols, of_nested_splits)


@pytest.mark.seconds
@pytest.mark.parametrize("make", RUNS)
def test_a_run_is_repeated_to_the_byte(
    make: Callable[[Path, Path], None], home: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make(home, run)
    if make is of_nested_splits:  # from the folder alone
        run.with_suffix(".json").unlink()
    result = CliRunner().invoke(cli, ["rerun", str(run), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    validator("rerun").validate(told)
    assert told["same"]
    assert not told["changed"]
    names = {each["name"] for each in told["files"] + told["figures"]}
    on_disk = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert names == {name for name in on_disk if not name.endswith("config.json")}
    for name in names:
        assert (run / name).read_bytes() == (tmp_path / "run-again" / name).read_bytes(), name


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    with_everything(home, tmp_path / "run")
    return tmp_path / "run"


def test_what_differs_is_named(run: Path) -> None:
    table = pd.read_csv(run / "predictions.csv")
    table["calibrated"] += 0.125 * (table.index == 3)
    table.to_csv(run / "predictions.csv", index=False, float_format="%.6g")
    heads = load_file(run / "heads.safetensors")
    name = sorted(heads)[0]
    heads[name] = heads[name] + np.float32(0.5)
    save_file(heads, run / "heads.safetensors")
    config = json.loads((run / "config.json").read_text())
    config["computed"]["versions"]["torch"] = "1.0"
    config["computed"]["processor"] = "abacus"
    (run / "config.json").write_text(json.dumps(config))
    (run / "warnings.txt").unlink()
    (run / "notes.txt").write_text("the user's own")

    found = lf.rerun(run)

    assert not found.same
    assert {each.name: each.largest for each in found.different} == {
        "heads.safetensors": pytest.approx(0.5),
        "predictions.csv": pytest.approx(0.125, abs=1e-5),
        "warnings.txt": None,
    }
    where = {each.name: each.where for each in found.different}
    assert where["heads.safetensors"] == name
    assert where["predictions.csv"] == "calibrated"
    assert where["warnings.txt"] == f"missing: {run / 'warnings.txt'}"
    assert any("torch is 1.0 there" in line for line in found.changed)
    assert any("processor is abacus there" in line for line in found.changed)
    result = CliRunner().invoke(cli, ["rerun", str(run), "--force"])
    assert result.exit_code == 1
    assert "3 of 8 files differ" in result.stdout
    assert "calibrated" in result.stdout


def test_other_threads_are_told(run: Path) -> None:
    found = lf.rerun(run, threads=2)
    assert found.changed == ("threads is 1 there, 2 now",)


def test_a_store_and_a_truth_that_moved(run: Path, home: Path, tmp_path: Path) -> None:
    for name in ("store.h5", "truth.csv"):
        shutil.copy(home / name, tmp_path / name)
    config = json.loads((run / "config.json").read_text())
    config["store"]["path"], config["truth"] = "gone.h5", "gone.csv"
    (run / "config.json").write_text(json.dumps(config))
    line = ["rerun", str(run), "--out", str(tmp_path / "out")]
    assert "gone.h5" in refusal(line)
    line += ["--store", str(tmp_path / "store.h5")]
    assert "Say where it is now with --truth" in refusal(line)
    del config["truth"]  # as an earlier version wrote it
    (run / "config.json").write_text(json.dumps(config))
    assert "fitted with --truth, and does not say which" in refusal(line)
    result = CliRunner().invoke(cli, [*line, "--truth", str(tmp_path / "truth.csv")])
    assert result.exit_code == 0, result.output
    other = ["--store", str(home / "other.h5"), "--force"]
    assert "must be the store that" in refusal([*line[:4], *other])


def test_a_run_of_an_earlier_version(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    del config["computed"]
    config["torch"] = "1.0"
    (run / "config.json").write_text(json.dumps(config))
    found = lf.rerun(run)
    assert found.same
    assert len(found.changed) == 1
    assert "versions.torch is 1.0 there" in found.changed[0]


def refusal(line: list[str]) -> str:
    result = CliRunner().invoke(cli, line)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_what_is_refused(
    run: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "must be another path than the run" in refusal(
        ["rerun", str(run), "--out", str(run), "--force"]
    )
    assert "must be a run folder of `lymphfeat fit-head`" in refusal(["rerun", str(home)])
    final = write_text(tmp_path / "others" / "final" / "final.json", "{}").parent
    assert "is made again by the same `lymphfeat finalize`" in refusal(["rerun", str(final)])
    assert "--weights must not go with a run" in refusal(["rerun", str(run), "--weights", "w.pth"])
    (run.parent / "run-again").mkdir()
    write_text(run.parent / "run-again" / "letter.txt", "mine")
    assert "letter.txt, which is not part of one" in refusal(["rerun", str(run), "--force"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in refusal(["rerun", str(run)])
    monkeypatch.delenv("WORLD_SIZE")
    config = json.loads((run / "config.json").read_text())
    config["settings"]["novel"] = 1
    (run / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged" in refusal(["rerun", str(run)])


def test_the_largest_difference() -> None:
    a = {"x": np.array([1.0, np.nan, 3.0]), "text": np.array(["u", "v"], object)}
    assert largest_difference(a, a) == (0.0, "bytes, not values")
    assert largest_difference(a, {**a, "x": np.array([1.5, np.nan, 2.0])}) == (1.0, "x")
    assert largest_difference(a, {**a, "x": np.array([1.0, 2.0, 3.0])}) == (np.inf, "x")
    assert largest_difference(a, {**a, "text": np.array(["u", "w"], object)}) == (None, "text")
    assert largest_difference(a, {**a, "x": np.zeros(2)}) == (None, "x, of shape (3,) and (2,)")
    assert largest_difference(a, {"x": a["x"]}) == (None, "text, which only one has")


def test_files_of_any_kind(tmp_path: Path) -> None:
    for name, first, second, largest in (
        ("a.csv", "id,p\n007,1\n", "id,p\n007,1.25\n", 0.25),
        ("a.json", '[{"a": 1, "b": null}]', '[{"a": 3, "b": null}]', 2.0),
        ("b.json", '{"a": 1}', '{"a": null}', None),
        ("c.json", '{"a": 1}', "{", None),
        ("a.txt", "a", "b", None),
    ):
        write_text(tmp_path / "first" / name, first)
        write_text(tmp_path / "second" / name, second)
        found = compare_files(tmp_path / "first" / name, tmp_path / "second" / name, name)
        assert (found.same, found.largest) == (False, largest), name
        assert found.where


def test_only_the_very_run_that_is_asked_for_is_taken_for_it(home: Path, tmp_path: Path) -> None:
    store, run = home / "store.h5", tmp_path / "run"
    found = fit_heads(store, HEADS, SETTINGS, run, truth=home / "truth.csv")
    truth = home / "truth.csv"
    assert holds_run(run, store, HEADS, SETTINGS, truth=truth)
    assert holds_run(run, store, HEADS, replace(SETTINGS, threads=2), truth=truth)
    assert not holds_run(run, store, HEADS, SETTINGS)
    assert not holds_run(run, store, HEADS, SETTINGS, truth=truth, save=True)
    assert not holds_run(run, store, HEADS[:1], SETTINGS, truth=truth)
    assert not holds_run(run, store, HEADS, replace(SETTINGS, seed=1), truth=truth)
    splits = found.outcome.splits
    assert not holds_run(run, store, HEADS, SETTINGS, truth=truth, splits=splits)
    fit_heads(store, HEADS, SETTINGS, tmp_path / "own", splits=splits)
    assert holds_run(tmp_path / "own", store, HEADS, SETTINGS, splits=splits)
    assert not holds_run(tmp_path / "own", store, HEADS, SETTINGS)

    corrected = tmp_path / "corrected.h5"
    shutil.copy(store, corrected)
    with h5py.File(corrected, "r+") as file:
        file["patients/label"][0] = 1 - file["patients/label"][0]
    assert not holds_run(run, corrected, HEADS, SETTINGS, truth=truth)
    (run / "config.json").write_text("[]", encoding="utf-8")
    assert not holds_run(run, store, HEADS, SETTINGS, truth=truth)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("splits.json", "{}"),
        ("summary.json", "[]"),
        ("config.json", '{"store": "x"}'),
        ("config.json", '{"computed": {"versions": null}}'),
    ],
)
def test_a_damaged_run_is_one_line(name: str, content: str, run: Path) -> None:
    if name == "config.json":
        whole = json.loads((run / name).read_text())
        content = json.dumps(whole | json.loads(content))
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(lf.SettingsError, match=r"is damaged \(.*\); fit the run again"):
        lf.rerun(run)
