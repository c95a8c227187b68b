"""A cohort on disk -> patients with labels, covariates and image paths (METHOD §6).

No image is opened here: reading a cohort takes one pass over its folders and tables.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from lymphfeat.cohort.cell_values import UNKNOWN
from lymphfeat.cohort.csv_rows import complain, name_some, normal_id
from lymphfeat.cohort.tables import ClinicalTable, choose_tables, read_patient, read_tables
from lymphfeat.errors import CohortError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
REFERENCE_DATE = date(2021, 1, 1)
FOLDER_SPLITS = {
    "train": "train",
    "trainset": "train",
    "training": "train",
    "test": "test",
    "testset": "test",
}
_NOT_COVARIATES = ("label", "split")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """Patients in numeric order of their ids, each with a label, covariates and images.

    table: index "id"; columns "label" (int64: 1 tumoral, 0 reactive, -1 unknown), "split"
        ("train" or "test"), then covariates: float64 with NaN, or categories with missing values.
    images: per patient, in the order of `table`, at least one path, sorted by name.
    notes: one line per irregularity found and how it was resolved.
    submission_ids: the patients with label -1, in the order of the test CSV, or else of the table.
    left_out: of each patient's id the images that cannot be used, where they were left out.
    allow_missing: whether patients without images are left out, rather than an error.
    reading: how it was read from its folder, wherever that was: what a result made of it records.
    """

    root: Path
    table: pd.DataFrame
    images: tuple[tuple[Path, ...], ...]
    notes: tuple[str, ...] = ()
    submission_ids: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    allow_missing: bool = False
    reading: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.table) != len(self.images) or not all(self.images):
            raise CohortError("images must hold at least one path for every row of the table.")

    @classmethod
    def load(
        cls,
        root: str | os.PathLike[str],
        *,
        table: str | os.PathLike[str] | None = None,
        allow_missing: bool = False,
        reference_date: date = REFERENCE_DATE,
    ) -> "Cohort":
        """Read a cohort in the challenge's layout, or one table and an image folder per id.

        table: the CSV to read, when it is not under `root` or when several are.
        allow_missing: leave out, with a note, patients without images and folders without a row.
        reference_date: the day on which a date of birth becomes an age in years.

        Raises CohortError, naming file, row and remedy, for anything that would need guessing.

        >>> lf.Cohort.load("cohort").n_images
        """
        root = Path(root)
        files = walk_folder(root)
        paths, unread = choose_tables(root, files.tables) if table is None else ([Path(table)], [])
        clinical = read_tables(paths, reference_date)
        found = _assign(root, files.images, set(clinical.frame.index))
        cohort = cls._of(root, clinical, found, allow_missing, [*unread, *files.notes()])
        reading = {
            "table": None if table is None else _below(Path(table), root),
            "reference_date": reference_date.isoformat(),
            "allow_missing": allow_missing,
            "on_error": "stop",
        }
        return replace(cohort, reading=reading)

    @classmethod
    def of_bags(
        cls,
        root: Path,
        clinical: ClinicalTable,
        names: Mapping[str, Sequence[str]],
        *,
        allow_missing: bool = False,
    ) -> "Cohort":
        """Make a cohort of images that are not on disk: of each patient's id their names.

        Raises CohortError for patients without images and for ids without a row, unless
        `allow_missing`, and for a table that has none of the ids.
        """
        rows = set(clinical.frame.index)
        found = _Found(holder="bag")
        for id, own in names.items():
            if id in rows:
                found.images[id], found.places[id] = [root / id / name for name in own], Path(id)
            else:
                found.orphans[Path(id)] = 0
        return cls._of(root, clinical, found, allow_missing)

    @classmethod
    def _of(
        cls,
        root: Path,
        clinical: ClinicalTable,
        found: "_Found",
        allow_missing: bool,
        unread: Sequence[str] = (),
    ) -> "Cohort":
        ids = _numeric_order(clinical.frame.index)
        missing = _check_missing(root, ids, found, allow_missing)
        ids = [id for id in ids if id in found.images]
        frame = clinical.frame.loc[ids].copy()
        frame["split"], split_notes = _splits(frame, found)
        return cls(
            root=root,
            table=frame[[*_NOT_COVARIATES, *frame.columns.drop([*_NOT_COVARIATES])]],
            images=tuple(tuple(found.images[id]) for id in ids),
            notes=(
                *(*clinical.notes, *unread, *found.notes, *missing, *split_notes),
                *_similar_ids(ids),
            ),
            submission_ids=tuple(id for id in clinical.submission_ids if id in found.images),
            allow_missing=allow_missing,
        )

    @classmethod
    def of_patient(
        cls,
        folder: str | os.PathLike[str],
        attributes: Mapping[str, str] | None = None,
        *,
        reference_date: date = REFERENCE_DATE,
    ) -> "Cohort":
        """Make a cohort of one unlabelled patient: all images under a folder, whose name is the id.

        attributes: column -> value, written as in a table; an empty value is missing.

        Raises CohortError for a folder without images and for values that cannot be read.

        >>> lf.Cohort.of_patient("cohort/images/P1", {"age": "67"}).n_images
        """
        root = Path(folder)
        files = walk_folder(root)
        paths = sorted(place / name for place, names in files.images.items() for name in names)
        if not paths:
            raise CohortError(f"folder (={root}) must hold the images of a patient; got none.")
        given = {name.strip().lower(): text.strip() for name, text in (attributes or {}).items()}
        clinical = read_patient(normal_id(root.resolve().name), given, reference_date)
        frame = clinical.frame.assign(split="test")
        return cls(
            root=root,
            table=frame[[*_NOT_COVARIATES, *frame.columns.drop([*_NOT_COVARIATES])]],
            images=(tuple(paths),),
            notes=(*clinical.notes, *files.notes()),
            submission_ids=clinical.submission_ids,
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the patients' ids, P9 before P10."""
        return tuple(self.table.index)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Return the labels, (P,): 1 tumoral, 0 reactive, -1 unknown."""
        return self.table["label"].to_numpy(dtype=np.int64, copy=True)

    @property
    def n_images(self) -> npt.NDArray[np.int64]:
        """Return the number of images of each patient, (P,)."""
        return np.array([len(paths) for paths in self.images], dtype=np.int64)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Return where each patient's images begin among all images, (P + 1,)."""
        return np.concatenate([[0], np.cumsum(self.n_images)]).astype(np.int64)

    @property
    def covariates(self) -> tuple[str, ...]:
        """Return the names of the covariate columns."""
        return tuple(name for name in self.table.columns if name not in _NOT_COVARIATES)

    @property
    def image_names(self) -> tuple[str, ...]:
        """Return the file name of every image, (N,); its path where a patient has a name twice."""
        return tuple(name for paths in self.images for name in _image_names(paths, self.root))

    def select(self, ids: Iterable[str]) -> "Cohort":
        """Keep the patients named, in the cohort's order; unknown or repeated ids are an error."""
        wanted = Counter(ids)
        wrong = [id for id, count in wanted.items() if count > 1 or id not in self.table.index]
        if wrong:
            what = "ids must be patients of the cohort, each named once; got"
            complain(what, wrong, "Name patients of the cohort, each once.")
        keep = [index for index, id in enumerate(self.ids) if id in wanted]
        return replace(
            self,
            table=self.table.iloc[keep],
            images=tuple(self.images[index] for index in keep),
            submission_ids=tuple(id for id in self.submission_ids if id in wanted),
            left_out={id: own for id, own in self.left_out.items() if id in wanted},
        )

    def without_images(self, faults: Mapping[Path, str]) -> "Cohort":
        """Leave out images, path -> what is wrong with it, and patients who then have none.

        Each is noted, and the images are in `left_out`.
        """
        left_out = {
            id: tuple(path for path in own if path in faults)
            for id, own in zip(self.ids, self.images, strict=True)
            if not faults.keys().isdisjoint(own)
        }
        images = [tuple(path for path in own if path not in faults) for own in self.images]
        kept = {id: own for id, own in zip(self.ids, images, strict=True) if own}
        return replace(
            self.select(list(kept)),
            images=tuple(kept.values()),
            notes=(*self.notes, *faults.values(), *_left_out_notes(left_out, kept)),
            left_out={**self.left_out, **left_out},
            reading={**self.reading, "on_error": "skip"} if faults else self.reading,
        )

    def labelled(self) -> "Cohort":
        """Keep the patients with label 0 or 1."""
        return self.select(self.table.index[self.table["label"] != UNKNOWN])

    def unlabelled(self) -> "Cohort":
        """Keep the patients with label -1."""
        return self.select(self.table.index[self.table["label"] == UNKNOWN])


