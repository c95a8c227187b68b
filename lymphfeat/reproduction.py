"""reproduce: the report's results on a cohort, next to honest and published ones (METHOD §7)."""

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.provenance import refuse_seen_by_weights
from lymphfeat.extraction import extract
from lymphfeat.features.backbones import find_provenance
from lymphfeat.features.store import FeatureStore
from lymphfeat.fitting import RUN, BothRuns, bootstrap_optimism, fit_both
from lymphfeat.heads.grid import head_name, resolve
from lymphfeat.plots.reproduction import FIGURE_5, draw_depths, draw_subsets
from lymphfeat.runtime.files import ResultKind, files_in, result_folder
from lymphfeat.runtime.processes import is_first, join_processes
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import (
    BackboneSettings,
    ExtractSettings,
    FitSettings,
    HeadSettings,
    Precision,
)

BACKBONES = ("resnet18", "resnet34", "resnet50")
SUBSET = 10  # images per patient, drawn again at every step (report §4.4)
SUBSET_EPOCHS = 3  # with subsets, times as many epochs, of which every third is evaluated
TABLE_FILE, FIGURES = "table.csv", ("figure3.png", "figure5.png")
REPRODUCTION = ResultKind(
    name="reproduction",
    marks=(TABLE_FILE,),
    files=(TABLE_FILE, *FIGURES, *(f"resnet*/{name}" for name in RUN.files)),
)


@dataclass(frozen=True)
class PublishedResult:
    """A balanced accuracy in the report, and the head that reproduces it."""

    name: str
    published: float
    published_half_width: float
    agg: str
    _: KW_ONLY
    k_agg: int = 10
    backbone: str = "resnet18"
    subset: bool = False  # of SUBSET images per patient
    oracle: bool = False  # its threshold was chosen on the patients measured

    @property
    def head(self) -> HeadSettings:
        return resolve(HeadSettings(agg=self.agg, k_agg=self.k_agg))


PUBLISHED = (
    PublishedResult("top-1", 0.788, 0.024, "top1", oracle=True),
    PublishedResult("top-5", 0.843, 0.024, "topk", k_agg=5, oracle=True),
    PublishedResult("top-10", 0.861, 0.015, "topk", oracle=True),
    PublishedResult("top&bottom-5", 0.838, 0.020, "topbottomk", k_agg=5, oracle=True),
    PublishedResult("top&bottom-10", 0.848, 0.022, "topbottomk", oracle=True),
    PublishedResult("bnsigmoid, ResNet-18", 0.814, 0.008, "bnsigmoid"),
    PublishedResult("bnsigmoid, ResNet-34", 0.810, 0.009, "bnsigmoid", backbone="resnet34"),
    PublishedResult("bnsigmoid, ResNet-50", 0.806, 0.009, "bnsigmoid", backbone="resnet50"),
    PublishedResult("mean, all images", 0.811, 0.009, "mean"),
    PublishedResult("mean, 10 images", 0.802, 0.009, "mean", subset=True),
    PublishedResult("bnsigmoid, 10 images", 0.800, 0.009, "bnsigmoid", subset=True),
)


@dataclass(frozen=True, kw_only=True)
class ReproductionSettings:
    """Which of the report's comparisons are run, and for how long."""

    backbones: tuple[str, ...] = BACKBONES
    weights: Mapping[str, str] = field(default_factory=dict)  # by backbone; "" is for all others
    fit: FitSettings = field(default_factory=FitSettings)
    batch_size: int = 64  # images, of the extraction
    precision: Precision = "auto"  # of the extraction


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The results of `reproduce_report`.

    table: one row per published result: name, published, published_half_width (as published, too
        narrow), report (under the report's protocol and the row's own threshold convention) and
        honest, each with the corrected 95 % interval (`…_low`, `…_high`), optimism with its
        bootstrap interval, threshold (".5" or "chosen on the patients measured"), and the log
        losses likewise.
    """

    table: pd.DataFrame
    warnings: tuple[str, ...]
    files: tuple[Path, ...]


def reproduce_report(
    cohort: Cohort,
    settings: ReproductionSettings,
    out: str | os.PathLike[str],
    cache: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Reproduction:
    """Run the report's comparisons as heads on frozen maps, under both protocols.

    Feature stores are written to `cache`, one per backbone, and used again. Runs, table.csv,
    figure3.png and figure5.png are written to `out`, which is replaced as a whole, at the end. The
    report trained the whole network, which is one more reason for different results. Raises the
    errors of `extract` and `fit_heads`; LeakageError, before anything is extracted, for weights
    that learnt from labels of the cohort.
    """
    folder = Path(out)
    for backbone in settings.backbones:
        _refuse_seen(cohort, _extraction(settings, backbone).backbone)
    join_processes()
    with result_folder(folder, REPRODUCTION, force=force, writes=is_first()) as new:
        table, warnings = _reproduce(cohort, settings, new, Path(cache), progress)
        if is_first():
            _write(table, new)
    return Reproduction(table=table, warnings=warnings, files=files_in(folder))


def _reproduce(
    cohort: Cohort,
    settings: ReproductionSettings,
    out: Path,
    cache: Path,
    progress: Progress,
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Fit the heads of each backbone together; return the table and the warnings."""
    wanted = [row for row in PUBLISHED if row.backbone in settings.backbones]
    groups: dict[tuple[str, bool], list[PublishedResult]] = {}
    for row in wanted:
        groups.setdefault((row.backbone, row.subset), []).append(row)
    found: dict[str, dict[str, object]] = {}
    warnings: list[str] = []
    for (backbone, subset), rows in groups.items():
        extraction = _extraction(settings, backbone)
        store = extract(cohort, cache / f"{backbone}.h5", extraction, progress=progress)
        heads = list(dict.fromkeys(row.head for row in rows))
        fit = _subset(settings.fit) if subset else settings.fit
        name = f"{backbone}-{SUBSET}-images" if subset else backbone
        both = fit_both(store, heads, fit, out / name, progress=progress)
        warnings += [f"{name}: {line}" for line in _find_warnings(store, both)]
        found |= {row.name: _reproduced(row, both) for row in rows}
    return pd.DataFrame([found[row.name] for row in wanted]), tuple(warnings)


