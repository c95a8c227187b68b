"""The page and its figures, written completely or not at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import expit

from lymphfeat.cohort.images import decode_crop
from lymphfeat.errors import SettingsError
from lymphfeat.explanation.explanation import Explanation
from lymphfeat.explanation.figures import (
    draw_cell,
    draw_cohort,
    draw_deletion,
    draw_differences,
    draw_extremes,
    draw_grids,
    draw_plate,
    draw_subgroups,
    draw_weights,
)
from lymphfeat.explanation.page import render_page
from lymphfeat.explanation.scores import score_image
from lymphfeat.explanation.subjects import subject_of
from lymphfeat.explanation.text import NOT_A_DEVICE
from lymphfeat.heads.stack import HeadStack
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import AnyModel
from lymphfeat.runtime.arrays import Float32s
from lymphfeat.runtime.files import (
    ResultKind,
    check_file,
    check_folder,
    files_in,
    recover,
    replace_file,
    result_files,
)
from lymphfeat.settings import ExplainSettings

_FORMATS = {"png": ("png",), "pdf": ("pdf",), "both": ("png", "pdf"), "none": ()}
_FIGURES = (
    "cohort",
    "extremes",
    "grids",
    "deletion",
    "subgroups",
    "plate-*",
    "differences-*",
    "weights-*",
)
FIGURES = ResultKind(
    name="set of figures",
    marks=("cohort.png", "cohort.pdf"),
    files=tuple(f"{name}.{suffix}" for name in _FIGURES for suffix in ("png", "pdf")),
)


def write_report(
    explanation: Explanation,
    out: Path,
    settings: ExplainSettings | None = None,
    *,
    force: bool = False,
) -> list[Path]:
    """Write the page to `out` and the figures to the folder next to it; return the files.

    Page and figures are replaced together. Raises SettingsError as `check_report`.
    """
    settings = settings or ExplainSettings()
    budget, formats = settings.megabytes * 1_000_000, _FORMATS[settings.figures]
    figures = figures_folder(out)
    table = subgroups_file(out)
    with result_files(out, {figures.name: FIGURES, table.name: None}, force=force) as folder:
        page = render_page(explanation, budget=budget)
        (folder / out.name).write_text(page, encoding="utf-8")
        if explanation.subgroups is not None:
            rows = explanation.subgroups.rows.assign(patients=explanation.subgroups.of)
            rows.to_csv(folder / table.name, index=False, lineterminator="\n")
        if formats:
            (folder / figures.name).mkdir()
            for name, figure in _figures(explanation, settings.plates):
                for suffix in formats:
                    figure.savefig(folder / figures.name / f"{name}.{suffix}", dpi=130)
    return [out, *([table] if table.exists() else []), *files_in(figures)]


def check_report(out: Path, *, force: bool) -> None:
    """Raise SettingsError when a page, its table or figures exist and `force` is not set.

    Other files in the folder of figures are never overwritten.
    """
    recover(out)
    check_file(out, force=force)
    check_file(subgroups_file(out), force=force)
    check_folder(figures_folder(out), FIGURES, force=force)


def figures_folder(out: Path) -> Path:
    """Return the folder of a page's figures."""
    return out.with_name(f"{out.stem}-figures")


def subgroups_file(out: Path) -> Path:
    """Return the table of subgroups of a page."""
    return out.with_name(f"{out.stem}-subgroups.csv")


def _figures(explanation: Explanation, plates: int) -> Iterator[tuple[str, Figure]]:
    yield "cohort", draw_cohort(explanation)
    yield "extremes", draw_extremes(explanation)
    if explanation.wording.mapped:
        yield "grids", draw_grids(explanation)
    if explanation.deletion is not None:
        yield "deletion", draw_deletion(explanation.deletion)
    if explanation.subgroups is not None:
        yield "subgroups", draw_subgroups(explanation.subgroups)
    n_images = dict(zip(explanation.cohort.ids, explanation.cohort.n_images, strict=True))
    for number, patient in enumerate(worst_first(explanation)[:plates], start=1):
        yield f"plate-{number}-{_safe(patient)}", draw_plate(explanation, patient)
        if explanation.distance is not None and n_images[patient] > 1:
            yield f"differences-{number}-{_safe(patient)}", draw_differences(explanation, patient)
        yield f"weights-{number}-{_safe(patient)}", draw_weights(explanation, patient)


def worst_first(explanation: Explanation) -> list[str]:
    """List the patients, those farthest on the wrong side of the threshold first."""
    table = explanation.patients
    wrong = table["error"].fillna(False).to_numpy(bool)
    distance = np.abs(table["probability"].to_numpy() - explanation.model.threshold)
    order = np.lexsort((-distance, ~wrong))
    return [str(id) for id in table["id"].to_numpy()[order]]


def _safe(name: str) -> str:
    """Make a file name from an id, whatever characters it has."""
    return "".join(char if char.isalnum() or char in "-_." else "_" for char in name)[:60]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image's scores."""

    logit: float
    probability: float
    grid: Float32s  # (h, w) logits of its fields


def write_cell(
    model: AnyModel, image: Path, out: Path, settings: ExplainSettings | None = None
) -> Cell:
    """Score one image and draw it with its map to `out`.

    Raises SettingsError for an unknown suffix, and for heads that do not score single cells.
    """
    suffixes = (".png", ".pdf", ".svg")
    if out.suffix not in suffixes:
        raise SettingsError(f"out (={out}) must end in one of {', '.join(suffixes)}.")
    if isinstance(model, FinalModel):
        model = model.without_attributes()  # a cell has none
    subject = subject_of(model, pd.DataFrame())
    together = [r.settings.agg for r in subject.readers if not isinstance(r.head, HeadStack)]
    if together:
        raise SettingsError(
            f"model (head {together[0]}) must score single cells to explain one image; "
            "this head scores a patient's cells together. Explain the patient's cohort: --cohort."
        )
    grid = score_image(subject, image, (settings or ExplainSettings()).scoring)
    logit = float(grid.mean())
    probability = float(expit(logit))
    pixels = decode_crop(image, subject.crop).pixels.transpose(1, 2, 0)
    figure = draw_cell(pixels, grid, f"{image.name}: score {probability:.3f}. {NOT_A_DEVICE}")
    replace_file(out, lambda path: figure.savefig(path, format=out.suffix[1:], dpi=130))
    return Cell(logit=logit, probability=probability, grid=grid)