def _below(path: Path, root: Path) -> str:
    """Return a path below a folder; of one outside it the name alone."""
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _left_out_notes(
    left_out: Mapping[str, Sequence[Path]], kept: Mapping[str, Sequence[Path]]
) -> Iterator[str]:
    if left_out:
        count = sum(map(len, left_out.values()))
        yield f"left out {count} image(s) that cannot be used, of {len(left_out)} patient(s)"
    if lost := [id for id in left_out if id not in kept]:
        yield f"left out {len(lost)} patient(s) without a usable image: {', '.join(lost)}"


def _image_names(paths: Sequence[Path], root: Path) -> list[str]:
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [path.relative_to(root).as_posix() for path in paths]


def _numeric_order(ids: Iterable[str]) -> list[str]:
    return sorted(ids, key=lambda id: (_number_key(id), id))


def _number_key(id: str) -> tuple[str | int, ...]:
    """Split P10 into ("P", 10, ""): text and numbers alternate, so keys always compare."""
    parts = re.split(r"([0-9]+)", id)
    # 12 after 9: numbers by their digits, because there may be thousands of them
    return tuple(
        number
        for index, part in enumerate(parts)
        for number in ((len(part.lstrip("0")), part.lstrip("0")) if index % 2 else (part,))
    )


# --- what the folder contains -----------------------------------------------------------------