def _find_warnings(store: FeatureStore, both: BothRuns) -> list[str]:
    random = ["random weights; choose others with --weights for meaningful results."]
    return [
        *(random if store.recipe["weights"] == "none" else ()),
        *both.honest.outcome.warnings,
    ]


def _refuse_seen(cohort: Cohort, backbone: BackboneSettings) -> None:
    """Raise LeakageError for weights that learnt from labels of the cohort."""
    provenance = find_provenance(backbone.weights, backbone.backbone)
    seen = provenance.labelled(patient_keys(cohort.labelled()))
    refuse_seen_by_weights(seen, backbone.weights)


def _extraction(settings: ReproductionSettings, backbone: str) -> ExtractSettings:
    default = settings.weights.get("", BackboneSettings().weights)
    return ExtractSettings(
        backbone=BackboneSettings(
            backbone=backbone, weights=settings.weights.get(backbone, default)
        ),
        batch_size=settings.batch_size,
        precision=settings.precision,
        device=settings.fit.device,
        threads=settings.fit.threads,
    )


def _subset(settings: FitSettings) -> FitSettings:
    return replace(
        settings,
        images_per_patient=SUBSET,
        epochs=SUBSET_EPOCHS * settings.epochs,
        evaluate_every=SUBSET_EPOCHS,
    )


def _row_of(summary: pd.DataFrame, row: PublishedResult) -> dict[str, float]:
    (found,) = summary[summary["head"] == head_name(row.head)].to_dict("records")
    return {str(name): value for name, value in found.items()}


def _reproduced(row: PublishedResult, both: BothRuns) -> dict[str, object]:
    report, honest = (_row_of(run.outcome.summary, row) for run in (both.report, both.honest))
    ours = "ba_oracle" if row.oracle else "ba"
    low, high = bootstrap_optimism(both.report, both.honest, head_name(row.head), oracle=row.oracle)
    return {
        **{k: v for k, v in asdict(row).items() if not k.startswith("published")},
        "threshold": "chosen on the patients measured" if row.oracle else ".5",
        "published": row.published,
        "published_half_width": row.published_half_width,
        **_with_interval("report", report, ours),
        **_with_interval("honest", honest, "ba"),
        "optimism": report[ours] - honest["ba"],
        "optimism_low": low,
        "optimism_high": high,
        **_with_interval("report_log_loss", report, "log_loss_best"),
        **_with_interval("honest_log_loss", honest, "log_loss"),
    }


def _with_interval(name: str, row: Mapping[str, float], metric: str) -> dict[str, float]:
    """Return a metric of a summary and its interval under another name."""
    return {f"{name}{end}": row[f"{metric}{end}"] for end in ("", "_low", "_high")}


def _write(table: pd.DataFrame, folder: Path) -> None:
    table.to_csv(folder / TABLE_FILE, index=False, float_format="%.6g")
    depths = table[(table["agg"] == "bnsigmoid") & ~table["subset"]]
    subsets = table[table["name"].isin(FIGURE_5)]
    for name, draw, rows in zip(
        FIGURES, (draw_depths, draw_subsets), (depths, subsets), strict=True
    ):
        if len(rows):
            draw(rows, folder / name)
