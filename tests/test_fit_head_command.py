"""`lymphfeat fit-head` as a user runs it, on a store written by the library."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.features.store import FeatureSet, FeatureStore, MapShape
from lymphfeat.features.store_writer import StoreWriter
from lymphfeat_cli.main import cli
from tests.cohorts import write_bags, write_text
from tests.folders import contents
from tests.rounding import score_tolerance
from tests.tiny import BACKBONE, write_cohort_with_a_copy

PATIENTS, IMAGES = 24, 3
WITNESS_SHIFT = 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of blank images, and a store in which each tumoral patient's first image differs."""
    root: Path = tmp_path_factory.mktemp("cohort")
    ids = [f"P{i}" for i in range(PATIENTS)]
    write_bags(root, dict.fromkeys(ids, IMAGES))
    rows = [f"{patient},{i % 2 if i < 22 else -1}" for i, patient in enumerate(ids)]
    write_text(root / "patients.csv", "id,label", *rows)
    cohort = Cohort.load(root)
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(PATIENTS * IMAGES, 1, 6, 2, 2)).astype(np.float32)
    maps[IMAGES :: 2 * IMAGES, :, 0] += WITNESS_SHIFT
    with StoreWriter(
        root / "features.h5",
        recipe={"backbone": "none"},
        cohort=cohort,
        shape=MapShape(views=1, channels=6, height=2, width=2),
        feature_sets=[FeatureSet(name="frozen", backbone="none", weights_sha256="0")],
    ) as writer:
        writer.write(0, {"frozen": maps}, np.zeros(len(maps), np.uint32))
        writer.finish()
    store = FeatureStore.open(root / "features.h5")
    lines = [
        f"{patient},{name},{int(i % 2 == 1 and image == 0)}"
        for i, patient in enumerate(ids)
        for image, name in enumerate(store.image_names[i * IMAGES : (i + 1) * IMAGES])
    ]
    write_text(root / "truth.csv", "ID,FILE,IS_WITNESS", *lines)
    return root


def run(folder: Path, *arguments: str) -> Result:
    store = str(folder / "features.h5")
    return CliRunner().invoke(cli, ["fit-head", "--store", store, "--threads", "1", *arguments])


@pytest.mark.seconds
@pytest.mark.parametrize("protocol", ["honest", "report"])
def test_all_heads_under_both_protocols(folder: Path, tmp_path: Path, protocol: str) -> None:
    out = tmp_path / "run"
    result = run(
        folder,
        *(
            "--agg",
            "ranking",
            "--agg",
            "weighted",
            "--seeds",
            "2",
            "--folds",
            "3",
            "--epochs",
            "12",
            "--lr",
            "0.1",
        ),
        *("--batch-size", "4", "--protocol", protocol, "--out", str(out), "--save"),
        *("--truth", str(folder / "truth.csv")),
    )
    assert result.exit_code == 0, result.output
    assert f"{protocol} protocol" in result.output
    assert ("± uncorrected" in result.output) == (protocol == "report")
    table = pd.DataFrame(json.loads((out / "summary.json").read_text())).set_index("head")
    baselines = table[table["kind"] == "baseline"]
    assert baselines.index.tolist() == table.index[-2:].tolist() == ["majority", "bag size"]
    assert "baseline: bag size" in result.output
    if protocol == "honest":  # every patient has three images
        assert "not beat bag size" not in result.output
    summary = table[table["kind"] == "head"]
    assert len(summary) == 9
    assert summary["ba"].is_monotonic_decreasing
    assert summary["witness_auc"].max() > 0.9
    runs = 2 if protocol == "report" else 6
    epochs = pd.read_csv(out / "epochs.csv")
    assert len(epochs) == 9 * runs * 12
    predictions = pd.read_csv(out / "predictions.csv")
    called = predictions["probability"] > predictions["threshold"]
    assert (called == predictions["predicted"]).all()
    assert len(load_file(out / "heads.safetensors")) == runs * (9 * 2 + 4)
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((out / "splits.json").read_text())) == runs


