"""The report's results on a given cohort, next to honest ones and the published (METHOD §7)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.provenance import refuse_seen_by_weights
from lymphfeat.extraction import extract
from lymphfeat.features.backbones import find_provenance
from lymphfeat.fitting import RUN, BothRuns, bootstrap_optimism, fit_both
from lymphfeat.heads.grid import head_name, resolve
from lymphfeat.plots.reproduction import FIGURE_5, draw_depths, draw_subsets
from lymphfeat.runtime.files import ResultKind, files_in, result_folder
from lymphfeat.runtime.processes import is_first, join_processes
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import BackboneSettings, ExtractSettings, FitSettings, HeadSettings

BACKBONES = ("resnet18", "resnet34", "resnet50")
SUBSET = 10  # images of a patient, drawn anew at every step (report §4.4)
SUBSET_EPOCHS = 3  # times as many epochs then, of which every third is looked at
TABLE_FILE, FIGURES = "table.csv", ("figure3.png", "figure5.png")
REPRODUCTION = ResultKind(
    name="reproduction",
    marks=(TABLE_FILE,),
    files=(TABLE_FILE, *FIGURES, *(f"resnet*/{name}" for name in RUN.files)),
)


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """One published figure, and what gives ours."""

    name: str
    agg: str
    k_agg: int = 10
    backbone: str = "resnet18"
    subset: bool = False
    published: float
    published_half_width: float
    oracle: bool = False  # its threshold was chosen on the patients measured

    @property
    def head(self) -> HeadSettings:
        return resolve(HeadSettings(agg=self.agg, k_agg=self.k_agg))


PUBLISHED = (
    PublishedResult(
        name="top-1", agg="top1", published=0.788, published_half_width=0.024, oracle=True
    ),
    PublishedResult(
        name="top-5", agg="topk", k_agg=5, published=0.843, published_half_width=0.024, oracle=True
    ),
    PublishedResult(
        name="top-10", agg="topk", published=0.861, published_half_width=0.015, oracle=True
    ),
    PublishedResult(
        name="top&bottom-5",
        agg="topbottomk",
        k_agg=5,
        published=0.838,
        published_half_width=0.020,
        oracle=True,
    ),
    PublishedResult(
        name="top&bottom-10",
        agg="topbottomk",
        published=0.848,
        published_half_width=0.022,
        oracle=True,
    ),
    PublishedResult(
        name="bnsigmoid, ResNet-18", agg="bnsigmoid", published=0.814, published_half_width=0.008
    ),
    PublishedResult(
        name="bnsigmoid, ResNet-34",
        agg="bnsigmoid",
        backbone="resnet34",
        published=0.810,
        published_half_width=0.009,
    ),
    PublishedResult(
        name="bnsigmoid, ResNet-50",
        agg="bnsigmoid",
        backbone="resnet50",
        published=0.806,
        published_half_width=0.009,
    ),
    PublishedResult(
        name="mean, all images", agg="mean", published=0.811, published_half_width=0.009
    ),
    PublishedResult(
        name="mean, 10 images",
        agg="mean",
        subset=True,
        published=0.802,
        published_half_width=0.009,
    ),
    PublishedResult(
        name="bnsigmoid, 10 images",
        agg="bnsigmoid",
        subset=True,
        published=0.800,
        published_half_width=0.009,
    ),
)


@dataclass(frozen=True, kw_only=True)
class ReproductionSettings:
    """What of the report is run, and how long."""

    backbones: tuple[str, ...] = BACKBONES
    weights: Mapping[str, str] = field(default_factory=dict)  # of a backbone; "" is all others'
    fit: FitSettings = field(default_factory=FitSettings)
    batch_size: int = 64  # images, of the extraction
    precision: str = "auto"  # of the extraction


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What `reproduce_report` found.

    table: a row for each published figure: name, published, published_half_width (as published,
        too narrow), report (under the report's protocol and the row's own threshold convention),
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
    out: Path,
    cache: Path,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Reproduction:
    """Run the report's comparisons as heads on frozen maps, under both protocols.

    Feature stores go to `cache`, one a backbone, and are used again; runs, table.csv, figure3.png
    and figure5.png to `out`, which is replaced as a whole, at the end. The report trained the whole
    network: figures differ for that too. Raises SettingsError as `fit_heads` does.
    """
    join_processes()
    with result_folder(out, REPRODUCTION, force=force, writes=is_first()) as folder:
        table, warnings = _reproduce(cohort, settings, folder, cache, progress)
        if is_first():
            _write(table, folder)
    return Reproduction(table=table, warnings=warnings, files=files_in(out))


def _reproduce(
    cohort: Cohort,
    settings: ReproductionSettings,
    out: Path,
    cache: Path,
    progress: Progress,
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    found: list[dict[str, object]] = []
    warnings: list[str] = []
    wanted = [row for row in PUBLISHED if row.backbone in settings.backbones]
    for backbone in settings.backbones:
        _refuse_seen(cohort, _extraction(settings, backbone).backbone)
    for backbone, subset in dict.fromkeys((row.backbone, row.subset) for row in wanted):
        store = extract(
            cohort, cache / f"{backbone}.h5", _extraction(settings, backbone), progress=progress
        )
        rows = [row for row in wanted if (row.backbone, row.subset) == (backbone, subset)]
        heads = list(dict.fromkeys(row.head for row in rows))
        place = f"{backbone}-{SUBSET}-images" if subset else backbone
        both = fit_both(
            store,
            heads,
            _subset(settings.fit) if subset else settings.fit,
            out / place,
            progress=progress,
        )
        if store.recipe["weights"] == "none":
            warnings.append(
                f"{place}: random weights; choose others with --weights for meaningful results."
            )
        warnings += [f"{place}: {line}" for line in both.honest.outcome.warnings]
        found += [_tell(row, both) for row in rows]
    table = pd.DataFrame(found).set_index("name").loc[[row.name for row in wanted]]
    return table.reset_index(), tuple(warnings)


def _refuse_seen(cohort: Cohort, backbone: BackboneSettings) -> None:
    """Refuse weights that have seen labels of the cohort before anything long begins."""
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


def _of(summary: pd.DataFrame, row: PublishedResult) -> dict[str, float]:
    (found,) = summary[summary["head"] == head_name(row.head)].to_dict("records")
    return {str(name): value for name, value in found.items()}


def _tell(row: PublishedResult, both: BothRuns) -> dict[str, object]:
    report, honest = (_of(run.outcome.summary, row) for run in (both.report, both.honest))
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
