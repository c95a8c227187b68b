"""fit-head: every head on a feature store under a protocol, and the run folder it leaves."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lymphfeat import __version__
from lymphfeat.cohort.splits import Split, write_splits
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.evaluation.leakage import find_shared_images
from lymphfeat.evaluation.optimism import honest_calls, optimism_interval, report_calls
from lymphfeat.evaluation.protocol import Outcome, SplitFeatures, run_protocol, witness_aucs
from lymphfeat.evaluation.run_provenance import PROVENANCE_FILE, RunProvenance
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.grid import expand, head_name, resolve
from lymphfeat.plots.optimism import draw_optimism
from lymphfeat.plots.summary import draw_summary
from lymphfeat.runtime.devices import (
    choose_device,
    choose_precision,
    cpu_threads,
    precision_name,
    whole_float32,
)
from lymphfeat.runtime.files import ResultKind, files_in, replace_file, result_folder
from lymphfeat.runtime.processes import is_first, join_processes
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.settings import FitSettings, HeadGrid, HeadSettings

RUN_FORMAT = "lymphfeat-run"
RUN_FILES = (
    "summary.png",
    "summary.json",
    "warnings.txt",
    "runs.csv",
    "epochs.csv",
    "predictions.csv",
    "splits.json",
    PROVENANCE_FILE,
    "config.json",
)
HEADS_FILE = "heads.safetensors"
OPTIMISM_FILES = ("optimism.csv", "optimism.png")
_ONE_RUN = (*RUN_FILES, HEADS_FILE)
RUN = ResultKind(
    name="run",
    marks=("config.json", *OPTIMISM_FILES),
    files=(
        *_ONE_RUN,
        *OPTIMISM_FILES,
        *(f"{protocol}/{name}" for protocol in ("report", "honest") for name in _ONE_RUN),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `fit_heads` found, and the folder it is in (None where none was written)."""

    folder: Path | None
    settings: FitSettings
    outcome: Outcome

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files in the folder."""
        return files_in(self.folder) if self.folder else ()

    @property
    def summary(self) -> pd.DataFrame:
        """Return one row per head, the best first: its metrics with their intervals."""
        return self.outcome.summary


def fit_heads(
    store: FeatureStore | str | os.PathLike[str],
    heads: Sequence[HeadSettings] | HeadGrid = (),
    settings: FitSettings | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    agg: str | Sequence[str] = (),
    splits: Sequence[Split] | None = None,
    truth: str | os.PathLike[str] | None = None,
    save: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Run:
    """Fit heads on a store under a protocol; with `out` write that run folder.

    `heads` lists them or spans a grid of them; `agg` names them by aggregator instead, one or
    several, with default settings. Without either, top-k is fitted.

    `splits` are taken in place of the protocol's own, as from another run's splits.json. `truth`
    names witness images: the table then also says how well each head finds them. `save` keeps the
    heads' weights. Under torchrun the fits are shared out, and the first process writes. The folder
    is replaced as a whole, at the end. Raises SettingsError when a run is there already and `force`
    is not set, or anything else.
    """
    if save and out is None:
        raise SettingsError("save (=True) must go with out, the run folder that keeps the weights.")
    heads = _choose_heads(heads, agg)
    settings = settings or FitSettings()
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    device = choose_device(settings.device)
    witness = None if truth is None else _witnesses(store, Path(truth))
    join_processes()
    run_folder = None if out is None else Path(out)
    with (
        nullcontext()
        if run_folder is None
        else result_folder(run_folder, RUN, force=force, writes=is_first()) as folder,
        cpu_threads(settings.threads),
        whole_float32(),
    ):
        dtype = choose_precision(settings.precision, device)
        settings = replace(settings, precision=precision_name(dtype))
        features = load_features(store, dtype, device, views=settings.views)
        outcome = run_protocol(
            features,
            store.ids,
            store.labels,
            heads,
            settings,
            table=store.table,
            splits=splits,
            seen=RunProvenance.of(store).seen,
            shared=find_shared_images(store, next(iter(store.feature_sets))),
            progress=progress,
        )
        if dtype != torch.float32:
            outcome.summary["bfloat16_change"] = outcome.summary["head"].map(_roundings(outcome))
        if witness is not None:
            patients = np.repeat(np.arange(len(store.ids)), store.n_images)
            aucs = witness_aucs(outcome, features, patients, witness)
            outcome.summary["witness_auc"] = outcome.summary["head"].map(aucs)
        if folder and is_first():
            _write(outcome, store, settings, folder, save)
    return Run(folder=run_folder, settings=settings, outcome=outcome)


def _choose_heads(
    heads: Sequence[HeadSettings] | HeadGrid, agg: str | Sequence[str]
) -> list[HeadSettings]:
    if heads and agg:
        raise SettingsError(f"agg (={agg}) must not go with heads; give one of them.")
    if isinstance(heads, HeadGrid):
        return expand(heads)
    if heads:
        return [resolve(head) for head in heads]
    names = (agg,) if isinstance(agg, str) else tuple(agg)
    return expand(HeadGrid(agg=names) if names else HeadGrid())


def _roundings(outcome: Outcome) -> dict[str, float]:
    """Return for each head how far bfloat16 moves any patient's last probability."""
    largest: dict[str, float] = {}
    for fit, change in zip(outcome.fitted.fits, outcome.fitted.rounding.tolist(), strict=True):
        name = head_name(fit.head)
        largest[name] = max(change, largest.get(name, 0.0))
    return largest


