"""`lymphfeat compare` on runs written to disk, against direct computation."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from lymphfeat.cohort.splits import kfold_splits, write_splits
from lymphfeat.evaluation.intervals import estimate, holm
from lymphfeat_cli.main import cli
from tests.folders import interrupt_swap

IDS = [f"P{i}" for i in range(30)]
LABELS = np.array([0, 1] * 15)


def write_run(
    folder: Path,
    gains: dict[str, float],
    *,
    seed: int = 0,
    protocol: str = "honest",
    folds: int | None = None,
    **columns: float,
) -> pd.DataFrame:
    """Write what `compare` reads of a run: heads whose BA is a common noise plus a gain."""
    folder.mkdir()
    splits = [
        s for repeat in kfold_splits(IDS, LABELS, folds=3, seeds=2, seed=seed) for s in repeat.outer
    ][:folds]
    rng = np.random.default_rng(5)
    common = rng.normal(0.7, 0.05, len(splits))
    frames = [
        pd.DataFrame(
            {
                "head": head,
                "split": [split.id for split in splits],
                "ba": common + gain + rng.normal(0, 0.005, len(splits)),
                "auc": common,
            }
        )
        for head, gain in gains.items()
    ]
    runs = pd.concat(frames, ignore_index=True).assign(**columns)
    runs["kind"] = np.where(runs["head"] == "bag size", "baseline", "head")
    runs.to_csv(folder / "runs.csv", index=False)
    write_splits(splits, folder / "splits.json")
    config = {"format": "lymphfeat-run", "settings": {"protocol": protocol}}
    (folder / "config.json").write_text(json.dumps(config))
    pd.DataFrame({"patient": IDS, "label": LABELS}).to_csv(folder / "predictions.csv")
    return runs


def compare(tmp_path: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(
        cli, ["compare", "--out", str(tmp_path / "figure.png"), *map(str, arguments)]
    )


def test_differences_are_paired_corrected_and_drawn(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "a", {"mean": 0.0, "top10": 0.1, "max": 0.0})
    result = compare(tmp_path, tmp_path / "a", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    ba = runs.pivot(index="split", columns="head", values="ba")
    for pair in found["pairs"]:
        assert pair["reference"] == "mean"
        differences = (ba[pair["name"]] - ba["mean"]).to_numpy()
        expected = estimate(differences, 0.5, 1 - 0.05 / 2)
        assert pair["difference"] == pytest.approx(expected.mean)
        assert (pair["low"], pair["high"]) == pytest.approx((expected.low, expected.high))
        assert pair["p"] == pytest.approx(expected.p)
    p = np.array([pair["p"] for pair in found["pairs"]])
    assert [pair["p_adjusted"] for pair in found["pairs"]] == pytest.approx(holm(p))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_are_told_apart_by_their_names(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0})
    write_run(tmp_path / "b", {"mean": 0.1})
    result = compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "b: mean is better than a: mean by 0.1" in result.output


def test_a_run_whose_writer_was_killed_between_the_renames(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0, "max": 0.1})
    interrupt_swap(tmp_path / "a")
    result = compare(tmp_path, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "a.partial").exists()


def test_noise_is_not_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0, "max": 0.0})
    result = compare(tmp_path, tmp_path / "a", "--metric", "auc")
    assert "max and mean do not differ significantly (p 1)" in result.output


def test_chosen_rows_reference_and_all_pairs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0, "top10": 0.1, "max": 0.05, "lse": 0.0})
    chosen = ("--head", "max", "--head", "top10", "--head", "lse", "--json")
    pairs = json.loads(compare(tmp_path, tmp_path / "a", *chosen, "--against", "lse").stdout)
    assert [(p["name"], p["reference"]) for p in pairs["pairs"]] == [
        ("max", "lse"),
        ("top10", "lse"),
    ]
    every = json.loads(compare(tmp_path, tmp_path / "a", *chosen, "--all-pairs", "--force").stdout)
    assert len(every["pairs"]) == 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "runs must use the same splits"),
        ({"protocol": "report"}, "runs must use the same protocol"),
    ],
)
def test_runs_that_were_not_measured_alike_are_refused(
    tmp_path: Path, other: dict[str, int | str], message: str
) -> None:
    write_run(tmp_path / "a", {"mean": 0.0})
    write_run(tmp_path / "b", {"mean": 0.1}, **other)  # type: ignore[arg-type]
    result = compare(tmp_path, tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "figure.png").exists()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0})
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "empty",), "must be a run folder of `lymphfeat fit-head`"),
        ((tmp_path / "gone",), "must be a run folder of `lymphfeat fit-head`"),
        ((tmp_path / "a",), "rows to compare (=1) must be at least 2"),
        ((tmp_path / "a", "--head", "max"), "head (=max) must be a row of the runs: mean"),
    ):
        result = compare(tmp_path, *arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "; got Expecting value: line 1 column 1 (char 0). Fit it, or fit it again"),
        ("[]", "is a damaged run (config.json holds no settings)"),
        ('{"settings": {"protocol": "honest"}}', "its config.json is of something else"),
        ('{"format": "lymphfeat-run"}', "; got no 'settings'. Fit it"),
        ('{"format": "lymphfeat-run", "settings": []}', "; got list indices must be integers"),
        ('{"format": "lymphfeat-run", "settings": {"protocol": ["x"]}}', "got the protocol ['x']"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path: Path, config: str, message: str) -> None:
    write_run(tmp_path / "a", {"mean": 0.0, "max": 0.1})
    (tmp_path / "a" / "config.json").write_text(config)
    result = compare(tmp_path, tmp_path / "a")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_table_without_heads_or_splits_is_one_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0, "max": 0.1}).drop(columns="split").to_csv(
        tmp_path / "a" / "runs.csv"
    )
    result = compare(tmp_path, tmp_path / "a")
    assert result.exit_code == 2
    assert "must be a run folder of `lymphfeat fit-head`; got no 'split'" in result.stderr


def test_a_figure_is_not_overwritten_without_force(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0, "max": 0.1})
    (tmp_path / "figure.png").write_text("keep")
    assert compare(tmp_path, tmp_path / "a").exit_code == 2
    assert (tmp_path / "figure.png").read_text() == "keep"
    assert compare(tmp_path, tmp_path / "a", "--force").exit_code == 0


def test_intervals_lie_within_what_the_metric_can_be(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.25, "max": 0.0}, brier=0.001, log_loss=0.01)
    runs = pd.read_csv(tmp_path / "a" / "runs.csv")
    noise = np.random.default_rng(0).uniform(0, 1, len(runs))
    runs.assign(brier=runs["brier"] * 50 * noise, log_loss=noise * 3).to_csv(
        tmp_path / "a" / "runs.csv", index=False
    )
    for metric, low, high in (("ba", 0, 1), ("brier", 0, 1), ("log_loss", 0, np.inf)):
        result = compare(tmp_path, tmp_path / "a", "--metric", metric, "--json", "--force")
        found = json.loads(result.stdout)
        for row in found["rows"]:
            assert low <= row["low"] < row["mean"] < row["high"] <= high
        (pair,) = found["pairs"]
        assert -high <= pair["low"] < pair["high"] <= high
    assert {row["low"] for row in found["rows"]} == {0}  # the log loss's, with this much noise


def test_one_split_gives_no_interval_and_no_verdict(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.0, "max": 0.1}, folds=1)
    result = compare(tmp_path, tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "max and mean cannot be compared: a single split gives no interval." in result.output
    assert "nan" not in result.output


def test_under_report_heads_are_set_against_a_baseline_at_their_last_epoch(tmp_path: Path) -> None:
    """The mean of ten best epochs beats a baseline, which has but one, by being chosen."""
    runs = write_run(tmp_path / "a", {"mean": 0.2, "max": 0.2, "bag size": 0.0}, protocol="report")
    result = compare(tmp_path, tmp_path / "a", "--against", "bag size")
    assert result.exit_code == 2
    assert "must hold ba_last in runs.csv; an older version wrote the run" in result.output
    last = runs["ba"].where(runs["head"] == "bag size", runs["ba"] - 0.2)
    runs.assign(ba_last=last).to_csv(tmp_path / "a" / "runs.csv", index=False)
    result = compare(tmp_path, tmp_path / "a", "--all-pairs", "--json")
    pairs = {(p["name"], p["reference"]): p for p in json.loads(result.stdout)["pairs"]}
    assert pairs["bag size", "mean"]["last_epoch"]
    assert pairs["bag size", "mean"]["difference"] == pytest.approx(0, abs=0.02)
    assert not pairs["max", "mean"]["last_epoch"]
    shown = compare(tmp_path, tmp_path / "a", "--against", "bag size", "--force").output
    assert "mean and bag size do not differ significantly (p " in shown
    assert "both at their last epoch" in shown
