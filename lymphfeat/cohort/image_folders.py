"""Cells without labels: the images under a folder, grouped by the folder they are in."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import FOLDER_SPLITS, Files, walk_folder
from lymphfeat.cohort.provenance import PatientKey, Provenance
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.runtime.identity import file_hashes

GROUPINGS = ("patients", "classes", "none")


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Images and what their folders mean."""

    paths: tuple[Path, ...]  # (N,) group by group
    groups: NDArray[np.int64]  # (N,) index into `names`
    names: tuple[str, ...]  # of the groups
    grouping: str  # "patients", "classes", or "none": folders mean nothing

    @classmethod
    def find(cls, folder: Path, grouping: str = "auto") -> "Cells":
        """Find the images under a folder, grouped by their folders.

        "auto" treats folders next to a table (a CSV: a cohort) as patients, and any other folders
        as classes, which are known by their names. No table is read. Where there is one, images may
        also lie in folders below their patient's. Raises CohortError when there are no images.
        """
        if grouping not in ("auto", *GROUPINGS):
            raise SettingsError(f"groups (={grouping}) must be auto, {', '.join(GROUPINGS)}.")
        if not folder.is_dir():
            raise CohortError(
                f"folder (={folder}) must be a folder of images; there is no such folder."
            )
        files = walk_folder(folder)
        if not files.images:
            raise CohortError(f"{folder}: must hold images (jpg, png, tif, bmp); got none.")
        if grouping == "auto":
            grouping = _guess(files.tables, len(files.images))
        by_name: dict[str, list[Path]] = {}
        for place, group in _group_names(folder, files, grouping).items():
            by_name.setdefault(group, []).extend(place / name for name in files.images[place])
        names = tuple(sorted(by_name))
        return cls(
            paths=tuple(path for name in names for path in sorted(by_name[name])),
            groups=np.repeat(np.arange(len(names)), [len(by_name[name]) for name in names]),
            names=names,
            grouping=grouping,
        )

    def provenance(self) -> Provenance:
        """Return whose images these are; only the images where folders are not patients."""
        hashes = np.array(file_hashes(self.paths))
        if self.grouping != "patients":
            return Provenance(images=tuple(PatientKey.of("", [hash]) for hash in hashes))
        return Provenance(
            images=tuple(
                PatientKey.of(name, hashes[self.groups == group].tolist())
                for group, name in enumerate(self.names)
            )
        )

    def fingerprint(self) -> str:
        """Hash the groups, names and contents of all files."""
        digest = hashlib.sha256()
        hashes = file_hashes(self.paths)
        for path, group, hash in zip(self.paths, self.groups, hashes, strict=True):
            line = f"{self.names[group]}/{path.name}:{hash}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()


def _guess(tables: Sequence[Path], folders: int) -> str:
    if tables:
        return "patients"
    return "classes" if folders > 1 else "none"


def _group_names(root: Path, files: Files, grouping: str) -> dict[Path, str]:
    if grouping == "patients":
        return _patients(root, files.images, in_folders_below=bool(files.tables))
    return {place: place.name if grouping == "classes" else "" for place in files.images}


def _patients(root: Path, places: Iterable[Path], *, in_folders_below: bool) -> dict[Path, str]:
    """Name each image folder's patient: by the patient's folder, or its path if that is no id."""
    folder_of = {place: place for place in places}
    while in_folders_below and (inner := _inner(root, set(folder_of.values()))):
        folder_of = {
            place: folder.parent if folder in inner else folder
            for place, folder in folder_of.items()
        }
    count = Counter(folder.name for folder in set(folder_of.values()))
    return {
        place: folder.name if count[folder.name] == 1 else folder.relative_to(root).as_posix()
        for place, folder in folder_of.items()
    }


def _inner(root: Path, folders: set[Path]) -> set[Path]:
    """Return the folders that must lie inside a patient's.

    An id is the name of one folder of a cohort, so a name that several have is none.
    """
    count = Counter(folder.name for folder in folders)
    return {
        folder
        for folder in folders
        if count[folder.name] > 1
        and root not in (folder, folder.parent)
        and folder.parent.name.lower() not in FOLDER_SPLITS
    }
