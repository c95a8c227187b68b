"""A model of `endtoend`, trained again."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.csv_rows import name_some
from lymphfeat.cohort.fingerprints import cohort_fingerprint, patient_keys
from lymphfeat.errors import LymphfeatError, ModelError, SettingsError
from lymphfeat.model.ensemble import MEMBERS_FILE, member_name
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE
from lymphfeat.model.submission import HEADERS, PATIENTS_FILE, SUBMISSION_FILE
from lymphfeat.repetition.comparison import (
    Repetition,
    check_circumstances,
    compare_folders,
    list_changes,
)
from lymphfeat.repetition.place import Here, ReadAs
from lymphfeat.runtime.progress import Progress
from lymphfeat.runtime.strict_json import parse_json
from lymphfeat.runtime.versions import refuse_newer
from lymphfeat.settings import BackboneSettings, EndToEndSettings, HeadSettings, with_tuples
from lymphfeat.training import MODEL, TRAINING_FILE, TRAINING_FORMAT, TRAINING_VERSION, train

# Fields of a model's JSON that say where and with what it was trained, and by which name.
_INCIDENTAL = tuple(
    f"training.{name}"
    for name in (
        *("versions", "settings.device", "settings.threads", "initial_weights"),
        *("settings.backbone.weights", "settings.init_head"),
    )
)
_SHOWN = 5


def repeat_model(
    folder: Path, out: Path, here: Here, *, force: bool, progress: Progress
) -> Repetition:
    """Train the same settings on the same patients."""
    recorded = _Recorded.read(folder)
    facts, settings = recorded.facts, recorded.settings
    backbone = here.weights_of(
        settings.backbone, facts.initial_weights, facts.initial_weights_sha256, folder
    )
    init_head = str(here.init_head) if here.init_head else settings.init_head
    settings = replace(
        settings,
        backbone=backbone,
        init_head=init_head,
        **here.computing(recorded.computed, settings),
    )
    cohort = here.load_cohort(folder, recorded.cohort, backbone.crop, progress)
    train(
        cohort,
        out,
        settings,
        folds=recorded.folds,
        force=force,
        submission_header=recorded.submission_header,
        progress=progress,
    )
    changed = list_changes(recorded.computed, _Recorded.read(out).computed)
    return compare_folders(
        folder,
        out,
        MODEL,
        but=TRAINING_FILE,
        incidental=_INCIDENTAL,
        changed=[*_other_patients(facts, cohort), *changed],
    )


def _other_patients(facts: TrainingFacts, cohort: Cohort) -> list[str]:
    """Say whether the cohort is another one than then, and whose images are others."""
    if cohort_fingerprint(cohort) == dict(facts.cohort):
        return []
    known = {key for key in facts.provenance.labels if key.images}
    ids = {key.id for key in known} & set(facts.trained_on)
    others = [key.id for key in patient_keys(cohort) if key.id in ids and key not in known]
    if others:
        return [f"the images of {name_some(others, shown=_SHOWN)} are others now"]
    return ["the table, or images of patients whose label was not trained on, are others now"]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What a model's folder says of how it was trained."""

    settings: EndToEndSettings
    folds: int | None
    submission_header: str
    cohort: ReadAs
    facts: TrainingFacts  # of the first member, where there are several
    computed: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "_Recorded":
        """Read it; raises ModelError for a damaged folder."""
        try:
            facts = _read_facts(folder)
            training = _read_training(folder) or _as_earlier(folder, facts)
            patients = pd.read_csv(folder / PATIENTS_FILE, dtype=str, keep_default_na=False)
            folds, header = training["folds"], training["submission_header"]
            if folds is not None and (type(folds) is not int or folds < 2):
                raise ValueError(f"{folds!r:.40} folds")
            if header not in HEADERS:
                raise ValueError(f"the header {header!r:.40}")
            return cls(
                # Of "auto", what it was: another processor would choose another.
                settings=replace(
                    _settings(training["settings"]), precision=facts.settings["precision"]
                ),
                folds=folds,
                submission_header=header,
                cohort=ReadAs.of(patients["id"].tolist(), training["reading"], facts.cohort),
                facts=facts,
                computed=check_circumstances(training["computed"]),
            )
        except LymphfeatError:
            raise
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"model (={folder}) is damaged ({error}); copy the folder again, or train again "
                "with `lymphfeat endtoend`."
            ) from None


def _read_facts(folder: Path) -> TrainingFacts:
    first = folder / member_name(0) / FACTS_FILE
    found = (path for path in (folder / FINAL_FILE, folder / FACTS_FILE) if path.is_file())
    path = next(found, first)
    return TrainingFacts.from_json(parse_json(path.read_bytes())["training"])


def _read_training(folder: Path) -> Mapping[str, Any] | None:
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None
    content = dict(parse_json(path.read_bytes()))
    if content["format"] != TRAINING_FORMAT:
        raise ValueError(f"{TRAINING_FILE} is of something else")
    refuse_newer(path, content["format_version"], TRAINING_VERSION, SettingsError)
    return content


def _as_earlier(folder: Path, facts: TrainingFacts) -> dict[str, Any]:
    """Return what the model of an earlier version says, which had no training.json."""
    members = None
    if (folder / MEMBERS_FILE).is_file():
        members = len(parse_json((folder / MEMBERS_FILE).read_bytes())["members"])
    elif (folder / FINAL_FILE).is_file():
        members = len(list(folder.glob("fold-*")))
    return {
        "settings": facts.settings,
        "folds": members,
        "submission_header": _header(folder / SUBMISSION_FILE),
        "reading": {},
        "computed": {"versions": dict(facts.versions)},
    }


def _header(path: Path) -> str:
    if not path.is_file():
        return HEADERS[0]
    with path.open(encoding="utf-8", newline="") as file:
        return ",".join(next(csv.reader(file)))


def _settings(content: Mapping[str, Any]) -> EndToEndSettings:
    nested = {
        "backbone": BackboneSettings(**content["backbone"]),
        "head": HeadSettings(**content["head"]),
    }
    return EndToEndSettings(**{**with_tuples(content), **nested})
