"""`lymphfeat audit`: check a cohort for contents, oddities, leaks and shortcuts."""

from collections.abc import Sequence
from datetime import datetime
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from lymphfeat.runtime.files import check_file
from lymphfeat_cli.options import (
    cohort_options,
    force_option,
    load_cohort,
    note,
    output_options,
    progress_bar,
    show_json,
    show_table,
)

if TYPE_CHECKING:
    from lymphfeat.auditing import Attribute, Audit, Copies, Fault, Group
    from lymphfeat.evaluation.shortcuts import Predictor

LISTED = 12  # entries shown of each kind; --json and --out list all


@click.command(
    "audit",
    epilog="Example: lymphfeat audit --cohort data/lymphocytosis --out audit.json. "
    "Exit status: 0 with or without findings, 2 if the cohort cannot be read.",
)
@cohort_options
@click.option(
    "--crop",
    type=click.IntRange(1),
    default=112,
    show_default=True,
    help="Report images with a side shorter than this many pixels.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all results to this JSON file.",
)
@force_option
@output_options
def command(
    cohort: Path | None,
    table: Path | None,
    allow_missing: bool,
    reference_date: datetime,
    crop: int,
    out: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check a cohort: contents, oddities, leaks and shortcuts.

    Counts patients and images, reports how each quirk of the files was resolved, lists unreadable,
    too small and duplicate images, and measures how well bag size and each attribute alone
    predict the label.
    """
    _check_out(out, force)
    from lymphfeat.auditing import audit

    loaded = load_cohort(cohort, table, allow_missing, reference_date, quiet)
    with progress_bar("decoding images", quiet) as progress:
        found = audit(loaded, crop=crop, progress=progress)
    if out is not None:
        found.save(out)
        note(f"Wrote {out}.")
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found)


def _check_out(out: Path | None, force: bool) -> None:
    if out is not None:
        check_file(out, force=force)
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"folder {out.parent} of --out does not exist; create it first.")


def _show(audit: "Audit") -> None:
    click.echo(f"{audit.root}: {audit.patients} patients, {audit.images} images\n")
    _show_groups(audit)
    if audit.attributes:
        columns = ["attribute", "missing", "min", "median", "max", "values"]
        show_table("Clinical attributes", columns, [_range(a) for a in audit.attributes])
    if audit.predictors:
        columns = ["predictor", "patients", "AUC", "95 % interval", "tumoral is"]
        rows = [_power(predictor) for predictor in audit.predictors]
        show_table("How well each predictor alone predicts the label", columns, rows)
    _show_lines("Quirks and how they were resolved", audit.quirks, listed=len(audit.quirks))
    _show_lines("Unreadable images", [_fault(fault) for fault in audit.unreadable])
    crop = f"Images smaller than the crop ({audit.crop} px)"
    _show_lines(crop, [_fault(fault) for fault in audit.too_small])
    _show_lines("Images shared by different patients", [_copy(copy) for copy in audit.shared])
    _show_lines("Images repeated within a patient", [_copy(copy) for copy in audit.repeated])
    _show_lines("Findings", audit.findings)
    click.echo(f"Verdict: {audit.verdict}.")


def _show_groups(audit: "Audit") -> None:
    from lymphfeat.auditing import LABEL_NAMES

    rows = [
        (g.split, LABEL_NAMES[g.label], g.label, g.patients, g.images, *_spread(g))
        for g in audit.groups
    ]
    columns = ["split", "class", "label", "patients", "images", "min", "median", "max"]
    show_table("Patients, and images per patient", columns, rows)
    for title, counts in (("formats", audit.formats), ("sizes", audit.sizes)):
        shown = [f"{name}: {count}" for name, count in counts.items()]
        click.echo(f"Image {title}: {', '.join(_shortened(shown)) or 'none readable'}")
    click.echo()


def _spread(group: "Group") -> tuple[str, ...]:
    return tuple(f"{count:g}" for count in (group.fewest, group.median, group.most))


def _range(attribute: "Attribute") -> list[str]:
    numbers = (attribute.minimum, attribute.median, attribute.maximum)
    shown = ["" if number is None else f"{number:.4g}" for number in numbers]
    counts = [f"{escape(value)} {count}" for value, count in (attribute.counts or {}).items()]
    return [
        escape(attribute.name),
        str(attribute.missing),
        *shown,
        ", ".join(_shortened(counts, 6)),
    ]


def _power(predictor: "Predictor") -> list[str]:
    category = f" {escape(predictor.category)}" if predictor.category else ""
    return [
        escape(predictor.name),
        str(predictor.patients),
        f"{predictor.auc:.3f}",
        "too few" if isnan(predictor.low) else f"{predictor.low:.3f} to {predictor.high:.3f}",
        f"{predictor.tumoral_is}{category}",
    ]


def _fault(fault: "Fault") -> str:
    return f"{fault.path}: {fault.reason}"


def _copy(copies: "Copies") -> str:
    pairs = zip(copies.patients, copies.labels, strict=True)
    who = ", ".join(_shortened([f"{patient} ({label})" for patient, label in pairs]))
    return f"{who}: {copies.images} image(s), e.g. {' = '.join(_shortened(copies.example, 4))}"


def _show_lines(title: str, lines: Sequence[str], listed: int = LISTED) -> None:
    if lines:
        click.echo("\n".join([title, *(f"  {line}" for line in _shortened(lines, listed)), ""]))


def _shortened(lines: Sequence[str], listed: int = LISTED) -> list[str]:
    more = len(lines) - listed
    return [*lines[:listed], *([f"… and {more} more (all with --json)"] if more > 0 else [])]
