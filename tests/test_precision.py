"""float32 is float32: nothing in torch shortens it while something is computed."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_folders import Cells
from lymphfeat.explanation.explanation import explain
from lymphfeat.extraction import extract
from lymphfeat.fitting import fit_heads
from lymphfeat.heads.grid import resolve
from lymphfeat.model.model import Model
from lymphfeat.pretraining.run import pretrain
from lymphfeat.runtime.devices import deterministic, whole_float32
from lymphfeat.settings import (
    ExplainSettings,
    ExtractSettings,
    FitSettings,
    HeadSettings,
    PredictSettings,
    PretrainSettings,
)
from lymphfeat.training import train
from tests.test_model import make_model
from tests.tiny import BACKBONE, SIDE, tiny_settings, write_red_cohort

HERE: dict[str, Any] = {"device": "cpu", "precision": "float32", "threads": 1}
PARTS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul")


def shortcuts() -> tuple[str, ...]:
    """Return how torch would compute float32 products now, on a GPU and here."""
    return tuple(attrgetter(part)(torch.backends).fp32_precision for part in PARTS)


@pytest.fixture
def shortened() -> Iterator[None]:
    """Let torch shorten float32 wherever it may."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_shortcuts_are_closed_for_a_while(shortened: None) -> None:
    before = shortcuts()
    assert before == ("tf32", "tf32", "tf32", "bf16")
    with whole_float32():
        assert set(shortcuts()) == {"ieee"}
    assert shortcuts() == before
    with pytest.raises(ZeroDivisionError), whole_float32():
        raise ZeroDivisionError
    assert shortcuts() == before


def test_products_have_all_bits(shortened: None) -> None:
    """What differs only on a processor that shortens them."""
    a, b = torch.randn(2, 256, 256)
    torch.set_float32_matmul_precision("highest")
    whole = a @ b
    torch.set_float32_matmul_precision("medium")
    with whole_float32():
        assert torch.equal(a @ b, whole)


def fit_networks(model: Model, cohort: Cohort, out: Path) -> None:
    store = extract(cohort, out / "s.h5", ExtractSettings(backbone=BACKBONE, **HERE))
    heads = [resolve(HeadSettings(agg="lstm", width=4))]
    fit_heads(store, heads, FitSettings(seeds=1, folds=3, epochs=1, **HERE), out / "run")


def pretrain_a_little(model: Model, cohort: Cohort, out: Path) -> None:
    small: dict[str, Any] = {"batch_size": 4, "view_size": 32, "field": SIDE, "projection": 8}
    settings = PretrainSettings(backbone=BACKBONE.backbone, epochs=1, **small, **HERE)
    pretrain(Cells.find(cohort.root), out / "w.safetensors", settings)


COMPUTING: dict[str, Callable[[Model, Cohort, Path], object]] = {
    "predict": lambda model, cohort, out: model.predict(cohort, PredictSettings(device="cpu")),
    "explain": lambda model, cohort, out: explain(model, cohort, ExplainSettings(device="cpu")),
    "endtoend": lambda model, cohort, out: train(cohort, out, tiny_settings(epochs=1)),
    "folds": lambda model, cohort, out: train(cohort, out, tiny_settings(epochs=1), folds=2),
    "extract and fit-head": fit_networks,
    "pretrain": pretrain_a_little,
}


@pytest.mark.seconds
@pytest.mark.parametrize("compute", COMPUTING.values(), ids=COMPUTING)
def test_all_that_computes_closes_them(
    compute: Callable[[Model, Cohort, Path], object], shortened: None, tmp_path: Path
) -> None:
    model, cohort = make_model(), Cohort.load(write_red_cohort(tmp_path / "red"))
    seen: set[tuple[str, ...]] = set()
    hook = register_module_forward_pre_hook(lambda *_: seen.add(shortcuts()))
    try:
        compute(model, cohort, tmp_path / "out")
    finally:
        hook.remove()
    assert seen == {("ieee",) * len(PARTS)}


def flags() -> tuple[object, ...]:
    """Return all that decides whether a GPU computes the same bits every time."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_a_gpu_computes_the_same_bits_for_a_while(
    workspace: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = flags()
    with suppress(KeyError), deterministic(torch.device("cuda"), wanted=True):
        assert flags() == (True, False, True, False, ":4096:8")
        raise KeyError  # an error restores them, too
    assert flags() == before
    for device, wanted in (("cuda", False), ("cpu", True)):
        with deterministic(torch.device(device), wanted=wanted):
            assert flags() == before
