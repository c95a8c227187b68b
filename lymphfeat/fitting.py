"""fit-head: heads fitted on a feature store under a protocol, and the run folder."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lymphfeat import __version__
from lymphfeat.cohort.groups import Groups, group_splits, read_groups
from lymphfeat.cohort.provenance import refuse_seen
from lymphfeat.cohort.splits import Plan, Split, splits_to_json, write_splits
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.evaluation.groups import check_groups, measure_by_group, warn_of_groups
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.evaluation.leakage import find_shared_images, refuse_shared_images
from lymphfeat.evaluation.optimism import honest_calls, optimism_interval, report_calls
from lymphfeat.evaluation.protocol import Outcome, Tell, run_protocol, untold, witness_aucs
from lymphfeat.evaluation.providers import FeatureProvider, load_features
from lymphfeat.evaluation.recorded_run import RecordedRun
from lymphfeat.evaluation.run_provenance import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    RUN_FILES,
    RUN_FORMAT,
    SPLITS_FILE,
    SUMMARY_FILE,
    RunProvenance,
)
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.heads.engine.kept import KeptFits
from lymphfeat.heads.grid import expand, head_name, resolve
from lymphfeat.heads.registry import DistributionAggregator, aggregator_of
from lymphfeat.runtime.circumstances import circumstances
from lymphfeat.runtime.devices import (
    choose_device,
    choose_precision,
    cpu_threads,
    precision_name,
    whole_float32,
)
from lymphfeat.runtime.files import (
    KEPT_FOLDER,
    ResultKind,
    files_in,
    replace_file,
    result_folder,
    unfinished_folder,
)
from lymphfeat.runtime.processes import count, is_first, join_processes
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.settings import FitSettings, HeadGrid, HeadSettings, require

Store = FeatureStore | str | os.PathLike[str]  # open, or its path
HEADS_FILE = "heads.safetensors"
BOTH = ("report", "honest")  # folders of a run of both protocols
OPTIMISM_FILES = ("optimism.csv", "optimism.png")
GROUPS_FILE = "groups.csv"  # with groups only
_ONE_RUN = (*RUN_FILES, HEADS_FILE, GROUPS_FILE)
RUN = ResultKind(
    name="run",
    marks=(CONFIG_FILE, *OPTIMISM_FILES),
    files=(
        *_ONE_RUN,
        *OPTIMISM_FILES,
        *(f"{protocol}/{name}" for protocol in BOTH for name in _ONE_RUN),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The results of `fit_heads`, and their folder (None if none was written)."""

    folder: Path | None
    settings: FitSettings
    outcome: Outcome
    by_group: pd.DataFrame | None = None  # figures of every row in every group, of `groups`

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files in the folder."""
        return files_in(self.folder) if self.folder else ()

    @property
    def summary(self) -> pd.DataFrame:
        """Return one row per head, the best first: its metrics with their intervals."""
        return self.outcome.summary


def fit_heads(
    store: Store | Sequence[Store],
    heads: Sequence[HeadSettings] | HeadGrid = (),
    settings: FitSettings | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    agg: str | Sequence[str] = (),
    splits: Sequence[Split] | None = None,
    truth: str | os.PathLike[str] | None = None,
    save: bool = False,
    force: bool = False,
    tell: Tell = untold,
    progress: Progress = silent,
) -> Run:
    """Fit heads on a store under a protocol; with `out` write that run folder.

    Several stores of the same images, of different backbones, are read together by heads of the
    family `distribution` (and `mean`, solved exactly); other heads read one store.

    `heads` is a list of heads or a grid; `agg` names one or several aggregators instead, with
    default settings. Without either, top-k is fitted.

    `splits` replace the protocol's own, for example those of another run's splits.json. With
    `settings.groups` no group is divided, and the run has figures of every group (`by_group`).
    `truth` is a CSV of witness images: the summary then also says how well each head finds them.
    `save` keeps the heads' weights. Under torchrun the processes share the fits, and the first one
    writes. The folder is replaced as a whole, at the end. Until then finished heads are kept beside
    it: an interrupted call continues with them when it is made again (not under torchrun). `tell`
    is called with each `FinishedHead`.

    Raises SettingsError if `out` may not be written (it holds a run and `force` is not set, or it
    holds anything else) or belongs to an unfinished run of other settings, CohortError for a truth
    of other images, and LeakageError if a split would be measured on patients whose labels or
    images were trained on.

    >>> lf.fit_heads("cache/features.h5", agg="mean+std").summary
    """
    if save and out is None:
        raise SettingsError("save (=True) must go with out, the run folder that keeps the weights.")
    heads = _choose_heads(heads, agg)
    request = _Request.of(store, heads, settings or FitSettings(), splits, truth, save=save)
    join_processes()
    with _run_folder(out, force=force) as folder:
        kept = (
            None
            if out is None
            else request.kept_in(Path(out), request.settings.protocol, force=force)
        )
        run = request.run(folder, kept, tell, progress)
    return replace(run, folder=None if out is None else Path(out))


def holds_run(
    folder: str | os.PathLike[str],
    store: Store | Sequence[Store],
    heads: Sequence[HeadSettings],
    settings: FitSettings,
    *,
    splits: Sequence[Split] | None = None,
    truth: str | os.PathLike[str] | None = None,
    save: bool = False,
) -> bool:
    """Return whether a folder holds the finished run that `fit_heads` would write now."""
    folder = Path(folder)
    try:
        config = RecordedRun.read(folder).config
    except SettingsError:
        return False
    request = _Request.of(store, _choose_heads(heads, ()), settings, splits, truth, save=save)
    same = config.get("request") == request.fingerprint()
    return same and (not save or (folder / HEADS_FILE).exists())


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is to be fitted, on what."""

    stores: Sequence[FeatureStore]
    contents: Mapping[str, Mapping[str, str]]  # of the stores: recipe and hash
    heads: Sequence[HeadSettings]
    settings: FitSettings
    splits: Sequence[Split] | None
    truth: Path | None
    witness: NDArray[np.bool_] | None
    save: bool
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        store: Store | Sequence[Store],
        heads: Sequence[HeadSettings],
        settings: FitSettings,
        splits: Sequence[Split] | None,
        truth: str | os.PathLike[str] | None,
        *,
        save: bool,
    ) -> "_Request":
        """Open stores and choose where to compute, and how precisely."""
        device = choose_device(settings.device)
        dtype = choose_precision(settings.precision, device)
        stores = _open_stores(store, heads)
        return cls(
            stores=stores,
            contents={str(n): _contents(store) for n, store in enumerate(stores, 1)},
            heads=heads,
            settings=replace(settings, precision=precision_name(dtype)),
            splits=splits,
            truth=None if truth is None else Path(truth),
            witness=None if truth is None else _witnesses(stores[0], Path(truth)),
            save=save,
            device=device,
            dtype=dtype,
        )

    def kept_in(self, out: Path, protocol: str, *, force: bool) -> KeptFits | None:
        """Find what an interrupted run of the same request kept; under torchrun nothing is."""
        if count() > 1:
            return None
        folder = unfinished_folder(out) / KEPT_FOLDER
        return KeptFits(folder, {"protocol": protocol, **self._identity()}, force=force)

    def run(
        self, folder: Path | None, kept: KeptFits | None, tell: Tell, progress: Progress
    ) -> Run:
        """Fit, measure and, in a process that writes, write to a folder."""
        settings = self.settings
        with cpu_threads(settings.threads), whole_float32():
            provenance = RunProvenance.of(self.stores)
            features = load_features(
                *(self.stores, self.dtype, self.device),
                views=settings.views,
                memory=settings.memory_bytes,
            )
            groups = self.groups()
            plan = features.plan(settings, self.splits or self.group_splits(groups))
            if groups is not None:
                check_groups(plan, features.ids, features.labels, groups)
            _refuse_leaks(plan.outer, self.stores[0], provenance, settings)
            outcome = run_protocol(
                features,
                plan,
                self.heads,
                settings,
                table=self.stores[0].table,
                kept=kept,
                tell=tell,
                progress=progress,
            )
            _add_columns(outcome, features, settings, self.witness)
            by_group = None if groups is None else _by_group(outcome, groups)
            if groups is not None:
                told = warn_of_groups(features.labels, groups, settings.groups)
                outcome = replace(outcome, warnings=(*outcome.warnings, *told))
            run = Run(folder=folder, settings=settings, outcome=outcome, by_group=by_group)
            if folder:
                _write(run, self.stores, provenance, folder, self._origin())
            if folder and self.save:
                tensors = _tensors(outcome)
                replace_file(folder / HEADS_FILE, lambda path: save_file(tensors, path))
        return run

    def groups(self) -> Groups | None:
        """Return the group of every patient (P,); None if each is by itself."""
        column = self.settings.groups
        return read_groups(self.stores[0].table, column) if column else None

    def group_splits(self, groups: Groups | None) -> Sequence[Split] | None:
        """Return splits that divide no group; None for those of the protocol or the features."""
        store, settings = self.stores[0], self.settings
        if groups is None or any(FROZEN not in each.feature_sets for each in self.stores):
            return None
        return group_splits(
            store.ids,
            store.labels,
            groups,
            how=settings.group_folds,
            folds=settings.folds,
            seeds=settings.seeds,
            seed=settings.seed,
        )

    def under(self, protocol: str) -> "_Request":
        """Return the same under a protocol, without what only the other one has."""
        settings = replace(self.settings, protocol="honest")
        if protocol == "report":
            settings = replace(self.settings, protocol="report", epoch="last", fusions=())
        return replace(self, settings=settings)

    def _origin(self) -> dict[str, object]:
        """Return what else a run must say to be repeated, and where it was computed."""
        inner = Plan.recorded(self.splits).inner_once if self.splits else []
        return {
            **({"truth": str(self.truth)} if self.truth else {}),
            **({"inner_splits": splits_to_json(inner)} if inner else {}),
            "request": self.fingerprint(),
            "computed": circumstances(self.device),
        }

    def fingerprint(self) -> str:
        """Return a hash of all that the results depend on."""
        truth = None if self.truth is None else hashlib.sha256(self.truth.read_bytes()).hexdigest()
        return _hash_of([self.settings.protocol, self._identity(), truth])

    def _identity(self) -> dict[str, Any]:
        """Collect what the fits depend on; where they are computed may change."""
        incidental = ("protocol", "device", "threads", "memory", "allow_shared_images")
        fields = {k: v for k, v in asdict(self.settings).items() if k not in incidental}
        return {
            "settings": fields,
            "heads": {head_name(head): "fitted" for head in self.heads},  # names say all
            "splits": None if self.splits is None else _hash_of(map(asdict, self.splits)),
            "stores": self.contents,
            "versions": {"lymphfeat": __version__, "torch": torch.__version__},
        }


