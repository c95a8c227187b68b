"""What a run folder of `fit-head` says of how it was fitted."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lymphfeat.cohort.splits import Split, read_splits
from lymphfeat.errors import ModelError, SettingsError
from lymphfeat.evaluation.run_provenance import (
    CONFIG_FILE,
    SPLITS_FILE,
    SUMMARY_FILE,
    no_run,
    read_config,
)
from lymphfeat.features.store import FeatureStore
from lymphfeat.runtime.files import recover
from lymphfeat.runtime.strict_json import parse_json
from lymphfeat.settings import FitSettings, HeadSettings, with_tuples


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """How a run was fitted."""

    folder: Path
    config: Mapping[str, Any]  # the content of config.json
    settings: FitSettings
    heads: tuple[HeadSettings, ...]
    splits: tuple[Split, ...]
    stores: tuple[Mapping[str, Any], ...]  # path, recipe_sha256
    summary: tuple[Mapping[str, Any], ...]  # a line per row, the best first

    @classmethod
    def read(cls, folder: Path) -> "RecordedRun":
        """Read a run folder; raises SettingsError for anything else, and for a damaged one."""
        recover(folder)
        config = read_config(folder)
        try:
            summary = parse_json((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise no_run(folder, error) from None
        try:
            run = cls(
                folder=folder,
                config=config,
                settings=FitSettings(**with_tuples(config["settings"])),
                heads=tuple(HeadSettings(**each) for each in config["heads"].values()),
                splits=tuple(read_splits(folder / SPLITS_FILE)),
                stores=(config["store"], *config.get("other_stores", ())),
                summary=tuple(summary),
            )
            for store in run.stores:
                _ = store["path"], store["recipe_sha256"]
            _ = dict(config.get("computed", {}).get("versions", {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"{folder / CONFIG_FILE} is damaged ({error}); fit the run again."
            ) from None
        if not run.splits or not run.summary:
            raise SettingsError(f"{folder} is damaged (no splits, or no rows); fit the run again.")
        return run

    def open_stores(self, paths: Sequence[str | os.PathLike[str]] = ()) -> list[FeatureStore]:
        """Open the run's stores, where they were or at `paths`.

        Raises SettingsError for another number of stores, StoreError for one that cannot be read,
        and ModelError for one of another recipe.
        """
        if paths and len(paths) != len(self.stores):
            raise SettingsError(
                f"store (={', '.join(map(str, paths))}) must name the {len(self.stores)} stores of "
                "the run, in its order."
            )
        opened = [
            FeatureStore.open(path)
            for path in (paths or [recorded["path"] for recorded in self.stores])
        ]
        for store, recorded in zip(opened, self.stores, strict=True):
            if store.recipe_sha256 != recorded["recipe_sha256"]:
                raise ModelError(
                    f"{store.path}: must be the store that {self.folder} was fitted on; it has "
                    "another recipe. Fit the heads again on this store."
                )
        return opened
