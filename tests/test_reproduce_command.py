"""`lymphfeat reproduce report` on a tiny cohort, from cached features."""

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from lymphfeat.cohort.splits import Plan, read_splits
from lymphfeat.evaluation.intervals import estimate_metric
from lymphfeat.reproduction import PUBLISHED
from lymphfeat_cli.main import cli
from tests.folders import contents
from tests.tiny import write_red_cohort


def reproduce(*arguments: str) -> Result:
    fast = ["--seeds", "2", "--folds", "3", "--epochs", "2", "--threads", "1", "--device", "cpu"]
    fast += ["--precision", "float32"]
    return CliRunner().invoke(cli, ["reproduce", "report", *fast, *arguments])


def test_rows_are_those_of_the_report() -> None:
    """METHOD §7: five with the threshold chosen on validation, six at .5."""
    assert [row.published for row in PUBLISHED if row.oracle] == [0.788, 0.843, 0.861, 0.838, 0.848]
    rest = {row.name: row.published for row in PUBLISHED if not row.oracle}
    assert rest == {
        "bnsigmoid, ResNet-18": 0.814,
        "bnsigmoid, ResNet-34": 0.810,
        "bnsigmoid, ResNet-50": 0.806,
        "mean, all images": 0.811,
        "mean, 10 images": 0.802,
        "bnsigmoid, 10 images": 0.800,
    }


@pytest.mark.seconds
def test_table_and_figures_beside_the_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_red_cohort(tmp_path / "red", "01" * 8, side=112)
    arguments = ("--cohort", str(root), "--backbone", "resnet18", "--weights", "none")
    result = reproduce(*arguments, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert "resnet18: random weights; choose others with --weights" in told["warnings"][0]
    rows = {row["name"]: row for row in told["rows"]}
    assert set(rows) == {row.name for row in PUBLISHED if row.backbone == "resnet18"}
    for row in rows.values():
        assert row["optimism"] == pytest.approx(row["report"] - row["honest"])
        assert -1 <= row["optimism_low"] <= row["optimism_high"] <= 1
        for name in ("report", "honest"):
            assert 0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1
    out = tmp_path / "runs" / "reproduce-report"
    runs = pd.read_csv(out / "resnet18" / "report" / "runs.csv")
    top = runs[runs["head"] == "top1"]
    assert rows["top-1"]["report"] == pytest.approx(top["ba_oracle"].mean(), abs=1e-5)
    ratio = Plan.flat(read_splits(out / "resnet18" / "report" / "splits.json")).test_to_train
    measured = pd.read_csv(out / "resnet18" / "report" / "predictions.csv")
    rarer = measured.drop_duplicates("patient")["label"].value_counts().min()
    corrected = estimate_metric(top["ba_oracle"].to_numpy(float), ratio, (0, 1), int(rarer))
    assert rows["top-1"]["report_low"] == pytest.approx(corrected.low, abs=1e-4)
    subset = json.loads((out / "resnet18-10-images" / "honest" / "config.json").read_text())
    assert subset["settings"]["images_per_patient"] == 10
    assert subset["settings"]["epochs"] == 6
    for name in ("figure3.png", "figure5.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert pd.read_csv(out / "table.csv")["published"].tolist() == [
        row.published for row in PUBLISHED if row.backbone == "resnet18"
    ]
    assert set(told["files"]) == {f"runs/reproduce-report/{name}" for name in contents(out)}
    before = contents(out)
    again = reproduce(*arguments)
    assert again.exit_code == 2
    assert "already holds a reproduction; choose another --out or use --force" in again.output

    def crash(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lymphfeat.reproduction.draw_depths", crash)
    crashed = reproduce(*arguments, "--seed", "3", "--force")
    assert crashed.exit_code == 1, crashed.output
    assert contents(tmp_path / "runs") == {
        f"reproduce-report/{name}": value for name, value in before.items()
    }
