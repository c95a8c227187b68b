"""`lymphfeat audit`: check a cohort for contents, oddities, leaks and shortcuts."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from lymphfeat_cli.options import (
    FILE,
    CohortChoice,
    Output,
    cohort_options,
    note,
    show_table,
    writing_options,
)

if TYPE_CHECKING:
    from lymphfeat.auditing import Attribute, Audit, Copies, Fault, Group
    from lymphfeat.evaluation.shortcuts import Predictor

LISTED = 12  # entries shown of each kind; --json and --out list all


@click.command(
    "audit",
    epilog="""\b
Example:
  lymphfeat audit --cohort data/lymphocytosis --out audit.json
Exit status: 0 with or without findings, 2 if the cohort cannot be read.""",
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
    type=FILE,
    help="Also write all results to this JSON file.",
)
@writing_options
def command(cohort: CohortChoice, crop: int, out: Path | None, output: Output) -> None:
    """Check a cohort: contents, oddities, leaks and shortcuts.

    Counts patients and images, reports how each quirk of the files was resolved, lists unreadable,
    too small and duplicate images, and measures how well bag size and each attribute alone
    predict the label.
    """
    if out is not None:
        output.claim(out)
    from lymphfeat.auditing import audit

    patients = cohort.load(output)
    with output.progress("decoding images") as progress:
        found = audit(patients, crop=crop, progress=progress)
    if out is not None:
        found.save(out)
        note(f"Wrote {out}.")
    output.show(found.to_dict, lambda: _show(found))


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
