"""A folder of bags of features -> which files are whose, by the layouts of other tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lymphfeat.cohort.csv_rows import name_some, normal_id
from lymphfeat.errors import StoreError
from lymphfeat.features.exchange.arrays import META_SUFFIX, READERS, read_patients

TORCHMIL, SCEMILA, SLIDE2VEC, ANNDATA = "torchmil", "scemila", "slide2vec", "anndata"
PER_PATIENT = "a file per patient"  # CLAM, TRIDENT, STAMP
_BESIDE = ("coords", "inst_labels", "patch_labels")  # arrays of torchmil that are not read


@dataclass(frozen=True, kw_only=True)
class BagFiles:
    """One patient's files, and the label if the layout says it."""

    files: tuple[Path, ...]
    label: str | None = None
    rows: NDArray[np.int64] | None = None  # (n,) the patient's, of a file that holds many bags


@dataclass(frozen=True, kw_only=True)
class FoundBags:
    """The bags under a folder."""

    layout: str
    bags: Mapping[str, BagFiles]  # by the patient's id
    tables: tuple[Path, ...]  # CSV files
    notes: tuple[str, ...]


def find_bags(root: Path) -> FoundBags:
    """Find the bags under a folder; no features are read. Raises StoreError if there are none.

    - torchmil: features/<id>.npy or features/<backbone>/<id>.npy, and the label (0 or 1) in
      labels/<id>.npy.
    - SCEMILA: data/<label>/<id>/*.npy, of which all are the patient's.
    - AnnData: one .h5ad file, whose obs has a column patient.
    - CLAM, TRIDENT, STAMP, slide2vec: <id>.h5, .pt, .npy or .npz, in any folder.
    """
    if not root.is_dir():
        raise StoreError(f"source (={root}) must be a folder of bags of features.")
    files = sorted(path for path in root.rglob("*") if path.is_file() and not _hidden(path, root))
    tables = tuple(path for path in files if path.suffix.lower() == ".csv")
    if (root / "features").is_dir() and (root / "labels").is_dir():
        layout, bags, notes = TORCHMIL, _of_torchmil(root), _beside(root)
    elif any(_scemila_place(path, root) for path in files):
        layout, bags, notes = SCEMILA, _of_scemila(root, files), []
    elif sum(path.suffix == ".h5ad" for path in files) == 1:
        (file,) = (path for path in files if path.suffix == ".h5ad")
        layout, bags, notes = ANNDATA, _of_anndata(file), []
    else:
        layout, bags, notes = _of_files(root, files)
    if not bags:
        raise StoreError(
            f"source (={root}) must hold bags of features: a {', '.join(READERS)} file per "
            "patient, whose name is the patient's id; got none."
        )
    return FoundBags(layout=layout, bags=bags, tables=tables, notes=tuple(notes))


def _hidden(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _of_torchmil(root: Path) -> dict[str, BagFiles]:
    return {
        normal_id(path.stem): BagFiles(files=(path,), label=_label(root / "labels" / path.name))
        for path in sorted(_features_folder(root / "features").glob("*.npy"))
        if path.is_file()
    }


def _features_folder(folder: Path) -> Path:
    """Return the folder of arrays: torchmil's own data sets have one per backbone."""
    places = sorted({path.parent for path in folder.rglob("*.npy")})
    if len(places) > 1:
        raise StoreError(
            f"{folder}: must hold features of one backbone; got "
            f"{', '.join(str(place.relative_to(folder)) for place in places)}. Move the others "
            "away."
        )
    return places[0] if places else folder


def _label(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return str(np.load(path, allow_pickle=False).item())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: must hold one label, 0 or 1 ({error}).") from None


def _beside(root: Path) -> list[str]:
    found = [name for name in _BESIDE if (root / name).is_dir()]
    return [f"not read: {', '.join(found)}"] if found else []


def _scemila_place(path: Path, root: Path) -> tuple[str, str] | None:
    """Return label and id where a file lies at data/<label>/<id>/*.npy."""
    parts = path.relative_to(root).parts
    if len(parts) == 4 and parts[0] == "data" and path.suffix.lower() == ".npy":
        return parts[1], normal_id(parts[2])
    return None


def _of_scemila(root: Path, files: Sequence[Path]) -> dict[str, BagFiles]:
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in files:
        if place := _scemila_place(path, root):
            found.setdefault(place[1], []).append((place[0], path))
    bags = {}
    for id, own in found.items():
        labels = sorted({label for label, _ in own})
        if len(labels) > 1:
            raise StoreError(
                f"{root}: patient {id} must lie under one label; got {', '.join(labels)}."
            )
        bags[id] = BagFiles(files=tuple(path for _, path in own), label=labels[0])
    return bags


def _of_anndata(path: Path) -> dict[str, BagFiles]:
    found = read_patients(path, "patient")
    return {normal_id(id): BagFiles(files=(path,), rows=rows) for id, rows in found.items()}


def _of_files(root: Path, files: Sequence[Path]) -> tuple[str, dict[str, BagFiles], list[str]]:
    """Take a file per patient; where there are several kinds, the first that is preferred."""
    order = list(READERS)
    chosen: dict[str, Path] = {}
    passed: list[str] = []
    ours = [path for path in files if path.suffix.lower() in order]
    for path in sorted(ours, key=lambda path: (order.index(path.suffix.lower()), path)):
        first = chosen.setdefault(normal_id(path.stem), path)
        if first is path:
            continue
        if first.suffix.lower() == path.suffix.lower():
            raise StoreError(
                f"{root}: patient {path.stem} must have one file; got {first.relative_to(root)} "
                f"and {path.relative_to(root)}. Import one of the folders."
            )
        passed.append(path.relative_to(root).as_posix())
    bags = {id: BagFiles(files=(path,)) for id, path in chosen.items()}
    grid = any(path.with_name(path.stem + META_SUFFIX).exists() for path in chosen.values())
    again = (
        f"{len(passed)} file(s) not read, their patients have another: {name_some(passed, shown=3)}"
    )
    return SLIDE2VEC if grid else PER_PATIENT, bags, [again] if passed else []
