"""What every figure keeps to: an axis of shares does not run beyond 0 and 1."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.comparison import compare
from lymphfeat.evaluation.protocol import run_protocol
from lymphfeat.evaluation.providers import SharedFeatures
from lymphfeat.explanation.explanation import explain
from lymphfeat.explanation.figures import draw_cohort, draw_weights
from lymphfeat.fitting import Run, set_off
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.grid import resolve
from lymphfeat.plots.comparison import draw_comparison
from lymphfeat.plots.learning_curves import draw_curves
from lymphfeat.plots.optimism import draw_optimism
from lymphfeat.plots.pretraining import draw_curve
from lymphfeat.plots.reproduction import draw_depths, draw_subsets
from lymphfeat.plots.summary import draw_summary
from lymphfeat.reproduction import PUBLISHED
from lymphfeat.settings import ExplainSettings, FitSettings, HeadSettings, ProtocolName
from tests.simulations import noise_features
from tests.test_compare_command import write_run
from tests.test_model import make_model
from tests.tiny import write_red_cohort

LABELS = np.array([0, 1, 1] * 10)
SHARES = ("accuracy", "auc", "specificity", "sensitivity", "probability", "weight", "nearest")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def check(figures: list[Figure], axes_of_shares: int) -> None:
    """Check every axis named after a share, and that there are as many as expected."""
    found = 0
    for axes in (axes for figure in figures for axes in figure.axes):
        for label, limits in (
            (axes.get_xlabel(), axes.get_xlim()),
            (axes.get_ylabel(), axes.get_ylim()),
        ):
            if any(name in label.lower() for name in SHARES):
                found += 1
                assert 0 <= limits[0] < limits[1] <= 1, label
        check_error_bars(axes)
    assert found == axes_of_shares


def check_error_bars(axes: Axes) -> None:
    if "accuracy" in axes.get_xlabel():
        for bars in (line for container in axes.containers for line in container[2]):
            for (low, _), (high, _) in bars.get_segments():
                assert 0 <= low <= high <= 1


def run(protocol: ProtocolName, strength: float = 0) -> Run:
    features = noise_features(0, np.full(len(LABELS), 3), LABELS)
    pooled = features.images.numpy().copy()
    pooled[:, 0] += strength * np.repeat(LABELS, 3)
    told = Features(
        pooled[..., None, None].astype(np.float16),
        pooled.astype(np.float16).astype(np.float32),
        features.offsets,
        list(features.row),
        LABELS,
    )
    heads = [resolve(HeadSettings(agg=agg, lr=0.1)) for agg in ("mean", "topk")]
    settings = FitSettings(protocol=protocol, seeds=3, folds=3, epochs=12, threads=1)
    provider = SharedFeatures.of(told)
    outcome = run_protocol(provider, provider.plan(settings), heads, settings)
    return Run(folder=Path(), settings=settings, outcome=outcome)


@pytest.mark.seconds
@pytest.mark.parametrize("strength", [0, 1, 20])
def test_summary_and_optimism(drawn: list[Figure], strength: float) -> None:
    report, honest = run("report", strength), run("honest", strength)
    draw_summary(report.outcome, report.settings, Path("summary.png"))
    draw_summary(honest.outcome, honest.settings, Path("summary.png"))
    check(drawn, 2 + 3)  # accuracy and AUC; of the honest run the predicted probability, too
    drawn.clear()
    draw_optimism(set_off(report, honest), Path("optimism.png"))
    check(drawn, 1)
    named = [axes.get_xlabel() for axes in drawn[0].axes]
    assert named[0].endswith("corrected 95 % t interval")  # one kind of interval per panel
    assert named[1] == "report − honest, 95 % bootstrap interval"


def test_comparison(drawn: list[Figure], tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"mean": 0.25, "max": -0.4, "top1": 0.0}, auc=1.0)
    for metric in ("ba", "auc"):
        draw_comparison(compare([tmp_path / "a"], metric=metric), tmp_path / "c.png")
    check(drawn, 2)


def test_figures_of_the_reproduction(drawn: list[Figure]) -> None:
    table = pd.DataFrame(
        [
            {
                "name": row.name,
                "published": row.published,
                "published_half_width": row.published_half_width,
                **{
                    f"{name}{end}": value
                    for name in ("report", "honest", "report_log_loss", "honest_log_loss")
                    for end, value in (("", 0.9), ("_low", 0.04), ("_high", 1.0))
                },
            }
            for row in PUBLISHED
        ]
    )
    draw_depths(table[table["name"].str.startswith("bnsigmoid, R")], Path("3.png"))
    draw_subsets(table, Path("5.png"))
    check(drawn, 2)


def test_learning_curves(drawn: list[Figure], tmp_path: Path) -> None:
    rows = [
        {"epoch": epoch, "loss": 0.5, "train_ba": 1.0, "probe": 1.0, "class_loss": 0.1}
        for epoch in range(4)
    ]
    monkey = pytest.MonkeyPatch()
    monkey.setattr("lymphfeat.plots.learning_curves.replace_file", lambda path, write: write(path))
    draw_curves(rows, tmp_path)
    monkey.undo()
    draw_curve(rows, tmp_path / "curve.png", "patients")
    check(drawn, 2)


def test_explanations(tmp_path: Path) -> None:
    cohort = Cohort.load(write_red_cohort(tmp_path / "cohort", "010101??"))
    found = explain(
        make_model("bnsigmoid"), cohort, ExplainSettings(device="cpu", precision="float32")
    )
    check([draw_cohort(found), draw_weights(found, "P1")], 2 + 1 + 1)