def _contents(store: FeatureStore) -> dict[str, str]:
    """Return the recipe and a hash of the patients and of the averages of all maps."""
    digest = hashlib.blake2b(_hash_of([store.ids, store.labels.tolist()]).encode(), digest_size=16)
    for name in sorted(store.feature_sets):
        for _, pooled in store.pooled_blocks(name):
            digest.update(pooled.data)
    return {"recipe": store.recipe_sha256, "content": digest.hexdigest()}


def _hash_of(values: Iterable[object]) -> str:
    return hashlib.blake2b(json_text(list(values)).encode(), digest_size=16).hexdigest()


@contextmanager
def _run_folder(out: str | os.PathLike[str] | None, *, force: bool) -> Iterator[Path | None]:
    """Yield the folder to write a run to, or None in a process that writes nothing."""
    if out is None:
        yield None
        return
    with result_folder(
        Path(out), RUN, force=force, resumes=(KEPT_FOLDER,), writes=is_first()
    ) as folder:
        yield folder if is_first() else None


def _refuse_leaks(
    splits: Sequence[Split], store: FeatureStore, provenance: RunProvenance, settings: FitSettings
) -> None:
    """Raise LeakageError for splits measured on labels or images that were trained on."""
    refuse_seen(
        provenance.seen(splits),
        "the backbone of these features",
        "Extract with per-split fine-tuning, or with weights not trained on them.",
    )
    if not settings.allow_shared_images:
        refuse_shared_images(splits, find_shared_images(store, next(iter(store.feature_sets))))


