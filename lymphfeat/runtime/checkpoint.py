"""The state of an unfinished training: one file, replaced as a whole now and then.

It carries the identity of its run (settings, cohort, initial weights): a run of another identity
does not go on from it.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lymphfeat.errors import ModelError
from lymphfeat.runtime.files import replace_file
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.strict_json import json_text, json_value

CHECKPOINT_FILE = "checkpoint.pt"  # in the folder of an unfinished result
_FORMAT = "lymphfeat-checkpoint-1"
# Writing takes at most this share of the time: short epochs are not all written.
_WRITE_SHARE = 0.05


class Checkpoint:
    """The checkpoint of one run."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        self.path = path
        self._provenance = dict(provenance)
        # Through JSON, as what is read back went.
        self._identity: dict[str, Any] = json_value(identity)
        self._not_before = 0.0

    def read(self) -> dict[str, Any] | None:
        """Return the state written last; None when there is none.

        Raises ModelError for a damaged one, and for one of another run, naming what differs.
        """
        if not self.path.exists():
            return None
        content = self._load()
        differences = differing_fields(self._identity, json.loads(content["identity"]))
        if differences:
            raise ModelError(
                f"{self.path}: an unfinished training with other settings is there: "
                f"{'; '.join(differences)}. Choose another --out, or start over with --force."
            )
        state: dict[str, Any] = content["state"]
        return state

    def _load(self) -> dict[str, Any]:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}")
        except Exception as error:  # a damaged file fails in many ways, all the same to the user
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{self.path}: cannot be read as a checkpoint ({reason}); start over with --force."
            ) from None
        return dict(content)

    def write(self, state: Mapping[str, Any], *, last: bool = False) -> None:
        """Replace the checkpoint, unless that would take too much of the time; `last` always."""
        begin = time.perf_counter()
        if begin < self._not_before and not last:
            return
        content = {
            "format": _FORMAT,
            "identity": json_text(self._identity),
            "provenance": json_text(self._provenance),
            "state": dict(state),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, lambda path: torch.save(content, path))
        end = time.perf_counter()
        self._not_before = end + (end - begin) / _WRITE_SHARE

    def check(self, *, force: bool) -> None:
        """Raise ModelError for a damaged checkpoint or another run's; by force, delete that."""
        try:
            self.read()
        except ModelError:
            if not force:
                raise
            self.remove()

    def remove(self) -> None:
        """Delete the checkpoint and what is left of one half written."""
        for path in (self.path, self.path.with_name(self.path.name + ".partial")):
            path.unlink(missing_ok=True)
