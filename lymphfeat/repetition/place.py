"""What a result was made from, where it is now: its cohort, its weights, and where to compute."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

from lymphfeat.cohort.cohort import REFERENCE_DATE, Cohort
from lymphfeat.cohort.csv_rows import name_some
from lymphfeat.cohort.fingerprints import cohort_fingerprint
from lymphfeat.cohort.image_checks import leave_out_unusable
from lymphfeat.errors import SettingsError, WeightsError
from lymphfeat.features.backbones import build_from_settings
from lymphfeat.features.shipped_weights import find_shipped_weights
from lymphfeat.runtime.progress import Progress
from lymphfeat.settings import BackboneSettings, Device, Settings

PathLike = str | os.PathLike[str]
OnError = Literal["stop", "skip"]
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Here:
    """Where things are now, what the result does not record, and what to compute otherwise."""

    stores: Sequence[PathLike] = ()
    truth: PathLike | None = None
    cohort: PathLike | None = None
    table: PathLike | None = None
    reference_date: date | None = None
    allow_missing: bool | None = None
    on_error: OnError | None = None
    weights: PathLike | None = None
    seed: int | None = None  # of random weights
    init_head: PathLike | None = None
    device: Device | None = None
    threads: int | None = None

    def refuse_others(self, kind: str, *known: str) -> None:
        """Raise SettingsError for what is given, and of no use in a result of this kind.

        A cohort may be named by the environment, for other commands.
        """
        for name in (each.name for each in fields(self)):
            given = getattr(self, name) not in (None, ())
            if given and name not in (*known, "cohort", "device", "threads"):
                option = "store" if name == "stores" else name.replace("_", "-")
                raise SettingsError(
                    f"--{option} must not go with a {kind}, which does not use it. Leave it out."
                )

    def computing(self, then: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
        """Return device and threads: what is asked for, or else what was, or was to be, used."""
        wanted = {"device": self.device, "threads": self.threads}
        return {
            name: value or then.get(name, getattr(settings, name)) for name, value in wanted.items()
        }

    def weights_of(
        self, settings: BackboneSettings, made_with: str, sha256: str, result: Path
    ) -> BackboneSettings:
        """Find the weights that a result was made with, by their name and hash.

        Raises SettingsError where they are others, or not there.
        """
        source = made_with if find_shipped_weights(made_with) else settings.weights
        found = replace(settings, weights=str(self.weights or source))
        try:
            _, loaded = build_from_settings(found)
        except WeightsError as error:
            raise SettingsError(
                f"{error} Say where the weights of {result} are now with --weights."
            ) from None
        if loaded.sha256 != sha256:
            remedy = (
                "Random ones follow from --seed, and from the version of torch."
                if loaded.source == "none"
                else "Name their file with --weights."
            )
            raise SettingsError(
                f"weights (={found.weights}) must be those that {result} was made with; they are "
                f"others. {remedy}"
            )
        return found

    def load_cohort(
        self, result: Path, recorded: "ReadAs", crop: int, progress: Progress
    ) -> Cohort:
        """Load the patients of a result as they were loaded then.

        Raises SettingsError where no cohort is named or patients are missing; and for another
        cohort than then where the result does not say how it was read.
        """
        if self.cohort is None:
            raise SettingsError(
                f"cohort must be named: {result} does not say where its images are. Name their "
                "folder with --cohort."
            )
        reading = recorded.reading
        missing = reading["allow_missing"] if self.allow_missing is None else self.allow_missing
        loaded = Cohort.load(
            self.cohort,
            table=self.table or _recorded_table(Path(self.cohort), reading["table"]),
            allow_missing=bool(missing),
            reference_date=self.reference_date or date.fromisoformat(reading["reference_date"]),
        )
        if (self.on_error or reading["on_error"]) == "skip":
            loaded = leave_out_unusable(loaded, crop, progress=progress)
        absent = [id for id in recorded.ids if id not in loaded.table.index]
        if absent:
            raise SettingsError(
                f"cohort (={self.cohort}) must have the patients of {result}; it lacks "
                f"{name_some(absent, shown=_SHOWN)}. Name the right one with --cohort."
            )
        without = {k: own for k, own in loaded.left_out.items() if k not in loaded.table.index}
        found = loaded.select(recorded.ids)
        found = replace(found, left_out={**found.left_out, **without})  # who had no usable image
        if not recorded.known and cohort_fingerprint(found) != dict(recorded.fingerprint):
            raise SettingsError(
                f"cohort (={self.cohort}) must be read as for {result}, which does not say how; "
                "its images or its table are others now. Name --reference-date, --table, "
                "--allow-missing or --on-error if they were used."
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ReadAs:
    """A cohort as it was read for a result.

    reading: see `Cohort`; guessed unless it is `known`, as in results of earlier versions.
    """

    ids: Sequence[str]  # of its patients
    reading: Mapping[str, Any]
    known: bool
    fingerprint: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        reading: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
        *,
        left_out: bool = False,
    ) -> "ReadAs":
        """Check what was recorded; raises ValueError or TypeError for what no cohort says."""
        known = bool(reading)
        found = {
            "table": None,
            "reference_date": REFERENCE_DATE.isoformat(),
            "allow_missing": False,
            "on_error": "skip" if left_out else "stop",
        } | dict(reading)
        date.fromisoformat(found["reference_date"])
        if found["on_error"] not in get_args(OnError) or not isinstance(found["table"], str | None):
            raise ValueError(f"{reading} is no way to read a cohort")
        return cls(ids=tuple(ids), reading=found, known=known, fingerprint=dict(fingerprint))


def _recorded_table(root: Path, name: str | None) -> Path | None:
    """Return the table that was chosen then; SettingsError where it is not in the cohort."""
    if name is None:
        return None
    if not (root / name).is_file():
        raise SettingsError(
            f"cohort (={root}) must hold the table {name}; it is not there. Say where it is now "
            "with --table."
        )
    return root / name
