"""Cells without labels: the images under a folder, grouped by the folder they are in."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import walk_folder
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
        """Find the images under a folder, grouped by the names of their folders.

        "auto" treats folders next to a table (a CSV: a cohort) as patients, and any other folders
        as classes. No table is read. Raises CohortError when there are no images.
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
        for place, files_there in files.images.items():
            key = "" if grouping == "none" else place.name
            by_name.setdefault(key, []).extend(place / name for name in files_there)
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
