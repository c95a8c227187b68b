"""A run that is interrupted, wherever it is killed, continues with the heads that were finished."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.protocol import FinishedHead
from lymphfeat.features.store import FeatureStore
from lymphfeat.fitting import fit_both, fit_heads
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.exact_head import ExactHead
from lymphfeat.inspection import inspect
from lymphfeat.runtime.files import KEPT_FOLDER, unfinished_folder
from lymphfeat.settings import FitSettings, HeadGrid
from lymphfeat_cli.main import cli
from tests.folders import contents, names_in
from tests.test_several_stores import write

SETTINGS = FitSettings(seeds=1, folds=3, epochs=2, device="cpu", threads=1)
EXACT = ("mean", "std", "logstd", "gini+quantiles", "kernel-mean", "prototypes@2+std@1")
FEW = ("std", "topk", "attention")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[FeatureStore]:
    folder = tmp_path_factory.mktemp("stores")
    return [write(folder / "a.h5", 3, 0), write(folder / "b.h5", 5, 1)]


def stop(head: FinishedHead) -> None:
    raise KeyboardInterrupt


def kept_files(out: Path) -> list[Path]:
    return sorted((unfinished_folder(out) / KEPT_FOLDER).glob("*.safetensors"))


# --- killed ---------------------------------------------------------------------------------------

KILLED = """
import os
from lymphfeat_cli.main import cli
from tests.self_kill import kill_at

def counts(event, arguments):
    return event == "os.rename" and os.path.abspath(arguments[1]).endswith(".safetensors")

