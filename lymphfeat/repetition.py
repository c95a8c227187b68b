"""rerun: a run is repeated from what its folder holds, and compared with it file by file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lymphfeat.cohort.splits import Split, splits_from_json
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.recorded_run import RecordedRun
from lymphfeat.evaluation.run_provenance import CONFIG_FILE
from lymphfeat.fitting import BOTH, HEADS_FILE, RUN, fit_both, fit_heads
from lymphfeat.model.ensemble import MEMBERS_FILE
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE
from lymphfeat.runtime.differences import FileDifference, compare_files
from lymphfeat.runtime.files import ResultKind, files_in, recover
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.processes import is_started_alone
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import Device

PathLike = str | os.PathLike[str]
_FIGURE = ".png"


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """A run and its repeat.

    files: the results, each compared with that of the same name.
    figures: what is drawn of them; another version of matplotlib draws other bytes.
    changed: how the repeat was computed otherwise: device, processor, threads, versions.
    """

    run: Path
    out: Path
    files: tuple[FileDifference, ...]
    figures: tuple[FileDifference, ...]
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether all results are the same, byte for byte."""
        return not self.different

    @property
    def different(self) -> tuple[FileDifference, ...]:
        """Return the results that differ."""
        return tuple(each for each in self.files if not each.same)


def rerun(
    run: PathLike,
    out: PathLike | None = None,
    *,
    stores: Sequence[PathLike] = (),
    truth: PathLike | None = None,
    device: Device | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Repetition:
    """Repeat a run of `fit_heads` or `fit_both`, write it to the folder `out`, and compare the two.

    `out` is by default `<run>-again`, beside the run. Settings, heads and splits are the run's;
    `stores` and `truth` say where its stores and its truth are now. It is computed on the same
    device with as many threads as then, unless `device` and `threads` say otherwise.

    Raises SettingsError for anything but a run folder, and for an `out` that may not be written;
    StoreError and ModelError for stores that cannot be read, or of another recipe.

    >>> lf.fit_heads("cache/features.h5", agg="mean+std", out="runs/spread")
    >>> lf.rerun("runs/spread").same
    """
    folder = Path(run)
    _refuse_others(folder)
    target = _beside(folder) if out is None else Path(out)
    if target.resolve().is_relative_to(folder.resolve()):
        raise SettingsError(f"out (={target}) must be another folder than the run, outside it.")
    if not is_started_alone():
        raise SettingsError("a run must be repeated by one process; start it without torchrun.")
    recorded = _Recorded.read(folder)
    here = _Here(stores=stores, truth=truth, device=device, threads=threads)
    recorded.repeat(target, here, force=force, progress=progress)
    files = _compare(folder, target, RUN)
    return Repetition(
        run=folder,
        out=target,
        files=tuple(each for each in files if not each.name.endswith(_FIGURE)),
        figures=tuple(each for each in files if each.name.endswith(_FIGURE)),
        changed=tuple(_changed(recorded.computed, _Recorded.read(target).computed)),
    )


def _refuse_others(run: Path) -> None:
    """Raise SettingsError for a store or a model, saying how it is made again."""
    again = ""
    if run.is_file():
        again = "a store is made again by `lymphfeat extract`, with its settings (`lymphfeat info`)"
    elif (run / FINAL_FILE).is_file():
        again = "a final model is made again by the same `lymphfeat finalize` or `endtoend`"
    elif any((run / name).is_file() for name in (FACTS_FILE, MEMBERS_FILE)):
        again = "a model is made again by `lymphfeat endtoend`, with the settings in its model.json"
    if again:
        raise SettingsError(
            f"run (={run}) must be a run folder of `lymphfeat fit-head`; {again} and another --out."
        )


def _beside(run: Path) -> Path:
    place = run if run.name not in ("", "..") else run.resolve()
    return place.with_name(f"{place.name}-again")


@dataclass(frozen=True, kw_only=True)
class _Here:
    """What is where now, and what is to be computed otherwise than then."""

    stores: Sequence[PathLike]
    truth: PathLike | None
    device: Device | None
    threads: int | None


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

    def repeat(self, out: Path, here: _Here, *, force: bool, progress: Progress) -> None:
        run = self.runs[-1]
        device = here.device or self.computed.get("device", run.settings.device)
        threads = here.threads or self.computed.get("threads", run.settings.threads)
        (fit_both if len(self.runs) > 1 else fit_heads)(
            run.open_stores(here.stores),
            run.heads,
            replace(run.settings, device=device, threads=threads),
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

    def _truth(self, here: _Here) -> PathLike | None:
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


def _compare(run: Path, out: Path, kind: ResultKind) -> list[FileDifference]:
    """Compare all files of two results but config.json, which says how they were made."""
    own = [path.relative_to(run) for path in files_in(run)]
    new = [path.relative_to(out) for path in files_in(out)]
    names = {path for path in (*filter(kind.has, own), *new) if path.name != CONFIG_FILE}
    return [compare_files(run / name, out / name, name.as_posix()) for name in sorted(names)]


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List how something was computed otherwise, of what was recorded then."""
    versions = {name: now["versions"].get(name) for name in then["versions"]}
    return differing_fields({**{name: now[name] for name in then}, "versions": versions}, then)