def test_networks(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(
        folder,
        *("--agg", "network", "--width", "4", "--seeds", "1", "--epochs", "2", "--save"),
        *("--protocol", "report", "--truth", str(folder / "truth.csv"), "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    summary = pd.DataFrame(json.loads((out / "summary.json").read_text()))
    networks = summary[summary["head"].str.contains("width=4")]
    assert networks["witness_auc"].between(0, 1).sum() == 4
    saved = load_file(out / "heads.safetensors")
    attention = "attention width=4/report-s0/"
    assert saved[f"{attention}network.hidden.weight"].shape == (4, 6)
    assert saved[f"{attention}mean"].shape == (6,)


def test_a_grid_is_one_call(folder: Path, tmp_path: Path) -> None:
    result = run(
        folder,
        *("--agg", "topk", "--agg", "mean", "--k-agg", "1,2", "--lr", "0.01,0.1", "--json"),
        *("--seeds", "1", "--folds", "3", "--epochs", "2", "--out", str(tmp_path / "run")),
        *("--solver", "adam"),
    )
    assert result.exit_code == 0, result.output
    kinds = {row["head"]: row["kind"] for row in json.loads(result.stdout)["summary"]}
    assert {name for name, kind in kinds.items() if kind == "head"} == {
        f"{name} lr={lr}" for name in ("top1", "top2", "mean") for lr in ("0.01", "0.1")
    }
    assert {name for name, kind in kinds.items() if kind == "selected"} == {
        "top1, best of 2 chosen inside",
        "topk, best of 2 chosen inside",
        "mean, best of 2 chosen inside",
        "any head, best of 6 chosen inside",
    }


def test_several_values_may_stand_in_the_configuration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(
        tmp_path / "lymphfeat.toml",
        "[fit-head]",
        'agg = ["topk", "mean"]',
        'solver = "adam"',
        "k-agg = [1, 2]",
        'lr = "0.1, 0.2"',
        "weight-decay = 0.5",
    )
    store = ["--store", str(folder / "features.h5"), "--threads", "1", "--json"]
    few = ["--seeds", "1", "--folds", "3", "--epochs", "1"]
    result = CliRunner().invoke(cli, ["fit-head", *store, *few])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)["summary"]
    heads = {row["head"] for row in summary if row["kind"] == "head"}
    assert len(heads) == 6
    assert "top2 lr=0.2 weight_decay=0.5" in heads


def test_drawn_images_and_class_weights(folder: Path, tmp_path: Path) -> None:
    result = run(
        folder,
        *("--images-per-patient", "2", "--class-weights", "none,balanced", "--tta", "--json"),
        *("--seeds", "1", "--folds", "3", "--epochs", "2", "--out", str(tmp_path / "run")),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)["summary"]
    heads = {row["head"] for row in summary if row["kind"] == "head"}
    assert heads == {"top10", "top10 class_weights=balanced"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["images_per_patient"] == 2


def test_same_seed_same_tables(folder: Path, tmp_path: Path) -> None:
    tables = []
    for name in ("one", "two"):
        arguments = ("--agg", "bnsigmoid", "--seeds", "1", "--folds", "3", "--epochs", "3")
        assert run(folder, *arguments, "--out", str(tmp_path / name)).exit_code == 0
        tables.append((tmp_path / name / "epochs.csv").read_bytes())
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agg", "median"], "agg (=median) must be one of top1, topk"),
        (["--k-percent", "140"], "k_percent (=140.0) must lie in (0, 100]"),
        (["--k-agg", "0"], "k_agg (=0) must be at least 1"),
        (
            ["--agg", "mean", "--k-agg", "5"],
            "k_agg (=5) must be used by one of the heads; got mean",
        ),
        (["--views", "2"], "views (=2) must be at most the 1 of"),
        (["--folds", "20"], "labelled reactive patients (=11) must be at least 20"),
        (["--lr", "a,b"], "must be numbers, separated by commas"),
        (["--store", "nowhere.h5"], "store (=nowhere.h5) must be an existing file"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(folder, "--out", str(tmp_path / "run"), *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten_without_force(folder: Path, tmp_path: Path) -> None:
    arguments = ("--agg", "mean", "--seeds", "1", "--folds", "3", "--epochs", "1")
    out = ("--out", str(tmp_path / "run"))
    assert run(folder, *arguments, *out).exit_code == 0
    before = (tmp_path / "run" / "config.json").stat().st_mtime_ns
    refused = run(folder, *arguments, *out)
    assert refused.exit_code == 2
    assert "already holds a run; choose another --out or use --force" in refused.output
    assert (tmp_path / "run" / "config.json").stat().st_mtime_ns == before
    assert run(folder, *arguments, *out, "--force").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    foreign = run(folder, *arguments, "--out", str(tmp_path / "mine"), "--force")
    assert "must be a new folder or a run; it holds notes.txt" in foreign.output
    (tmp_path / "run" / "notes.txt").write_text("keep")
    mixed = run(folder, *arguments, *out, "--force")
    assert mixed.exit_code == 2
    assert "it holds notes.txt, which is not part of one" in mixed.output
    assert (tmp_path / "run" / "notes.txt").read_text() == "keep"


FAST = ("--agg", "mean", "--seeds", "1", "--folds", "3", "--epochs", "1")


def listed(result: Result) -> set[str]:
    """Return the files that the command says it wrote."""
    assert result.exit_code == 0, result.output
    return set(json.loads(result.stdout)["files"])


@pytest.mark.seconds
@pytest.mark.parametrize("options", [(), ("--save",), ("--protocol", "both", "--save")])
def test_what_is_listed_is_what_is_there(
    folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    told = listed(run(folder, *FAST, *options, "--out", str(out), "--json"))
    assert told == {f"{out}/{name}" for name in contents(out)}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    shown = run(folder, *FAST, *options, "--out", str(out), "--force")
    assert all(name in shown.stdout for name in told)


@pytest.mark.seconds
def test_nothing_of_an_earlier_run_is_left(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = run(folder, *FAST, "--out", str(out), "--protocol", "both", "--json")
    assert listed(both) == {f"{out}/{name}" for name in contents(out)}
    again = run(folder, *FAST, "--out", str(out))
    assert (again.exit_code, "run already holds a run; choose" in again.stderr) == (2, True)
    saved = run(folder, *FAST, "--out", str(out), "--force", "--save", "--json")
    assert listed(saved) == {f"{out}/{name}" for name in contents(out)}
    assert not (out / "report").exists()
    assert (out / "heads.safetensors").exists()
    assert run(folder, *FAST, "--out", str(out), "--force").exit_code == 0
    assert not (out / "heads.safetensors").exists()


@pytest.mark.seconds
def test_a_crash_while_rewriting_leaves_the_old_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    line = (*FAST, "--out", str(out), "--force")
    assert run(folder, *line, "--protocol", "both").exit_code == 0
    before = contents(out)

    def crash(*arguments: object) -> None:
        raise OSError("no space left on device")

    for name in ("summary", "optimism"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lymphfeat.plots.{name}.draw_{name}", crash)
            crashed = run(folder, *line, "--protocol", "both", "--seed", "1")
        assert crashed.exit_code == 1
        assert contents(out) == before


KILLED_BETWEEN_THE_RENAMES = """
import os
from lymphfeat_cli.main import cli
from tests.self_kill import kill_at

def counts(event, arguments):
    return event == "os.rename" and os.path.abspath(arguments[1]) == os.environ["OUT"]

kill_at(1, counts)
cli()
"""


@pytest.mark.seconds
def test_killed_between_the_renames(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = (*FAST, "--out", str(out))
    assert run(folder, *line).exit_code == 0
    arguments = ["fit-head", "--store", str(folder / "features.h5"), "--threads", "1", *line]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_BETWEEN_THE_RENAMES, *arguments, "--force", "--seed", "7"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OUT": str(out)},
        timeout=240,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()  # the worst moment: neither is in its place
    told = CliRunner().invoke(cli, ["info", str(out), "--json"])
    assert told.exit_code == 0, told.output
    described = json.loads(told.stdout)
    assert (described["whole"], described["settings"]["seed"]) == (True, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_truth_without_a_witness_adds_no_column(folder: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth.csv"
    truth.write_text(re.sub("1$", "0", (folder / "truth.csv").read_text(), flags=re.MULTILINE))
    result = run(
        folder,
        *("--agg", "mean", "--truth", str(truth), "--json", "--out", str(tmp_path / "run")),
        *("--seeds", "1", "--folds", "3", "--epochs", "1"),
    )
    assert result.exit_code == 0, result.output
    assert "witness_auc" not in result.stdout


def test_truth_of_another_cohort_is_refused(folder: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth.csv"
    write_text(truth, "ID,FILE,IS_WITNESS", "P0,elsewhere.png,1")
    result = run(folder, "--truth", str(truth), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "must name every image" in result.output


@pytest.mark.seconds
def test_splits_of_another_run_are_taken_and_give_the_same_figures(
    folder: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    common = ("--agg", "mean", "--epochs", "2")
    assert run(folder, *common, "--seeds", "2", "--folds", "3", "--out", str(first)).exit_code == 0
    again = run(folder, *common, "--splits", str(first / "splits.json"), "--out", str(second))
    assert again.exit_code == 0, again.output
    assert (first / "runs.csv").read_bytes() == (second / "runs.csv").read_bytes()
    compared = CliRunner().invoke(
        cli, ["compare", str(first), str(second), "--out", str(tmp_path / "figure.png")]
    )
    assert "do not differ significantly (p 1)" in compared.output
    foreign = tmp_path / "foreign.json"
    foreign.write_text((first / "splits.json").read_text().replace('"P4"', '"P44"'))
    refused = run(folder, *common, "--splits", str(foreign), "--out", str(tmp_path / "third"))
    assert refused.exit_code == 2
    assert "must name patients of this cohort; got P44" in refused.output


def test_the_table_says_where_bfloat16_differs(folder: Path, tmp_path: Path) -> None:
    few = ("--seeds", "2", "--epochs", "2", "--protocol", "report", "--precision", "bfloat16")
    result = run(folder, *few, "--save", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "p shift by bfloat16" in result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (change,) = [row["bfloat16_change"] for row in summary if row["head"] == "top10"]
    # top10 counts images; a mean of the highest probabilities moves by at most a quarter of what
    # the logits do.
    images = FeatureStore.open(folder / "features.h5").pooled()[:, 0]  # (N, C)
    weights = load_file(tmp_path / "run" / "heads.safetensors")
    moved = [
        score_tolerance(images, values).max()
        for name, values in weights.items()
        if re.fullmatch("top10/.*/weight", name)
    ]
    assert len(moved) == 2
    assert 0 < change <= max(moved) / 4 + 1e-6


@pytest.mark.seconds
def test_two_processes_share_the_heads(folder: Path, tmp_path: Path) -> None:
    arguments = ["fit-head", "--store", str(folder / "features.h5"), "--threads", "1"]
    arguments += ["--agg", "mean", "--agg", "topk", "--agg", "attention", "--width", "4"]
    arguments += ["--seeds", "1", "--epochs", "2", "--folds", "3", "--save"]
    alone = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "alone")])
    assert alone.exit_code == 0, alone.output
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "-m", "lymphfeat_cli"]
    together = subprocess.run(
        [*launcher, *arguments, "--out", str(tmp_path / "together")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("honest protocol") == 1
    one, two = (load_file(tmp_path / name / "heads.safetensors") for name in ("alone", "together"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, atol=1e-5)
    for name in ("epochs.csv", "predictions.csv"):
        tables = [pd.read_csv(tmp_path / run / name) for run in ("alone", "together")]
        pd.testing.assert_frame_equal(tables[0], tables[1], atol=1e-4)


@pytest.mark.seconds
def test_both_protocols_and_their_difference(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("--agg", "max", "--seeds", "2", "--folds", "3", "--epochs", "3")
    result = run(folder, *arguments, "--protocol", "both", "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    row = next(row for row in told["optimism"] if row["head"] == "max")
    report = next(r["ba"] for r in told["report"] if r["head"] == "max")
    honest = next(r["ba"] for r in told["summary"] if r["head"] == "max")
    assert row["optimism"] == pytest.approx(report - honest)
    assert -1 <= row["optimism_low"] < row["optimism_high"] <= 1
    assert (out / "optimism.png").read_bytes().startswith(b"\x89PNG")
    for protocol in ("report", "honest"):
        config = json.loads((out / protocol / "config.json").read_text())
        assert config["settings"]["protocol"] == protocol


def test_an_image_in_patients_of_both_sides(tmp_path: Path) -> None:
    root = write_cohort_with_a_copy(tmp_path / "c")
    store = str(tmp_path / "s.h5")
    backbone = ["--backbone", BACKBONE.backbone, "--crop", str(BACKBONE.crop), "--device", "cpu"]
    backbone += ["--precision", "float32"]
    made = CliRunner().invoke(cli, ["extract", "--cohort", str(root), "--out", store, *backbone])
    assert made.exit_code == 0, made.output
    line = ["fit-head", "--store", store, "--agg", "mean", "--seeds", "1", "--epochs", "1"]
    line += ["--out", str(tmp_path / "run")]
    refused = CliRunner().invoke(cli, line)
    assert refused.exit_code == 2, refused.output
    assert "got 1.png of P1 = 0.png of P8, on both sides of split" in refused.stderr
    assert "--allow-shared-images" in refused.stderr
    allowed = CliRunner().invoke(cli, [*line, "--allow-shared-images"])
    assert allowed.exit_code == 0, allowed.output
