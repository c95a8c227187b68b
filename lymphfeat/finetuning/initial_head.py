"""A head found by fit-head as the starting point of an end-to-end training."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lymphfeat.cohort.provenance import NOBODY, PatientKey, Provenance
from lymphfeat.cohort.splits import Split, read_splits
from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.evaluation.run_provenance import (
    CONFIG_FILE,
    SPLITS_FILE,
    SUMMARY_FILE,
    RunProvenance,
    check_version,
)
from lymphfeat.heads.stack import HeadStack
from lymphfeat.runtime.files import recover
from lymphfeat.runtime.strict_json import parse_json
from lymphfeat.settings import HeadSettings

_LEARNT = ("weight", "bias", "gamma", "beta", "running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class InitialHead:
    """A head of a run, averaged over splits."""

    name: str
    settings: HeadSettings
    tensors: Mapping[str, Tensor]  # weight (C,), bias (1,); of bnsigmoid also gamma, beta, …
    provenance: Provenance

    def as_stack(self, settings: HeadSettings) -> HeadStack:
        """Return the head as a trainable one; `settings` say how training continues."""
        head = HeadStack([settings], self.tensors["weight"][None].clone(), self.tensors["bias"])
        state = {name: value.reshape(1) for name, value in self.tensors.items() if name != "weight"}
        head.load_state_dict(state | {"weight": self.tensors["weight"][None]}, strict=False)
        return head


def read_initial_head(
    run: Path, held_out: Sequence[PatientKey], weights_sha256: str
) -> InitialHead:
    """Read a run's best linear head: the mean over its splits that have not seen `held_out`.

    With nobody held out the best row of the run is used. Otherwise the choice must not depend on
    the patients held out either: it is the one that the run made within the training patients of
    those splits. Raises SettingsError for a run without saved heads, on other weights, or without
    such a choice; LeakageError when every split has seen the label of one of `held_out`.
    """
    recover(run)
    config = _read_json(run / CONFIG_FILE)
    check_version(run, config)
    _check_weights(run, config["store"]["recipe"], weights_sha256)
    tensors = _read_tensors(run)
    provenance = RunProvenance.read(run)
    splits = _innocent_splits(run, provenance, held_out)
    linear = _linear_heads(config["heads"], tensors)
    name = _choose_inside(run, linear, splits) if held_out else _choose_best(run, linear)
    whole = NOBODY
    for split in splits:
        whole |= provenance.of_heads(split)
    settings = HeadSettings(**config["heads"][name])
    return InitialHead(
        name=name,
        settings=replace(settings, solver="adam") if settings.solver else settings,
        tensors=_average(tensors, name, {split.id for split in splits}),
        provenance=whole,
    )


def _check_weights(run: Path, recipe: Mapping[str, Any], sha256: str) -> None:
    if "finetune" in recipe or recipe["weights_sha256"] != sha256:
        raise SettingsError(
            f"init_head (={run}) must be fitted on features of the same weights that training "
            f"starts from; its store has {recipe['weights']} of {recipe['backbone']}. "
            "Choose the same --backbone and --weights."
        )


def _innocent_splits(
    run: Path, provenance: RunProvenance, held_out: Sequence[PatientKey]
) -> list[Split]:
    """Return the splits whose heads have not seen the label of any patient held out."""
    innocent = [
        split
        for split in read_splits(run / SPLITS_FILE)
        if not provenance.of_heads(split).labelled(held_out)
    ]
    if not innocent:
        raise LeakageError(
            f"init_head (={run}) must come from splits that did not train on the patients held out "
            "here; all of its splits did. Fit with the same --seed, --seeds 1 and --folds, or "
            "train without --folds and --validation."
        )
    return innocent


def _linear_heads(heads: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the heads that are a scorer and an aggregator."""
    learnt: dict[str, set[str]] = {}
    for key in tensors:
        name, _, tensor = key.rsplit("/", 2)
        learnt.setdefault(name, set()).add(tensor)
    return [name for name in heads if name in learnt and learnt[name] <= set(_LEARNT)]


def _choose_best(run: Path, linear: Sequence[str]) -> str:
    """Return the first linear head of the summary, which is sorted best first."""
    for row in _read_json(run / SUMMARY_FILE):
        if row["head"] in linear:
            return str(row["head"])
    raise SettingsError(
        f"init_head (={run}) must have a linear head, such as bnsigmoid or mean; it has none."
    )


def _choose_inside(run: Path, linear: Sequence[str], splits: Sequence[Split]) -> str:
    """Return the head that was chosen most often within the training patients of the splits."""
    if len(linear) == 1:
        return linear[0]
    runs = pd.read_csv(run / "runs.csv", keep_default_na=False)
    rows = runs[(runs["kind"] == "selected") & runs["split"].isin([split.id for split in splits])]
    if "chosen" in rows and len(rows):
        widest = rows[rows["head"] == rows["head"].iloc[-1]]  # "any head", where there are several
        names = widest["chosen"].str.replace(r", (epoch|penalty) .*$", "", regex=True)
        chosen = [found for found in names.mode() if found in linear]
        if chosen:
            return str(chosen[0])
    raise SettingsError(
        f"init_head (={run}) must hold one linear head, or a choice among linear heads made "
        "within training patients, because patients are held out here; got "
        f"{', '.join(linear) or 'none'}. Fit one head, or several with --protocol honest."
    )


def _average(
    tensors: Mapping[str, Tensor], head: str, splits: Collection[str]
) -> dict[str, Tensor]:
    groups: dict[str, list[Tensor]] = {}
    for key, value in tensors.items():
        name, split, tensor = key.rsplit("/", 2)
        if name == head and split in splits:
            groups.setdefault(tensor, []).append(value)
    return {name: torch.stack(values).mean(0) for name, values in groups.items()}


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"init_head (={path.parent}) must be a run of `lymphfeat fit-head --save` ({error})."
        ) from None


def _read_tensors(run: Path) -> dict[str, Tensor]:
    try:
        return load_file(run / "heads.safetensors")
    except (OSError, SafetensorError) as error:
        raise SettingsError(
            f"init_head (={run}) must hold heads.safetensors ({error}); fit it again with --save."
        ) from None