def load_features(
    store: FeatureStore, dtype: torch.dtype, device: torch.device, *, views: int | None = None
) -> Features | SplitFeatures:
    """Open the first `views` of a store (None: all): the frozen maps, or else each split's own.

    Raises SettingsError when the store has fewer.
    """
    if views is not None and views > store.shape.views:
        raise SettingsError(
            f"views (={views}) must be at most the {store.shape.views} of {store.path}; "
            "run `lymphfeat extract --views` for more."
        )

    def read(name: str) -> Features:
        return Features(
            store.features(name)[:, :views],  # (N, V, C, h, w)
            store.pooled(name)[:, :views],
            store.offsets,
            store.ids,
            store.labels,
            dtype=dtype,
            device=device,
        )

    if FROZEN in store.feature_sets:
        return read(FROZEN)
    return SplitFeatures(store.splits, store.ids, store.n_images, lambda split: read(split.id))


def _witnesses(store: FeatureStore, path: Path) -> NDArray[np.bool_]:
    """Return which of the store's images are witnesses: (N,)."""
    images = Truth.read([path]).images
    if images is None:
        raise CohortError(f"{path}: must have the columns ID, FILE, IS_WITNESS to score images.")
    known = images.set_index(["patient", "image"])["witness"]
    names = pd.MultiIndex.from_arrays(
        [np.repeat(store.ids, store.n_images), np.array(store.image_names)]
    )
    missing = names[~names.isin(known.index)]
    if len(missing):
        patient, image = missing[0]
        raise CohortError(
            f"{path}: must name every image of {store.path}; {len(missing)} are missing, the first "
            f"is {image} of {patient}. Is it the truth of another cohort?"
        )
    return known.loc[names].to_numpy(bool)


def _write(
    outcome: Outcome, store: FeatureStore, settings: FitSettings, folder: Path, save: bool
) -> None:
    config = {
        "format": RUN_FORMAT,
        "lymphfeat": __version__,
        "torch": torch.__version__,
        "settings": asdict(settings),
        "heads": {head_name(head): asdict(head) for head in outcome.heads},
        "store": {
            "path": str(store.path),
            "recipe_sha256": store.recipe_sha256,
            "recipe": dict(store.recipe),
        },
        "thresholds": outcome.thresholds,
    }
    outcome.epochs.to_csv(folder / "epochs.csv", index=False, float_format="%.6g")
    outcome.predictions.to_csv(folder / "predictions.csv", index=False, float_format="%.6g")
    outcome.runs.drop(columns="ba_best_epochs", errors="ignore").to_csv(
        folder / "runs.csv", index=False, float_format="%.6g"
    )
    write_splits(outcome.splits, folder / "splits.json")
    provenance = json_text(RunProvenance.of(store).to_json())
    (folder / PROVENANCE_FILE).write_text(provenance, encoding="utf-8")
    summary = json_text(outcome.summary.to_dict("records"), indent=1)
    (folder / "summary.json").write_text(summary, encoding="utf-8")
    (folder / "warnings.txt").write_text(
        "".join(f"{line}\n" for line in outcome.warnings), encoding="utf-8"
    )
    draw_summary(outcome, settings, folder / "summary.png")
    if save:
        tensors = _tensors(outcome)
        replace_file(folder / HEADS_FILE, lambda path: save_file(tensors, path))
    (folder / "config.json").write_text(json_text(config, indent=1), encoding="utf-8")


