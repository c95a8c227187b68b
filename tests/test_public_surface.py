"""`import lymphfeat as lf`: every public name, loaded when first used and shadowed by no module."""

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lymphfeat as lf
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.features.store import FeatureStore
from tests.tiny import BACKBONE, write_red_cohort

ROOT = Path(__file__).parent.parent
QUICK = lf.FitSettings(seeds=1, folds=3, epochs=2, precision="float32", device="cpu", threads=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    root = tmp_path_factory.mktemp("surface")
    cohort = Cohort.load(write_red_cohort(root / "cohort"))
    settings = lf.ExtractSettings(backbone=BACKBONE, device="cpu", threads=1, precision="float32")
    return lf.extract(cohort, str(root / "features.h5"), settings)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.seconds
def test_torch_waits_until_it_is_used() -> None:
    code = "import sys, lymphfeat as lf; dir(lf); lf.Cohort, lf.FitSettings, lf.SettingsError"
    shown = "print('torch' in sys.modules)"
    assert run_python(f"{code}; {shown}") == "False\n"
    assert run_python(f"{code}; lf.fit_heads; {shown}") == "True\n"


@pytest.mark.seconds
def test_no_module_shadows_a_public_name() -> None:
    code = (
        "import pkgutil, types; from importlib import import_module; import lymphfeat as lf\n"
        "for found in pkgutil.walk_packages(lf.__path__, 'lymphfeat.'):\n"
        "    if found.name != 'lymphfeat.pretraining.trainer': import_module(found.name)\n"
        "print([name for name in lf.__all__ if not callable(getattr(lf, name))])"
    )
    assert run_python(code) == "[]\n"
    submodules = {found.name for found in pkgutil.iter_modules(lf.__path__)}
    assert not submodules & set(lf.__all__)


@pytest.mark.parametrize("name", lf.__all__)
def test_a_public_name_is_what_type_checkers_see(name: str) -> None:
    tree = ast.parse((ROOT / "lymphfeat" / "__init__.py").read_text(encoding="utf-8"))
    modules = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert getattr(lf, name) is getattr(import_module(modules[name]), name)
    assert name in dir(lf)
    assert getattr(lf, name).__doc__


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"'lymphfeat' has no attribute 'fit_nothing'"):
        lf.fit_nothing  # type: ignore[attr-defined]  # noqa: B018


def test_heads_are_fitted_without_a_folder(store: FeatureStore, tmp_path: Path) -> None:
    before = sorted(store.path.parent.iterdir())
    run = lf.fit_heads(str(store.path), agg="topk", settings=QUICK)
    assert run.folder is None
    assert run.files == ()
    assert "top10" in run.summary["head"].tolist()
    assert len(run.outcome.predictions)
    assert sorted(store.path.parent.iterdir()) == before
    written = lf.fit_heads(store, [lf.HeadSettings(agg="topk")], QUICK, str(tmp_path / "run"))
    assert written.summary.equals(run.summary)
    assert tmp_path / "run" / "summary.json" in written.files


def test_heads_are_named_listed_or_spanned(store: FeatureStore) -> None:
    named = lf.fit_heads(store, agg=("mean", "topk"), settings=QUICK)
    listed = [lf.HeadSettings(agg="mean"), lf.HeadSettings(agg="topk")]
    assert lf.fit_heads(store, listed, QUICK).summary.equals(named.summary)
    grid = lf.HeadGrid(agg=("mean", "topk"))
    assert lf.fit_heads(store, grid, QUICK).summary.equals(named.summary)
    with pytest.raises(lf.SettingsError, match=r"agg \(=mean\) must not go with heads"):
        lf.fit_heads(store, grid, agg="mean")
    with pytest.raises(lf.SettingsError, match=r"save \(=True\) must go with out"):
        lf.fit_heads(store, agg="mean", save=True)


def test_one_folder_is_no_list_of_runs() -> None:
    with pytest.raises(lf.SettingsError, match=r"folders \(=run\) must be a list of run folders"):
        lf.compare("run")