def _by_group(outcome: Outcome, groups: Groups) -> pd.DataFrame:
    """Measure every row in every group, in the first repeat."""
    first = [split.id for split in outcome.splits if split.repeat == outcome.splits[0].repeat]
    predictions = outcome.predictions
    group_of = dict(zip(outcome.patients.ids.tolist(), groups.tolist(), strict=True))
    own = predictions[predictions["split"].isin(first)]
    return measure_by_group(own, group_of, outcome.summary["head"].tolist())


def _add_columns(
    outcome: Outcome,
    features: FeatureProvider,
    settings: FitSettings,
    witness: NDArray[np.bool_] | None,
) -> None:
    """Add to the summary what is measured only in bfloat16, or with known witnesses (N,)."""
    heads = outcome.summary["head"]
    if settings.precision != "float32":
        outcome.summary["bfloat16_change"] = heads.map(_roundings(outcome))
    if witness is not None and witness.any():
        outcome.summary["witness_auc"] = heads.map(witness_aucs(outcome, features, witness))


def _open_stores(
    store: Store | Sequence[Store], heads: Sequence[HeadSettings]
) -> list[FeatureStore]:
    """Open one store, or several; raises SettingsError for a head that cannot read several."""
    given = [store] if isinstance(store, FeatureStore | str | os.PathLike) else list(store)
    if len(given) != 1:
        require(bool(given), "store (=[]) must name at least one feature store.")
        for head in heads:
            aggregator_of(head, DistributionAggregator)
    return [each if isinstance(each, FeatureStore) else FeatureStore.open(each) for each in given]


