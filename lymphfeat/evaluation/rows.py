"""The rows of a summary: their names, and what each is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.scores import CLINICAL
from lymphfeat.heads.grid import head_name
from lymphfeat.settings import HeadSettings, Way

Joint = Literal["", "selected", "average", "stack"]  # how several heads make one row


@dataclass(frozen=True, kw_only=True)
class Row:
    """A head, several heads as one, or either fused with the clinical attributes."""

    heads: tuple[HeadSettings, ...]
    joint: Joint = ""  # empty of a single head
    everything: bool = True  # of selected: out of all heads, not only those of one aggregator
    fusion: Way | Literal[""] = ""  # empty: images only

    @property
    def name(self) -> str:
        """The row's name in tables and plots."""
        return fused_name(self._image_name, self.fusion) if self.fusion else self._image_name

    @property
    def images_only(self) -> "Row":
        """The same row without the attributes."""
        return replace(self, fusion="")

    @property
    def _image_name(self) -> str:
        count = len(self.heads)
        if self.joint == "selected":
            whose = "any head" if self.everything else self.heads[0].agg
            return f"{whose}, best of {count} chosen inside"
        return f"{self.joint} of {count} heads" if self.joint else head_name(self.heads[0])


def fused_name(image_row: str, fusion: str) -> str:
    """Name the fusion of a row with the clinical attributes."""
    return f"{image_row} + {CLINICAL} ({fusion})"


def image_rows(heads: Sequence[HeadSettings], *, nested: bool) -> list[Row]:
    """List the rows that are measured from images alone.

    Only with inner splits (`nested`) are there rows chosen, averaged or stacked inside: a setting
    of each aggregator, one of all heads, the average and the stack of all.
    """
    rows = [Row(heads=(head,)) for head in heads]
    if not nested:
        return rows
    groups: dict[str, list[HeadSettings]] = {}
    for head in heads:
        groups.setdefault(head.agg, []).append(head)
    rows += [
        Row(heads=tuple(group), joint="selected", everything=False)
        for group in groups.values()
        if len(group) > 1
    ]
    if len(groups) > 1:
        rows.append(Row(heads=tuple(heads), joint="selected"))
    if len(heads) > 1:
        rows += [
            Row(heads=tuple(heads), joint="average"),
            Row(heads=tuple(heads), joint="stack"),
        ]
    return rows


def find_row(name: str, heads: Sequence[HeadSettings], fusions: Sequence[Way]) -> Row:
    """Find a row of a nested run by its name. Raises SettingsError for an unknown one."""
    images = image_rows(heads, nested=True)
    fused = [replace(row, fusion=fusion) for row in images for fusion in fusions]
    for row in [*images, *fused]:
        if row.name == name:
            return row
    raise SettingsError(
        f"row (={name}) must be a head of the run, one chosen inside, or a fusion; got none of "
        f"{'; '.join(row.name for row in [*images, *fused])}."
    )


def default_row(heads: Sequence[HeadSettings], fusions: Sequence[Way]) -> Row:
    """Return the row to use where none is named: chosen inside from all heads, and fused if any."""
    chosen = [row for row in image_rows(heads, nested=True) if row.joint in ("", "selected")]
    return replace(chosen[-1], fusion=fusions[0] if fusions else "")
