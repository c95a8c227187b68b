"""A head found by fit-head as the starting point of an end-to-end training."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.heads import HeadStack
from lymphfeat.settings import HeadSettings
from lymphfeat.splits import read_splits

_LEARNT = ("weight", "bias", "gamma", "beta", "running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class InitialHead:
    """A head of a run, averaged over splits."""

    name: str
    settings: HeadSettings
    tensors: Mapping[str, Tensor]  # weight (C,), bias (1,); of bnsigmoid also gamma, beta, …

    def as_stack(self, settings: HeadSettings) -> HeadStack:
        """Return the head as a trainable one; `settings` tell how it is trained on."""
        head = HeadStack([settings], self.tensors["weight"][None].clone(), self.tensors["bias"])
        state = {name: value.reshape(1) for name, value in self.tensors.items() if name != "weight"}
        head.load_state_dict(state | {"weight": self.tensors["weight"][None]}, strict=False)
        return head


def read_initial_head(run: Path, held_out: Collection[str], weights_sha256: str) -> InitialHead:
    """Read a run's best linear head: the mean over its splits that never trained on `held_out`.

    Raises SettingsError for a run without saved heads or on another backbone, LeakageError when
    every split has trained on one of `held_out`.
    """
    config = _read_json(run / "config.json")
    theirs = config["store"]["recipe"]
    if "finetune" in theirs or theirs["weights_sha256"] != weights_sha256:
        raise SettingsError(
            f"init_head (={run}) must be fitted on the features of the very weights that training "
            f"begins with; its store has {theirs['weights']} of {theirs['backbone']}. "
            "Choose the same --backbone and --weights."
        )
    tensors = _read_tensors(run)
    for row in _read_json(run / "summary.json"):  # the best first
        name = row["head"]
        found = config["heads"].get(name)
        mine = {key: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        if found is not None and {key.rsplit("/", 1)[1] for key in mine} <= set(_LEARNT):
            mean = _average(run, mine, set(held_out))
            return InitialHead(name=name, settings=HeadSettings(**found), tensors=mean)
    raise SettingsError(f"init_head (={run}) must have a linear head; it has networks alone.")


def start_from(
    run: Path, settings: HeadSettings, held_out: Collection[str], sha256: str
) -> HeadStack:
    """Return the run's head, to be trained on with the learning rate of `settings`."""
    found = read_initial_head(run, held_out, sha256)
    return found.as_stack(replace(found.settings, lr=settings.lr))


def _average(run: Path, tensors: Mapping[str, Tensor], held_out: set[str]) -> dict[str, Tensor]:
    innocent = {s.id for s in read_splits(run / "splits.json") if not held_out & {*s.train}}
    groups: dict[str, list[Tensor]] = {}
    for key, value in tensors.items():
        _, split, name = key.rsplit("/", 2)
        if split in innocent:
            groups.setdefault(name, []).append(value)
    if not groups:
        raise LeakageError(
            f"init_head (={run}) must come from splits that did not train on the patients held out "
            "here; all of them did. Fit with the same --seed, --seeds 1 and --folds, or train "
            "without --folds and --validation."
        )
    return {name: torch.stack(values).mean(0) for name, values in groups.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
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
