"""Fits that are finished, kept in a folder until all others are: an interrupted run goes on there.

One safetensors file for each piece that was fitted together, named by what was fitted, with a
checksum of its tensors; and the identity of the run (store, splits, heads, settings, versions):
fits of another run are refused. Everything is kept to the last bit.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from lymphfeat.errors import SettingsError, first_line
from lymphfeat.heads.blank import empty_head
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, FittedHeads, FittedModule
from lymphfeat.heads.exact_head import ExactHead
from lymphfeat.heads.head import Head
from lymphfeat.heads.stack import NetworkHead
from lymphfeat.runtime.files import replace_file
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.strict_json import json_text, json_value, parse_json

Arrays = Mapping[str, NDArray[Any]]
_IDENTITY_FILE = "identity.json"
_ARRAYS = ("curves", "losses", "weight", "bias", "rounding")
_log = logging.getLogger(__name__)


class KeptFits:
    """The finished fits of one unfinished run."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, force: bool = False) -> None:
        """Look in a folder, which need not exist; with `force` fits of another run are removed.

        Raises SettingsError for fits of another run, naming what differs.
        """
        self._folder, self._identity = folder, json_value(identity)
        differences = self._differences()
        if differences and not force:
            raise SettingsError(
                f"{folder} belongs to an unfinished run with other settings: "
                f"{'; '.join(differences)}. Choose another --out, or start over with --force."
            )
        if differences:
            shutil.rmtree(folder)

    def _differences(self) -> list[str]:
        path = self._folder / _IDENTITY_FILE
        if not self._folder.exists():
            return []
        try:
            theirs = parse_json(path.read_text(encoding="utf-8"))
            return differing_fields(self._identity, theirs)
        except (OSError, ValueError, AttributeError):
            return [f"{path.name} cannot be read"]

    def read(self, result: FittedHeads, positions: Sequence[int], features: Features) -> bool:
        """Take the fits at some positions into a result; return whether they were kept.

        Those of a damaged file were not, which is logged.
        """
        part = result.take(positions)
        path = self._path_of(part.fits)
        if not path.exists():
            return False
        try:
            arrays = _read_checked(path)
            result.put(positions, _unpacked(part.fits, arrays, features))
        except (SafetensorError, ValueError, KeyError, OSError, RuntimeError) as error:
            reason = first_line(error)
            _log.warning("%s is damaged (%s); its heads are fitted again.", path, reason)
            return False
        return True

    def write(self, part: FittedHeads, features: Features) -> None:
        """Keep some fits."""
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = self._folder / _IDENTITY_FILE
        if not identity.exists():
            text = json_text(self._identity)
            replace_file(identity, lambda path: path.write_text(text, encoding="utf-8"))
        arrays = _packed(part, features)
        facts = {"sha256": _checksum(arrays)}
        replace_file(self._path_of(part.fits), lambda path: save_file(arrays, path, facts))

    def _path_of(self, fits: Sequence[Fit]) -> Path:
        name = hashlib.sha256(repr(list(fits)).encode()).hexdigest()[:32]
        return self._folder / f"{name}.safetensors"


def _read_checked(path: Path) -> dict[str, NDArray[Any]]:
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = file.metadata() or {}
    if facts.get("sha256") != _checksum(arrays):
        raise ValueError("its checksum differs")
    return arrays


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(np.asarray(values, order="C").data)
    return digest.hexdigest()


# --- fits as arrays -------------------------------------------------------------------------------


def _packed(part: FittedHeads, features: Features) -> dict[str, NDArray[Any]]:
    arrays = {name: getattr(part, name) for name in _ARRAYS}
    arrays |= {f"extras/{name}": values for name, values in part.extras.items()}
    heads = {part.fits[number].head for number in part.modules}
    blanks = {head: empty_head(head, *_channels(features)).state_dict() for head in heads}
    for number, module in part.modules.items():
        state = _learnt(module, blanks[part.fits[number].head])
        arrays |= {f"{number}/{name}": value.cpu().numpy() for name, value in state.items()}
    return {name: np.asarray(values, order="C") for name, values in arrays.items()}


def _unpacked(fits: Sequence[Fit], arrays: Arrays, features: Features) -> FittedHeads:
    curves, losses, weight, bias, rounding = (arrays[name] for name in _ARRAYS)
    extras, *states = (_under(arrays, name) for name in ("extras", *range(len(fits))))
    return FittedHeads(
        fits=tuple(fits),
        curves=curves,
        losses=losses,
        weight=weight,
        bias=bias,
        rounding=rounding,
        extras=extras,
        modules={
            number: _restored(empty_head(fit.head, *_channels(features)), state)
            for number, (fit, state) in enumerate(zip(fits, states, strict=True))
            if state
        },
    )


def _under(arrays: Arrays, name: str | int) -> dict[str, NDArray[Any]]:
    """Return what lies under a name."""
    start = f"{name}/"
    return {
        name.removeprefix(start): values
        for name, values in arrays.items()
        if name.startswith(start)
    }


def _channels(features: Features) -> tuple[int, ...]:
    return tuple(own.channels for own in features.sets)


def _learnt(module: FittedModule, blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all that a head has learnt, as it is; the state of a blank one has the rest."""
    head = DistributionHead(module) if isinstance(module, ExactHead) else module
    return {
        name: value
        for name, value in head.state_dict().items()
        if not torch.equal(value.cpu(), blank[name])
    }


def _restored(blank: Head, state: Arrays) -> FittedModule:
    """Fill a blank head with what another has learnt."""
    tensors = {name: torch.from_numpy(values) for name, values in state.items()}
    blank.load_state_dict(blank.state_dict() | tensors)
    if isinstance(blank, DistributionHead):
        return blank.requires_grad_(False).exact
    assert isinstance(blank, NetworkHead)
    return blank.eval()
