"""The state of an unfinished training: one file, replaced as a whole about once a minute.

It carries the identity of its run (settings, cohort, initial weights): a run of another identity
does not continue from it.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lymphfeat.errors import ModelError, first_line
from lymphfeat.runtime.files import replace_file, write_buffered
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.saved_tensors import read_saved
from lymphfeat.runtime.strict_json import json_text, json_value, parse_json

CHECKPOINT_FILE = "checkpoint.pt"  # in the folder of an unfinished result
_FORMAT = "lymphfeat-checkpoint-1"
_SECONDS_BETWEEN_WRITES = 60.0


class Checkpoint:
    """The checkpoint of one run."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        *,
        seconds: float = _SECONDS_BETWEEN_WRITES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write at `path`, at most once in `seconds` of the `clock`."""
        self.path = path
        self._provenance = dict(provenance)
        # Through JSON, like the identity that is read back.
        self._identity: dict[str, Any] = json_value(identity)
        self._seconds, self._clock = seconds, clock
        self._written: float | None = None  # when this process wrote last

    def read(self) -> dict[str, Any] | None:
        """Return the state written last, or None.

        Raises ModelError for a damaged checkpoint, and for one of another run, naming what differs.
        """
        if not self.path.exists():
            return None
        content = self._load()
        differences = differing_fields(self._identity, content["identity"])
        if differences:
            raise ModelError(
                f"{self.path} belongs to an unfinished training with other settings: "
                f"{'; '.join(differences)}. Choose another --out, or start over with --force."
            )
        state: dict[str, Any] = content["state"]
        return state

    def _load(self) -> dict[str, Any]:
        try:
            content = read_saved(self.path)
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}")
            return {"identity": dict(parse_json(content["identity"])), "state": content["state"]}
        except Exception as error:  # a damaged file fails in many ways; the user sees one message
            raise ModelError(
                f"{self.path}: cannot be read as a checkpoint ({first_line(error)}); start over "
                "with --force."
            ) from None

    def write(self, state: Mapping[str, Any], *, last: bool = False) -> None:
        """Replace the checkpoint when the last write is long enough ago.

        The first call writes at once, so that a short training can be resumed too; so does the one
        with the `last` state.
        """
        if not last and not self._is_due():
            return
        content = {
            "format": _FORMAT,
            "identity": json_text(self._identity),
            "provenance": json_text(self._provenance),
            "state": dict(state),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, lambda path: write_buffered(path, partial(torch.save, content)))
        self._written = self._clock()

    def _is_due(self) -> bool:
        return self._written is None or self._clock() - self._written >= self._seconds

    def check(self, *, force: bool) -> None:
        """Raise ModelError for a damaged checkpoint or another run's; with `force`, delete it."""
        try:
            self.read()
        except ModelError:
            if not force:
                raise
            self.remove()

    def remove(self) -> None:
        """Delete the checkpoint and any partly written one."""
        for path in (self.path, self.path.with_name(self.path.name + ".partial")):
            path.unlink(missing_ok=True)
