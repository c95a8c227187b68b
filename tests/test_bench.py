"""`make bench`: what it compares is the same work, and what it says is what was measured."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import lymphfeat as lf
from benchmarks.bench import extraction
from benchmarks.bench.__main__ import RESULTS, ROWS, main
from benchmarks.bench.inputs import (
    IMAGES,
    LABELLED,
    LABELLED_IMAGES,
    PATIENTS,
    bag_sizes,
    challenge_features,
    challenge_sizes,
    dealt_out,
)
from benchmarks.bench.measure import LIMIT, OURS, Bench, in_turn, run
from benchmarks.bench.plain_heads import BATCH, PlainLoop
from benchmarks.bench.report import BEGIN, END, PAGE, render, write_page
from benchmarks.bench.results import Goal, Line, Result
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import expand
from lymphfeat.settings import BackboneSettings, ExtractSettings, FitSettings, HeadGrid

TIMES = Line(
    name="a line",
    unit="s",
    samples={OURS: [1.0, 2.0, 4.0], "a loop": [4.0, 4.0, 4.0], LIMIT: [1.0, 1.0, 1.0]},
    goals=(
        Goal(text="≥ .4 × the limit", at_least=0.4),
        Goal(text="≥ 3 × a loop", at_least=3, against="a loop"),
        Goal(text="≤ 2 s", at_most=2),
        Goal(text="≥ 1 × torchmil", at_least=1, against="torchmil"),
    ),
    note="of this and that.",
)


@pytest.mark.seconds
def test_a_quick_run_prints_its_table_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = PAGE.read_bytes(), sorted(RESULTS.glob("*"))
    main(["--rows", "store", "--quick", "--threads", "1"])
    printed = capsys.readouterr().out
    for name in ("shuffled pass", "one random image", "cold open"):
        assert f"| store: {name}" in printed
    for name in ("one HDF5 file per bag", "HDF5, a chunk per image", "a single .npy"):
        assert printed.count(f"{name}: ") == 3
    assert (PAGE.read_bytes(), sorted(RESULTS.glob("*"))) == before


def test_a_row_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(bench: Bench) -> list[Line]:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(ROWS, "store", fail)
    monkeypatch.setitem(ROWS, "abmil", lambda bench: [TIMES])
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}{END}", encoding="utf-8")
    places = ["--results", str(tmp_path), "--page", str(page)]
    with pytest.raises(SystemExit, match="some rows"):
        main(["--rows", "store", "abmil", "--threads", "1", *places])
    assert "| a line |" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "store.json").exists()


# --- what is compared -----------------------------------------------------------------------------


def test_inputs_have_the_size_of_the_challenge(tmp_path: Path) -> None:
    sizes = challenge_sizes(Bench(folder=tmp_path))
    assert (len(sizes), sizes.sum()) == (PATIENTS, IMAGES)
    assert sizes[:LABELLED].sum() == LABELLED_IMAGES
    assert bag_sizes(3, 7).sum() == 7


def test_folding_batchnorm_changes_only_rounding() -> None:
    torch.manual_seed(0)
    model = extraction.resnet18()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            statistics = module.state_dict()  # shares the memory
            statistics["running_mean"].uniform_(-1, 1)
            statistics["running_var"].uniform_(0.5, 2)
    folded = extraction.fold_batchnorm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(
            folded.forward_features(images), model.forward_features(images), rtol=1e-3, atol=1e-3
        )


@pytest.mark.seconds
def test_the_plain_extraction_writes_the_same_maps(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, quick=True)
    cohort = lf.Cohort.load(dealt_out(bench, np.array([3, 2])))
    backbone = BackboneSettings(backbone="resnet18", weights="none", crop=extraction.CROP)
    settings = ExtractSettings(backbone=backbone, precision="float32", threads=1)
    ours = lf.extract(cohort, tmp_path / "ours.h5", settings).features()[:, 0]
    torch.manual_seed(backbone.weights_seed)  # of the random weights
    paths = [path for own in cohort.images for path in own]
    extraction.extract_plainly(bench, paths, torch.float32, tmp_path / "plain.h5")
    with h5py.File(tmp_path / "plain.h5") as file:
        np.testing.assert_allclose(file["features"][:], ours, rtol=0.01, atol=0.01)


def test_the_plain_head_is_the_head_that_is_fitted(tmp_path: Path) -> None:
    """Other weights to begin with, another order: in the end the same patients are tumoral."""
    provider = challenge_features(Bench(folder=tmp_path, quick=True))
    split = provider.plan(FitSettings(protocol="report", seeds=1)).outer[0]
    (head,) = expand(HeadGrid(agg=("topk",), lr=(0.01,)))
    fit = Fit(head=head, split=split)
    fitted = fit_stacked(provider.features, [fit], epochs=20, sampling=Sampling(batch_size=BATCH))
    loop = PlainLoop(provider.features, head, split)
    for _ in range(20):
        loop.train_epoch()
    rows = provider.features.rows_of(split.train).tolist()
    ours, plain = fitted.curves[0, -1, rows], np.array(loop.evaluate(rows))
    assert np.corrcoef(ours, plain)[0, 1] > 0.9


# --- measuring ------------------------------------------------------------------------------------


def test_contestants_take_turns_and_the_warm_up_does_not_count(tmp_path: Path) -> None:
    calls: list[str] = []

    def contestant(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = in_turn(
        Bench(folder=tmp_path, repeats=2),
        {"a": lambda: contestant("a"), "b": lambda: contestant("b")},
    )
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert samples == {"a": [3, 6], "b": [4, 5]}


def test_no_repeat_begins_after_the_patience(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, repeats=5, patience=0)
    assert in_turn(bench, {"a": lambda: 1.0}) == {"a": [1.0]}


def test_a_process_is_timed_heard_and_stopped(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, stop=20)
    said = "import sys; sys.stderr.write('extracting: 1 of 9, about 15 s left\\n')"
    ran = run(bench, [sys.executable, "-c", said])
    assert not ran.stopped
    assert ran.estimated is not None
    assert ran.seconds > 0
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert run(Bench(folder=tmp_path, stop=0.2), sleeping).stopped
    with pytest.raises(RuntimeError, match="nothing to see"):
        run(bench, [sys.executable, "-c", "raise SystemExit('nothing to see')"])


# --- what is said ---------------------------------------------------------------------------------


def test_ratios_are_taken_repeat_by_repeat() -> None:
    speed = TIMES.speed(OURS, "a loop")
    assert (speed.median, speed.low, speed.high) == (2, 1, 4)
    rates = Line(name="rates", unit="images/s", samples=TIMES.samples)
    assert rates.speed(OURS, "a loop").median == 0.5


def test_goals_are_met_by_medians_and_unknown_without_a_peer() -> None:
    assert [TIMES.is_met(goal) for goal in TIMES.goals] == [True, False, True, None]


@pytest.mark.parametrize(("at_most", "met"), [(1.0, False), (60.0, None)])
def test_what_was_stopped_meets_no_goal(at_most: float, met: bool | None) -> None:
    line = Line(name="long", unit="s", samples={OURS: [30.0]}, stopped=True)
    assert line.is_met(Goal(text="", at_most=at_most)) is met
    assert "| > 30.0 s |" in render([Result.now("long", [line], threads=1)])


def test_a_row_is_kept_as_it_was(tmp_path: Path) -> None:
    result = Result.now("row", [TIMES], threads=1)
    result.write(tmp_path)
    again = Result.read(tmp_path / "row.json")
    assert again.machine == result.machine
    assert render([again]) == render([result])


def test_only_what_lies_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"Before.\n{BEGIN}\nOld.\n{END}\nAfter.\n", encoding="utf-8")
    result = Result.now("row", [TIMES], threads=1)
    for _ in range(2):
        write_page(page, [result])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"Before.\n{BEGIN}\n![")
    assert text.endswith(f"{END}\nAfter.\n")
    assert "Old." not in text
    assert text.count("| a line |") == 1
    assert "| 2.00 (1.00–4.00) s | a loop: 4.00 s | 1.00 s |" in text
    assert "yes<br>**no**<br>yes<br>not measured" in text
    assert (tmp_path / "benchmarks" / "limit.svg").stat().st_size > 1000


def test_the_page_has_its_marks() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.index(BEGIN) < text.index(END)
