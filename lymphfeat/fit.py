"""fit-head: every head on a feature store under a protocol, and the run folder it leaves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lymphfeat import __version__
from lymphfeat.backbones import choose_device, choose_precision, precision_name
from lymphfeat.compute import cpu_threads, whole_float32
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.files import ResultKind, files_in, replace_file, result_folder
from lymphfeat.guards import find_shared_images
from lymphfeat.heads import head_name
from lymphfeat.processes import is_first, join_processes
from lymphfeat.progress import Progress, silent
from lymphfeat.protocol import Outcome, SplitFeatures, run_protocol, witness_aucs
from lymphfeat.run_provenance import PROVENANCE_FILE, RunProvenance
from lymphfeat.settings import FitSettings, HeadSettings
from lymphfeat.splits import Split, write_splits
from lymphfeat.store import FeatureStore
from lymphfeat.strict_json import json_text
from lymphfeat.summary_figure import draw_summary
from lymphfeat.training import Features
from lymphfeat.truth import Truth

RUN_FORMAT = "lymphfeat-run"
FROZEN = "frozen"
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
    """A run folder and what is in it."""

    folder: Path
    settings: FitSettings
    outcome: Outcome

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files in the folder."""
        return files_in(self.folder)


def fit_head(
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
) -> Run:
    """Fit heads on a store under a protocol and write the run folder `out` (DESIGN §6).

    `splits` are taken in place of the protocol's own, as from another run's splits.json. `truth`
    names witness images: the table then also says how well each head finds them. `save` keeps the
    heads' weights. Under torchrun the fits are shared out, and the first process writes. The folder
    is replaced as a whole, at the end. Raises SettingsError when a run is there already and `force`
    is not set, or anything else.
    """
    device = choose_device(settings.device)
    witness = None if truth is None else _witnesses(store, truth)
    join_processes()
    with (
        result_folder(out, RUN, force=force, writes=is_first()) as folder,
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
        if is_first():
            _write(outcome, store, settings, folder, save)
    return Run(folder=out, settings=settings, outcome=outcome)


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
            "`lymphfeat extract --views` makes more."
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
        raise CohortError(f"{path}: columns must hold ID, FILE, IS_WITNESS to score images.")
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
