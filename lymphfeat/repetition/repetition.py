"""rerun: a run, a store or a model is made again from what it records, and compared with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from lymphfeat.errors import SettingsError
from lymphfeat.finetuning.curves import CURVES
from lymphfeat.model.ensemble import MEMBERS_FILE
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE
from lymphfeat.recalibration import FIGURES_FILE
from lymphfeat.repetition.comparison import Repetition
from lymphfeat.repetition.models import repeat_model
from lymphfeat.repetition.place import Here, OnError, PathLike
from lymphfeat.repetition.runs import repeat_run
from lymphfeat.repetition.stores import repeat_store
from lymphfeat.runtime.files import recover
from lymphfeat.runtime.processes import is_started_alone
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import Device


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of result: how it is repeated, and what of `Here` that reads."""

    name: str
    repeat: Callable[..., Repetition]
    reads: tuple[str, ...]


_OF_COHORT = ("table", "reference_date", "allow_missing", "on_error", "weights")
_RUN = _Kind(name="run", repeat=repeat_run, reads=("stores", "truth"))
_STORE = _Kind(name="store", repeat=repeat_store, reads=(*_OF_COHORT, "seed"))
_MODEL = _Kind(name="model", repeat=repeat_model, reads=(*_OF_COHORT, "init_head"))


def rerun(
    result: PathLike,
    out: PathLike | None = None,
    *,
    stores: Sequence[PathLike] = (),
    truth: PathLike | None = None,
    cohort: PathLike | None = None,
    table: PathLike | None = None,
    reference_date: date | None = None,
    allow_missing: bool | None = None,
    on_error: OnError | None = None,
    weights: PathLike | None = None,
    seed: int | None = None,
    init_head: PathLike | None = None,
    device: Device | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Repetition:
    """Repeat what `fit_heads`, `fit_both`, `extract` or `train` wrote, and compare the two.

    The repeat is written to `out`, by default `<result>-again`, beside the result. Settings, heads
    and splits are those of the result. Stores and models hold no path: `cohort` names the folder of
    their images. The other arguments up to `init_head` say where things are now, or what a result
    of an earlier version does not record: how its table was read, and the seed of random weights.
    It is computed on the same device with as many threads as then, unless `device` and `threads`
    say otherwise.

    Raises SettingsError for any other result, where something is not known or not there, and for an
    `out` that may not be written; StoreError and ModelError for results that cannot be read.

    >>> lf.fit_heads("cache/features.h5", agg="mean+std", out="runs/spread")
    >>> lf.rerun("runs/spread").same
    """
    path = Path(result)
    recover(path)
    here = Here(
        stores=tuple(stores),
        truth=truth,
        cohort=cohort,
        table=table,
        reference_date=reference_date,
        allow_missing=allow_missing,
        on_error=on_error,
        weights=weights,
        seed=seed,
        init_head=init_head,
        device=device,
        threads=threads,
    )
    kind = _STORE if path.is_file() else _MODEL if _is_model(path) else _RUN
    here.refuse_others(kind.name, *kind.reads)
    target = _beside(path) if out is None else Path(out)
    if target.resolve().is_relative_to(path.resolve()):
        raise SettingsError(
            f"out (={target}) must be another path than the {kind.name}, outside it."
        )
    if not is_started_alone():
        raise SettingsError(
            f"a {kind.name} must be repeated by one process; start it without torchrun."
        )
    return kind.repeat(path, target, here, force=force, progress=progress)


def _is_model(folder: Path) -> bool:
    """Return whether `endtoend` wrote a folder; raises SettingsError for other models."""
    if (folder / FIGURES_FILE).is_file():
        raise SettingsError(
            f"result (={folder}) must be a run, a store or a model of `lymphfeat endtoend`; this "
            "model is made again by the same `lymphfeat recalibrate`, with another --out."
        )
    trained = (folder / CURVES[0]).is_file()
    if (folder / FINAL_FILE).is_file() and not trained:
        raise SettingsError(
            f"result (={folder}) must be a run, a store or a model of `lymphfeat endtoend`; this "
            "model is made again by the same `lymphfeat finalize`, with another --out."
        )
    return any((folder / name).is_file() for name in (FACTS_FILE, MEMBERS_FILE, FINAL_FILE))


def _beside(path: Path) -> Path:
    place = path if path.name not in ("", "..") else path.resolve()
    if place.is_file():
        return place.with_name(f"{place.stem}-again{place.suffix}")
    return place.with_name(f"{place.name}-again")