def _choose_heads(
    heads: Sequence[HeadSettings] | HeadGrid, agg: str | Sequence[str]
) -> list[HeadSettings]:
    if heads and agg:
        raise SettingsError(f"agg (={agg}) must not go with heads; give one of them.")
    if isinstance(heads, HeadGrid):
        return expand(heads)
    if heads:
        return list(dict.fromkeys(resolve(head, solver="exact") for head in heads))
    names = (agg,) if isinstance(agg, str) else tuple(agg)
    return expand(HeadGrid(agg=names) if names else HeadGrid())


def _roundings(outcome: Outcome) -> dict[str, float]:
    """Return for each head the largest change of a patient's last probability by bfloat16."""
    largest: dict[str, float] = {}
    for fit, change in zip(outcome.fitted.fits, outcome.fitted.rounding.tolist(), strict=True):
        name = head_name(fit.head)
        largest[name] = max(change, largest.get(name, 0.0))
    return largest


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
    run: Run,
    stores: Sequence[FeatureStore],
    provenance: RunProvenance,
    folder: Path,
    origin: Mapping[str, object],
) -> None:
    from lymphfeat.plots.summary import draw_summary  # matplotlib is slow: training need not wait

    outcome = run.outcome
    runs = outcome.runs.drop(columns="ba_best_epochs", errors="ignore")
    tables = {"epochs": outcome.epochs, "predictions": outcome.predictions, "runs": runs}
    if run.by_group is not None:
        tables["groups"] = run.by_group
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    write_splits(outcome.splits, folder / SPLITS_FILE)
    draw_summary(outcome, run.settings, folder / "summary.png")
    texts = {
        PROVENANCE_FILE: json_text(provenance.to_json()),
        SUMMARY_FILE: json_text(outcome.summary.to_dict("records"), indent=1),
        "warnings.txt": "".join(f"{line}\n" for line in outcome.warnings),
        CONFIG_FILE: json_text({**_config(run, stores), **origin}, indent=1),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _config(run: Run, stores: Sequence[FeatureStore]) -> dict[str, object]:
    first, *others = (
        {
            "path": str(store.path),
            "recipe_sha256": store.recipe_sha256,
            "recipe": dict(store.recipe),
        }
        for store in stores
    )
    return {
        "format": RUN_FORMAT,
        "lymphfeat": __version__,
        "torch": torch.__version__,
        "settings": asdict(run.settings),
        "heads": {head_name(head): asdict(head) for head in run.outcome.heads},
        "store": first,
        **({"other_stores": others} if others else {}),
        "thresholds": run.outcome.thresholds,
    }


def _tensors(outcome: Outcome) -> dict[str, NDArray[np.float32]]:
    """Return the weights of all fits, named `<head>/<split>/<tensor>`."""
    fitted = outcome.fitted
    tensors: dict[str, NDArray[np.float32]] = {}
    for i, fit in enumerate(fitted.fits):
        prefix = f"{head_name(fit.head)}/{fit.split.id}"
        tensors |= {f"{prefix}/{name}": value for name, value in fitted.tensors(i).items()}
    return tensors


@dataclass(frozen=True, kw_only=True)
class BothRuns:
    """The results of `fit_both`.

    table: head, kind, the balanced accuracies report and honest, each with its corrected 95 %
        interval (`…_low`, `…_high`), report_half_width_uncorrected and …_published (too narrow),
        optimism (report − honest) with its 95 % bootstrap interval, and by_epochs (the part that is
        due to the choice of epochs: report − its last epoch).
    """

    report: Run
    honest: Run
    table: pd.DataFrame


class FitOptions(TypedDict, total=False):
    """The options that `fit_both` passes to `fit_heads`."""

    splits: Sequence[Split] | None
    truth: str | os.PathLike[str] | None
    save: bool
    tell: Tell
    progress: Progress


def fit_both(
    store: Store | Sequence[Store],
    heads: Sequence[HeadSettings] | HeadGrid,
    settings: FitSettings | None,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    **options: Unpack[FitOptions],
) -> BothRuns:
    """Run `fit_heads` under both protocols into `out`/report and `out`/honest, and compare them.

    Fusions and nested epochs need out-of-fold probabilities of training patients, so only the
    honest run has them. Also writes optimism.csv and optimism.png. The folder is replaced as a
    whole, at the end; raises the errors of `fit_heads`.
    """
    if settings and settings.groups:
        raise SettingsError(
            f"groups (={settings.groups}) must go with --protocol honest; report takes random "
            "halves."
        )
    folder, heads = Path(out), _choose_heads(heads, ())
    tell, progress = options.get("tell", untold), options.get("progress", silent)
    request = _Request.of(
        store,
        heads,
        settings or FitSettings(),
        options.get("splits"),
        options.get("truth"),
        save=options.get("save", False),
    )
    join_processes()
    with _run_folder(folder, force=force) as new:
        kept = request.kept_in(folder, "both", force=force)
        honest, report = (  # the honest one first: it refuses more
            request.under(name).run(_subfolder(new, name), kept, tell, progress)
            for name in ("honest", "report")
        )
        table = set_off(report, honest)
        if new:
            _write_optimism(table, new)
    return BothRuns(
        report=replace(report, folder=folder / "report"),
        honest=replace(honest, folder=folder / "honest"),
        table=table,
    )


def _write_optimism(table: pd.DataFrame, folder: Path) -> None:
    from lymphfeat.plots.optimism import draw_optimism  # matplotlib is slow

    csv, png = (folder / name for name in OPTIMISM_FILES)
    table.to_csv(csv, index=False, float_format="%.6g")
    draw_optimism(table, png)


def _subfolder(folder: Path | None, name: str) -> Path | None:
    if folder:
        (folder / name).mkdir()
    return folder and folder / name


def set_off(report: Run, honest: Run) -> pd.DataFrame:
    """Return the table of `BothRuns`, in the order of the report's summary."""
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
    """Return the 95 % bootstrap interval of report − honest balanced accuracy of a row.

    See `optimism_interval`; with `oracle` the report chooses thresholds, too.
    """
    return optimism_interval(
        report.outcome.patients.labels,
        report_calls(report.outcome, head, every=report.settings.evaluate_every, oracle=oracle),
        honest_calls(honest.outcome, head),
        seed=report.settings.seed,
    )
