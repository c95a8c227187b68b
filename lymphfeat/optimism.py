"""Both protocols side by side: `report` minus `honest` is the optimism (METHOD §4)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lymphfeat.files import result_folder
from lymphfeat.fit import OPTIMISM_FILES, RUN, Run, fit_head
from lymphfeat.processes import is_first, join_processes
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import FitSettings, HeadSettings
from lymphfeat.splits import Split
from lymphfeat.store import FeatureStore

_REPORT, _HONEST = "#c0392b", "#1f77b4"


@dataclass(frozen=True, kw_only=True)
class BothRuns:
    """The same heads under both protocols.

    table: head, kind, report, report_half_width, honest, honest_half_width, optimism (report −
        honest), by_epochs (what of it comes of the choice of epochs: report − its last epoch).
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
    """Run `fit_head` under either protocol into `out`/report and `out`/honest, and set them off.

    Fusions and nested epochs, which need training patients' out-of-fold probabilities, are of the
    honest run alone. Also writes optimism.csv and optimism.png. The folder is replaced as a whole,
    at the end; raises SettingsError as `fit_head` does.
    """
    join_processes()
    with result_folder(out, RUN, force=force, writes=is_first()) as folder:
        runs = {
            protocol: fit_head(
                store,
                heads,
                _under(settings, protocol),
                folder / protocol,
                splits=splits,
                truth=truth,
                save=save,
                progress=progress,
            )
            for protocol in ("report", "honest")
        }
        table = set_off(runs["report"].outcome.summary, runs["honest"].outcome.summary)
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


def set_off(report: pd.DataFrame, honest: pd.DataFrame) -> pd.DataFrame:
    """Join the summaries of both protocols, in the order of the report's."""
    wanted = ["ba", "ba_half_width", "ba_half_width_published", "ba_last"]
    table = report[["head", "kind", *wanted]].merge(
        honest[["head", "ba", "ba_half_width"]], on="head", suffixes=("_report", "_honest")
    )
    return pd.DataFrame(
        {
            "head": table["head"],
            "kind": table["kind"],
            "report": table["ba_report"],
            "report_half_width": table["ba_half_width_report"],
            "report_half_width_published": table["ba_half_width_published"],
            "honest": table["ba_honest"],
            "honest_half_width": table["ba_half_width_honest"],
            "optimism": table["ba_report"] - table["ba_honest"],
            "by_epochs": table["ba_report"] - table["ba_last"],
        }
    )


def draw_optimism(table: pd.DataFrame, path: Path) -> None:
    """Draw both figures of every head with their intervals as a PNG."""
    rows = table.iloc[::-1].to_dict("records")
    figure = Figure(figsize=(8, max(3.0, 0.42 * len(rows) + 1.4)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for name, shift, color in (("report", 0.12, _REPORT), ("honest", -0.12, _HONEST)):
            half = row[f"{name}_half_width"]
            label = {"report": "report: epochs chosen on the patients measured"}.get(name, name)
            axes.errorbar(
                row[name],
                y + shift,
                xerr=0 if np.isnan(half) else half,
                fmt="o",
                color=color,
                label=label if y == 0 else None,
            )
    axes.set_yticks(range(len(rows)), [row["head"] for row in rows])
    axes.axvline(0.5, color="0.7", linestyle=":", linewidth=1)
    axes.set_xlabel("balanced accuracy, 95 % interval")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