def _tensors(outcome: Outcome) -> dict[str, NDArray[np.float32]]:
    """Name every fit's weights `<head>/<split>/<tensor>`."""
    fitted = outcome.fitted
    tensors: dict[str, NDArray[np.float32]] = {}
    for i, fit in enumerate(fitted.fits):
        prefix = f"{head_name(fit.head)}/{fit.split.id}"
        if i in fitted.networks:
            state = fitted.networks[i].state_dict()
            tensors |= {f"{prefix}/{name}": value.numpy() for name, value in state.items()}
            continue
        tensors[f"{prefix}/weight"] = fitted.weight[i]
        tensors[f"{prefix}/bias"] = fitted.bias[i : i + 1]
        if fit.head.agg == "bnsigmoid":
            for name, values in fitted.extras.items():
                tensors[f"{prefix}/{name}"] = values[i : i + 1]
    return tensors


@dataclass(frozen=True, kw_only=True)
class BothRuns:
    """The same heads under both protocols.

    table: head, kind, report and honest, each with its corrected 95 % interval (`…_low`, `…_high`),
        report_half_width_uncorrected and …_published (too narrow), optimism (report − honest) with
        its 95 % bootstrap interval, and by_epochs (what of it comes of the choice of epochs:
        report − its last epoch).
    """

    report: Run
    honest: Run
    table: pd.DataFrame


def fit_both(
    store: FeatureStore,
    heads: Sequence[HeadSettings],
    settings: FitSettings,
    out: Path,
    *,
    splits: Sequence[Split] | None = None,
    truth: Path | None = None,
    save: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> BothRuns:
    """Run `fit_heads` under either protocol into `out`/report and `out`/honest, and set them off.

    Fusions and nested epochs, which need training patients' out-of-fold probabilities, are of the
    honest run alone. Also writes optimism.csv and optimism.png. The folder is replaced as a whole,
    at the end; raises SettingsError as `fit_heads` does.
    """
    join_processes()
    with result_folder(out, RUN, force=force, writes=is_first()) as folder:
        runs = {
            protocol: fit_heads(
                store,
                heads,
                _under(settings, protocol),
                folder / protocol,
                splits=splits,
                truth=truth,
                save=save,
                progress=progress,
            )
            for protocol in ("honest", "report")  # the honest one first: it refuses more
        }
        table = set_off(runs["report"], runs["honest"])
        if is_first():
            csv, png = (folder / name for name in OPTIMISM_FILES)
            table.to_csv(csv, index=False, float_format="%.6g")
            draw_optimism(table, png)
    report, honest = (replace(runs[name], folder=out / name) for name in ("report", "honest"))
    return BothRuns(report=report, honest=honest, table=table)


def _under(settings: FitSettings, protocol: str) -> FitSettings:
    if protocol == "report":
        return replace(settings, protocol="report", epoch="last", fusions=())
    return replace(settings, protocol="honest")


def set_off(report: Run, honest: Run) -> pd.DataFrame:
    """Join the summaries of both protocols, in the order of the report's."""
    both = report.outcome.summary.merge(
        honest.outcome.summary, on="head", suffixes=("_report", "_honest")
    )
    low, high = np.transpose([bootstrap_optimism(report, honest, head) for head in both["head"]])
    return pd.DataFrame(
        {
            "head": both["head"],
            "kind": both["kind_report"],
            "report": both["ba_report"],
            "report_low": both["ba_low_report"],
            "report_high": both["ba_high_report"],
            "report_half_width_uncorrected": both["ba_half_width_uncorrected"],
            "report_half_width_published": both["ba_half_width_published"],
            "honest": both["ba_honest"],
            "honest_low": both["ba_low_honest"],
            "honest_high": both["ba_high_honest"],
            "optimism": both["ba_report"] - both["ba_honest"],
            "optimism_low": low,
            "optimism_high": high,
            "by_epochs": both["ba_report"] - both["ba_last"],
        }
    )


def bootstrap_optimism(
    report: Run, honest: Run, head: str, *, oracle: bool = False
) -> tuple[float, float]:
    """Return the 95 % interval of a row's report − honest balanced accuracy.

    See `optimism_interval`; with `oracle` the report's thresholds are chosen as well.
    """
    return optimism_interval(
        report.outcome.patients.labels,
        report_calls(report.outcome, head, every=report.settings.evaluate_every, oracle=oracle),
        honest_calls(honest.outcome, head),
        seed=report.settings.seed,
    )