kill_at(int(os.environ["FINISHED"]) + 1, counts)  # half written
cli()
"""


def kill_after(finished: int, *arguments: str) -> None:
    """Run a command in a process of its own, and kill it as it keeps the next head."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "FINISHED": str(finished),
        },
        timeout=240,
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.seconds
def test_a_killed_command_continues_and_writes_the_same_bytes(
    stores: list[FeatureStore], tmp_path: Path
) -> None:
    aggs = (*FEW, "mean+std", "bnsigmoid")
    line = ["fit-head", "--store", str(stores[0].path), "--device", "cpu", "--threads", "1"]
    line += [word for agg in aggs for word in ("--agg", agg)]
    line += ["--seeds", "1", "--folds", "3", "--epochs", "2", "--width", "4", "--save", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    uninterrupted = CliRunner().invoke(cli, [*line, str(whole)])
    assert uninterrupted.exit_code == 0, uninterrupted.output
    for finished in (1, 3):
        kill_after(finished - len(kept_files(out)), *line, str(out))
        assert len(kept_files(out)) == finished
        assert not out.exists()
    continued = CliRunner().invoke(cli, [*line, str(out)])
    assert continued.exit_code == 0, continued.output
    assert contents(out) == contents(whole)
    assert names_in(tmp_path) == {"whole", "out"}
    rows = re.findall(r"^(\S+).*: BA .*, AUC .*, (.*)$", continued.stderr, re.MULTILINE)
    assert [name for name, _ in rows] == ["std", "mean+std", "top10", "bnsigmoid", "attention"]
    assert [kept == "kept from before" for _, kept in rows] == [True, True, True, False, False]
    assert not re.search(" BA ", continued.stdout.split("┏")[0])


@pytest.mark.seconds
def test_both_protocols_continue(stores: list[FeatureStore], tmp_path: Path) -> None:
    grid = HeadGrid(agg=("std", "mean"))
    fit_both(stores[0], grid, SETTINGS, tmp_path / "whole")
    told: list[FinishedHead] = []

    def stop_late(head: FinishedHead) -> None:
        told.append(head)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_both(stores[0], grid, SETTINGS, tmp_path / "out", tell=stop_late)
    fit_both(stores[0], grid, SETTINGS, tmp_path / "out", tell=told.append)
    assert [(head.protocol, head.name, head.seconds is None) for head in told[3:]] == [
        ("honest", "std", True),
        ("honest", "mean exact", True),
        ("report", "std", True),
        ("report", "mean exact", False),
    ]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.seconds
def test_every_kind_of_head_comes_back_as_it_was(
    stores: list[FeatureStore], tmp_path: Path
) -> None:
    grid, out = HeadGrid(agg=EXACT, prototypes=(2,)), tmp_path / "out"
    whole = fit_heads(stores, grid, SETTINGS).outcome.fitted
    told: list[FinishedHead] = []

    def stop_at_last(head: FinishedHead) -> None:
        told.append(head)
        if len(told) == len(EXACT):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_heads(stores, grid, SETTINGS, out, tell=stop_at_last)
    assert len(kept_files(out)) == len(EXACT)
    told_by_info = inspect(unfinished_folder(out))
    assert told_by_info["checkpoints"] == [path.name for path in kept_files(out)]
    found = fit_heads(stores, grid, SETTINGS, out).outcome.fitted
    np.testing.assert_array_equal(found.curves, whole.curves)
    sets = [images_of(store) for store in stores]
    for position, module in whole.modules.items():
        ours = found.modules[position]
        assert isinstance(module, ExactHead)
        assert isinstance(ours, ExactHead)
        assert (ours.chosen, ours.mixture) == (module.chosen, module.mixture)
        assert torch.equal(ours.patient_logits(sets), module.patient_logits(sets))
        assert torch.equal(ours.shares(sets), module.shares(sets))


def images_of(store: FeatureStore) -> tuple[Tensor, Bags]:
    """Return all pooled images, and the patients."""
    return torch.from_numpy(np.array(store.pooled("frozen")[:, 0])), Bags.of(store.n_images)


@pytest.mark.seconds
def test_a_damaged_file_is_fitted_again(
    stores: list[FeatureStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tmp_path / "whole"
    fit_heads(stores[0], settings=SETTINGS, agg=FEW, out=whole)
    rng = np.random.default_rng(0)
    for damage in ("flip", "cut", "empty"):
        out = tmp_path / damage
        with pytest.raises(KeyboardInterrupt):
            fit_heads(stores[0], settings=SETTINGS, agg=FEW, out=out, tell=stop)
        (path,) = kept_files(out)
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[int(rng.integers(len(content) // 2, len(content)))] ^= 4
        path.write_bytes(content[: {"flip": None, "cut": -9, "empty": 0}[damage]])
        told: list[FinishedHead] = []
        with caplog.at_level(logging.WARNING):
            fit_heads(stores[0], settings=SETTINGS, agg=FEW, out=out, tell=told.append)
        assert re.search(r"safetensors is damaged \(.*\); its heads are fitted again", caplog.text)
        caplog.clear()
        assert [head.seconds is None for head in told] == [False] * 3
        assert contents(out) == contents(whole)


@pytest.mark.seconds
def test_another_run_is_refused_unless_forced(stores: list[FeatureStore], tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = write(tmp_path / "other.h5", 3, 7)  # the same recipe, other features
    with pytest.raises(KeyboardInterrupt):
        fit_heads(stores[0], settings=SETTINGS, agg="std", out=out, tell=stop)
    before = contents(tmp_path)
    for store, agg, settings, message in (
        (stores[0], "std", FitSettings(seeds=1, folds=4, device="cpu"), "settings.folds is 3"),
        (stores[0], "gini", SETTINGS, "heads.gini is None there, fitted now"),
        (other, "std", SETTINGS, "stores.1.content is"),
    ):
        with pytest.raises(SettingsError, match=f"unfinished run with other settings: .*{message}"):
            fit_heads(store, settings=settings, agg=agg, out=out)
        assert contents(tmp_path) == before
    told: list[FinishedHead] = []
    fit_heads(stores[0], settings=SETTINGS, agg="gini", out=out, tell=told.append, force=True)
    assert [head.seconds is None for head in told] == [False]
    assert names_in(tmp_path) == {"out", "other.h5"}


def test_nothing_is_kept_without_a_folder(
    stores: list[FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit_heads(stores[0], settings=SETTINGS, agg="std", tell=stop)
    assert not names_in(tmp_path)


# --- what is told ---------------------------------------------------------------------------------


def test_what_is_told_is_what_the_summary_says(stores: list[FeatureStore]) -> None:
    told: list[FinishedHead] = []
    run = fit_heads(stores[0], settings=SETTINGS, agg=("attention", "std"), tell=told.append)
    assert [head.name for head in told] == ["std", "attention"]
    summary = run.summary.set_index("head")
    for head in told:
        assert head.seconds is not None
        assert head.seconds > 0
        for name in ("ba", "ba_low", "ba_high", "auc"):
            assert getattr(head, name) == summary.loc[head.name, name]


def test_progress_is_shown_while_exact_heads_are_solved(stores: list[FeatureStore]) -> None:
    seen: list[tuple[int, int, str]] = []
    told: list[int] = []
    settings = FitSettings(seeds=10, folds=3, device="cpu", threads=1)
    fit_heads(
        stores[0],
        settings=settings,
        agg=("std", "gini"),
        tell=lambda head: told.append(len(seen)),
        progress=lambda done, total, text="": seen.append((done, total, text)),
    )
    fits = 2 * (30 + 30)
    assert seen[0] == (0, fits, "std")
    assert seen[-1] == (fits, fits, "gini")
    of_std = [done for done, _, text in seen[: told[0]] if text == "std"]
    assert len(of_std) >= 3  # some of them before the head is finished
    assert of_std == sorted(of_std)