@dataclass(kw_only=True)
class Files:
    """The files under a folder, sorted by what they are."""

    images: dict[Path, list[str]] = field(default_factory=dict)  # folder -> names
    tables: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)  # .DS_Store, ._x.jpg, __MACOSX
    others: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Report what was not read."""
        return [*_passed_over("hidden", self.hidden), *_passed_over("other", self.others)]


def _passed_over(kind: str, paths: Sequence[Path]) -> list[str]:
    names = name_some(sorted({path.name for path in paths}), shown=3)
    return [f"{len(paths)} {kind} file(s) or folder(s) not read: {names}"] if paths else []


def walk_folder(root: Path) -> Files:
    """Sort the files under a cohort's folder; raises CohortError when it cannot be read."""
    if not root.is_dir():
        problem = "is a file; unpack it first" if root.exists() else "does not exist"
        raise CohortError(
            f"cohort folder {root} {problem}; it must hold a table (CSV: id,label) "
            "and one folder of images per id."
        )
    files = Files()
    try:
        _enter(root, (), files)
    except OSError as error:
        raise CohortError(f"{error.filename} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise CohortError(f"{root}: has too many folders within each other.") from None
    files.tables.sort()
    return files


def _enter(folder: Path, above: tuple[tuple[int, int], ...], files: Files) -> None:
    """Sort the files under `folder`; links are followed, but not back to a folder above."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise CohortError(f"{folder} is a link to a folder above itself; remove the link.")
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                files.hidden.append(Path(entry.path))
            elif entry.is_dir():
                _enter(Path(entry.path), (*above, here), files)
            elif entry.is_file() or not Path(entry.path).exists():  # a link to nothing fails later
                _sort_file(folder, entry.name, files)
            else:  # reading it might never end
                raise CohortError(f"{entry.path} must be a file or a folder; remove it.")


def _sort_file(folder: Path, name: str, files: Files) -> None:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path each costs more than the walk)
    if suffix in IMAGE_SUFFIXES:
        files.images.setdefault(folder, []).append(name)
    else:
        (files.tables if suffix == ".csv" else files.others).append(folder / name)


# --- whose images they are --------------------------------------------------------------------


@dataclass(kw_only=True)
class _Found:
    """Image folders, matched with the ids of the table."""

    images: dict[str, list[Path]] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)  # id -> folder, relative to the root
    orphans: dict[Path, int] = field(default_factory=dict)  # of no patient -> images, 0: unknown
    notes: list[str] = field(default_factory=list)
    holder: str = "image folder"  # of a patient's images


def _assign(root: Path, folders: dict[Path, list[str]], ids: set[str]) -> _Found:
    """Give each image folder to the patient whose id is its name, or that of a folder above it."""
    found = _Found()
    loose: dict[Path, list[str]] = {}
    twice: list[str] = []
    for folder, names in folders.items():
        place = _patient_folder(folder.relative_to(root), ids)
        if place is None:
            loose[folder.relative_to(root)] = names
            continue
        id = normal_id(place.name)
        if found.places.setdefault(id, place) != place:
            twice.append(f"{id}: {found.places[id]} and {place}")
        found.images.setdefault(id, []).extend(folder / name for name in names)
    if twice:
        what = f"patients with several image folders under {root}"
        complain(what, sorted(set(twice)), "Keep the right one of each.")
    for paths in found.images.values():
        paths.sort()
    _sort_loose(loose, found)
    return found


def _patient_folder(folder: Path, ids: set[str]) -> Path | None:
    """Return the folder's path up to the patient's id; two patients along it are an error."""
    chain = [place for place in (folder, *folder.parents) if normal_id(place.name) in ids]
    names = {normal_id(place.name) for place in chain}
    if len(names) > 1:
        complain(
            f"image folder {folder} is inside the folders of several patients",
            sorted(names),
            "Give each patient a folder outside those of the others.",
        )
    return chain[0] if chain else None


def _sort_loose(loose: dict[Path, list[str]], found: _Found) -> None:
    """Skip images next to or above the patients' folders; keep others as possible patients."""
    above = {Path(), *(parent for place in found.places.values() for parent in place.parents)}
    beside = [str(folder / name) for folder in loose if folder in above for name in loose[folder]]
    if beside:
        shown = name_some(beside, shown=3)
        found.notes.append(f"{len(beside)} image(s) outside any patient's folder not read: {shown}")
    found.orphans.update({f: len(names) for f, names in loose.items() if f not in above})


def _check_missing(root: Path, ids: Sequence[str], found: _Found, allow_missing: bool) -> list[str]:
    """Refuse patients without images and images without a patient, or return them as notes."""
    folders = {_like(place.name): place for place in found.orphans}
    absent = [id for id in ids if id not in found.images]
    similar = [
        f"{id} (the folder {folders[_like(id)]}?)" if _like(id) in folders else id for id in absent
    ]
    orphans = [
        f"{folder} ({count} images)" if count else str(folder)
        for folder, count in found.orphans.items()
    ]
    kinds = {
        "patient(s) without images": similar,
        f"{found.holder}(s) without table row": orphans,
    }
    kinds = {kind: names for kind, names in kinds.items() if names}
    missing = [f"{len(names)} {kind}: {name_some(names)}" for kind, names in kinds.items()]
    if len(absent) == len(ids):
        what = f"no patient of the table has images under {root}"
        remedy = f"Each patient must have a {found.holder} whose name is exactly its id."
        complain(what, missing, remedy)
    if missing and not allow_missing:
        remedy = "Add or rename them, or leave them out with --allow-missing."
        complain(str(root), missing, remedy)
    return [f"left out {len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items()]


def _like(name: str) -> str:
    """Return what a name has in common with others of other case, spaces or leading zeros.

    Hyphens and underscores count as spaces; between digits they divide numbers.
    """
    plain = re.sub(r"(?<=\d)[\s_-]+(?=\d)", "|", normal_id(name).casefold())
    plain = re.sub(r"[\s_-]+", "", plain)
    return re.sub(r"(?<!\d)0+(?=\d)", "", plain)


def _similar_ids(ids: Sequence[str]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for id in ids:
        groups.setdefault(_like(id), []).append(id)
    for alike in groups.values():
        if len(alike) > 1:
            yield (
                f"ids {', '.join(alike)}: read as different patients, although they differ only in "
                "case, spaces, hyphens or leading zeros"
            )


def _splits(frame: pd.DataFrame, found: _Found) -> tuple[list[str], list[str]]:
    """Take the split from the table, or else from the folder, or else from the label."""
    splits: list[str] = []
    moved: list[str] = []
    for id, label, given in zip(frame.index, frame["label"], frame["split"], strict=True):
        folder = _folder_split(found.places[id])
        split = given or folder or ("test" if label == UNKNOWN else "train")
        splits.append(split)
        if folder not in (None, split):
            moved.append(f"{id} ({split})")
    notes = (
        [f"split: taken from the table, not the folder, for {name_some(moved)}"] if moved else []
    )
    return splits, notes


def _folder_split(place: Path) -> str | None:
    names = [FOLDER_SPLITS[part.lower()] for part in place.parts if part.lower() in FOLDER_SPLITS]
    return names[-1] if names else None
