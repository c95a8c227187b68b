"""A run of `fit-head`, repeated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lymphfeat.cohort.splits import Split, splits_from_json
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.recorded_run import RecordedRun
from lymphfeat.evaluation.run_provenance import CONFIG_FILE
from lymphfeat.fitting import BOTH, HEADS_FILE, RUN, fit_both, fit_heads
from lymphfeat.repetition.comparison import Repetition, compare_folders, list_changes
from lymphfeat.repetition.place import Here, PathLike
from lymphfeat.runtime.files import recover
from lymphfeat.runtime.progress import Progress


def repeat_run(
    folder: Path, out: Path, here: Here, *, force: bool, progress: Progress
) -> Repetition:
    """Fit the same heads on the same splits of the same stores."""
    recorded = _Recorded.read(folder)
    recorded.repeat(out, here, force=force, progress=progress)
    changed = list_changes(recorded.computed, _Recorded.read(out).computed)
    return compare_folders(folder, out, RUN, but=CONFIG_FILE, changed=changed)


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A run, or the two runs of both protocols."""

    folder: Path
    runs: tuple[RecordedRun, ...]  # the honest one last

    @classmethod
    def read(cls, folder: Path) -> "_Recorded":
        recover(folder)
        parts = [folder / name for name in BOTH]
        both = all((part / CONFIG_FILE).is_file() for part in parts)
        return cls(folder=folder, runs=tuple(map(RecordedRun.read, parts if both else [folder])))

    @property
    def computed(self) -> Mapping[str, Any]:
        """Return where and with what it was computed; runs of earlier versions say little."""
        config = self.runs[-1].config
        names = ("lymphfeat", "torch")
        return config.get("computed") or {"versions": {name: config.get(name) for name in names}}

    def repeat(self, out: Path, here: Here, *, force: bool, progress: Progress) -> None:
        run = self.runs[-1]
        (fit_both if len(self.runs) > 1 else fit_heads)(
            run.open_stores(here.stores),
            run.heads,
            replace(run.settings, **here.computing(self.computed, run.settings)),
            out,
            splits=self.splits,
            truth=self._truth(here),
            save=(run.folder / HEADS_FILE).is_file(),
            force=force,
            progress=progress,
        )

    @property
    def splits(self) -> list[Split] | None:
        """Return the splits to fit on; None where each protocol made its own."""
        first, last = self.runs[0], self.runs[-1]
        if first.splits != last.splits:
            return None
        return [*last.splits, *splits_from_json(last.config.get("inner_splits", {}))]

    def _truth(self, here: Here) -> PathLike | None:
        """Return where the truth is that the run's images were judged by; None without."""
        run = self.runs[-1]
        recorded = here.truth or run.config.get("truth")
        if recorded is None and "witness_auc" in run.summary[0]:
            raise SettingsError(
                f"run (={run.folder}) was fitted with --truth, and does not say which; name it "
                "with --truth."
            )
        if recorded is not None and not Path(recorded).is_file():
            raise SettingsError(
                f"truth (={recorded}) must be the file that {run.folder} was fitted with; it is "
                "not there. Say where it is now with --truth."
            )
        return recorded
