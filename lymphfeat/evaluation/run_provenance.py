"""The provenance of a run: whose labels and images its features come from, and its patients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lymphfeat.cohort.provenance import NOBODY, PatientKey, Provenance, keys_from_json, keys_to_json
from lymphfeat.cohort.splits import Split
from lymphfeat.errors import SettingsError, first_line
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.runtime.strict_json import parse_json
from lymphfeat.runtime.versions import refuse_newer

RUN_FORMAT = "lymphfeat-run"
RUN_VERSION = 1  # which a run need not say; the next one must
CONFIG_FILE, SUMMARY_FILE = "config.json", "summary.json"
SPLITS_FILE, PROVENANCE_FILE = "splits.json", "provenance.json"
RUN_FILES = (
    "summary.png",
    SUMMARY_FILE,
    "warnings.txt",
    "runs.csv",
    "epochs.csv",
    "predictions.csv",
    SPLITS_FILE,
    PROVENANCE_FILE,
    CONFIG_FILE,
)


def read_config(run: Path) -> dict[str, Any]:
    """Read the config.json of a run folder.

    Raises SettingsError for anything else, for a damaged run and for one of a newer version.
    """
    try:
        config = parse_json((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise no_run(run, error) from None
    check_version(run, config)
    if config.get("format") != RUN_FORMAT:
        raise SettingsError(
            f"run (={run}) must be a run folder of `lymphfeat fit-head`; its config.json is of "
            "something else."
        )
    return dict(config)


def no_run(folder: Path, error: Exception) -> SettingsError:
    """Return what to raise for a folder that is none of a run, or of a damaged one."""
    found = f"no {error}" if isinstance(error, KeyError) else first_line(error)
    return SettingsError(
        f"run (={folder}) must be a run folder of `lymphfeat fit-head`; got {found}. "
        "Fit it, or fit it again with --force."
    )


def check_version(run: Path, config: Mapping[str, Any]) -> None:
    """Raise SettingsError for a run, by the content of its config.json, of a newer version."""
    if not isinstance(config, dict):
        raise SettingsError(
            f"{run} is a damaged run (config.json holds no settings); fit it again."
        )
    found = config.get("format_version", 1)
    refuse_newer(run / CONFIG_FILE, found, RUN_VERSION, SettingsError)


@dataclass(frozen=True, kw_only=True)
class RunProvenance:
    """The content of a run's `provenance.json`."""

    patients: Mapping[str, PatientKey]  # by the run's own ids
    features: Mapping[str, Provenance]  # by the name of a set of features

    @classmethod
    def of(cls, stores: Sequence[FeatureStore]) -> "RunProvenance":
        """Collect the provenance of stores of the same images."""
        features: dict[str, Provenance] = {}
        for store in stores:
            for name, found in store.feature_sets.items():
                features[name] = features.get(name, NOBODY) | found.provenance
        return cls(patients={key.id: key for key in stores[0].keys}, features=features)

    @classmethod
    def read(cls, run: Path) -> "RunProvenance":
        """Read a run folder's; empty for runs of earlier versions, which have none.

        Raises SettingsError for a damaged file.
        """
        path = run / PROVENANCE_FILE
        if not path.is_file():
            return cls(patients={}, features={})
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            return cls(
                patients={key.id: key for key in keys_from_json(content["patients"])},
                features={
                    name: Provenance.from_json(found) for name, found in content["features"].items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"{path} is damaged ({error}); fit the run again.") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file."""
        return {
            "patients": keys_to_json(self.patients.values()),
            "features": {name: found.to_json() for name, found in self.features.items()},
        }

    def key(self, id: str) -> PatientKey:
        """Return the key by which a patient of the run is recognised."""
        return self.patients.get(id, PatientKey(id=id))

    def of_features(self, split: Split) -> Provenance:
        """Return the provenance of a split's features."""
        return self.features.get(FROZEN, NOBODY) | self.features.get(split.id, NOBODY)

    def of_heads(self, split: Split) -> Provenance:
        """Return the provenance of a split's heads: its features and its training patients."""
        training = Provenance(labels=tuple(self.key(id) for id in split.train))
        return self.of_features(split) | training

    def seen(self, splits: Iterable[Split]) -> set[str]:
        """Return those splits' validation patients whose labels their features come from."""
        return {
            id
            for split in splits
            for id in self.of_features(split).labelled(self.key(id) for id in split.validation)
        }
