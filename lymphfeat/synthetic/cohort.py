"""A synthetic cohort of rendered smears in the challenge's layout, quirks included (METHOD §6).

* `synthetic.json` is written first: the settings, and which files are ours. `truth.csv` is written
  last: a cohort without it is unfinished, and writing it again continues where it stopped.
* Every file is written under a temporary name and renamed, so every file is complete.
* Every patient and every image has its own generator: the bytes depend only on the settings,
  not on the number of threads or on where a run was cut off.
"""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lymphfeat.errors import CohortError
from lymphfeat.runtime.disks import writing
from lymphfeat.runtime.files import claimed, lock_file
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.strict_json import json_text, json_value, parse_json
from lymphfeat.settings import SyntheticSettings, with_tuples
from lymphfeat.synthetic.patients import (
    TABLE_COLUMNS,
    TEST,
    TRAIN,
    SyntheticPatient,
    plan_patients,
    shuffled,
)
from lymphfeat.synthetic.rendering import Slide, cell_extent, draw_slide, render_cell
from lymphfeat.synthetic.signs import draw_look

__all__ = [
    "CELL_CLASSES",
    "SyntheticSettings",
    "cell_extents",
    "count_synthetic_cohort",
    "is_synthetic_cohort",
    "render_cell",
    "write_plate",
    "write_synthetic_cohort",
]

CELL_CLASSES = _SMALL, _LARGE, _ATYPICAL = (
    "small_lymphocyte",
    "large_lymphocyte",
    "atypical_lymphocyte",
)
MANIFEST, TRUTH = "synthetic.json", "truth.csv"
TABLES = (
    "clinical_annotation.csv",
    f"{TRAIN}/trainset_true.csv",
    f"{TEST}/testset_data.csv",
    "sample_submission.csv",
)
TRUTH_COLUMNS = ("SPLIT", "ID", "FILE", "LABEL", "CELL_CLASS", "IS_WITNESS")

_FORMAT, _VERSION = "lymphfeat synthetic cohort", 1
# Settings younger than the first cohorts of this version; at these values they are not written.
_YOUNGER: dict[str, Any] = {"sign": "witness", "image_range": None}
_PATIENT_KEY, _PLATE_KEY, _LOOK_KEY = 1, 2, 3  # first spawn keys of the generators
_SUBMITTED_SHARE = 0.4  # of the test ids are in sample_submission.csv (METHOD §6: 17 of 42)
_JPEG_QUALITY = 90
_PLATE_PATIENTS = 4  # of each class, on a plate of patients
_FOLDER = re.compile(rf"({TRAIN}|{TEST})/P\d+")
_PlateRow = tuple[str, Callable[[int], NDArray[np.uint8]]]  # title, cell of a column


def write_synthetic_cohort(
    settings: SyntheticSettings,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    workers: int = 2,
    progress: Progress = silent,
) -> Path:
    """Write the cohort into the folder `out` and return it; a finished one is left as it is.

    force: replace a synthetic cohort, whatever its settings; write into a folder that holds
        other things. A file that is not ours is never overwritten or removed.
    workers: threads that render; the bytes do not depend on it.

    Raises CohortError when `out` holds something in the way, naming it, or when another process is
    writing it; OutputError where the disk is full or closed.
    """
    out = Path(out)
    patients = plan_patients(settings)
    manifest = _Manifest.of(settings, patients)
    if not force and manifest.is_of(out):
        return out
    with _alone(out):
        if not _is_finished(out, manifest, force):
            _write(out / MANIFEST, manifest.to_bytes())
            _write_tables(out, settings, patients)
            _render_patients(out, settings, patients, workers, progress)
            rows = [row for patient in patients for row in _truth_rows(settings, patient)]
            _write_table(out / TRUTH, TRUTH_COLUMNS, rows)
    return out


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other processes from writing a cohort."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(out.absolute().with_name(f"{out.absolute().name}.lock")) as alone:
            if not alone:
                raise CohortError(
                    f"{out}: another process is writing it; wait for it or choose another name."
                )
            yield


def count_synthetic_cohort(out: Path) -> dict[str, int]:
    """Count what a finished synthetic cohort holds, from its truth file."""
    with (out / TRUTH).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    patients = Counter((split, label) for split, _, label in {_identity(row) for row in rows})
    return {
        "reactive": patients[TRAIN, "0"],
        "tumoral": patients[TRAIN, "1"],
        "test_reactive": patients[TEST, "0"],
        "test_tumoral": patients[TEST, "1"],
        "images": len(rows),
        "atypical": sum(row["IS_WITNESS"] == "1" for row in rows),
    }


def _identity(row: dict[str, str]) -> tuple[str, str, str]:
    return row["SPLIT"], row["ID"], row["LABEL"]


# --- whose files they are ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """The content of `synthetic.json`; empty when there is none of ours."""

    settings: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # patient folder -> number of images

    @classmethod
    def of(cls, settings: SyntheticSettings, patients: Sequence[SyntheticPatient]) -> "_Manifest":
        plain = json_value(asdict(settings) | {"version": _VERSION})
        return cls(settings=plain, images={p.folder: p.images for p in patients})

    @classmethod
    def read(cls, path: Path) -> "_Manifest":
        try:
            content = parse_json(path.read_bytes())
            if content["format"] != _FORMAT or not all(map(_FOLDER.fullmatch, content["images"])):
                return cls()
            settings = _YOUNGER | content["settings"]
            return cls(settings=settings, images=dict(content["images"]))
        except (OSError, ValueError, TypeError, KeyError):
            return cls()

    def is_of(self, out: Path) -> bool:
        """Return whether a folder holds this very cohort, finished."""
        return (out / TRUTH).exists() and _Manifest.read(out / MANIFEST) == self

    def to_bytes(self) -> bytes:
        settings = {
            name: value
            for name, value in self.settings.items()
            if name not in _YOUNGER or value != _YOUNGER[name]
        }
        content = {"format": _FORMAT, "settings": settings, "images": self.images}
        return json_text(content, indent=1).encode()

    def files(self) -> dict[str, None]:
        """Name the files, relative to the cohort, in an order in which they may be removed."""
        if not self.settings:
            return {}
        images = [f"{k}/{name}" for k, count in self.images.items() for name in _names(count)]
        return dict.fromkeys([TRUTH, *images, *TABLES, MANIFEST])


def _names(count: int) -> list[str]:
    return [f"{index:06d}.jpg" for index in range(count)]


def _is_finished(out: Path, wanted: _Manifest, force: bool) -> bool:
    """Make `out` ready for writing, unless it already holds the cohort."""
    there = _Manifest.read(out / MANIFEST)
    if not force:
        _check_ours(out, there)
        _check_same(out, there, wanted)
        if wanted.is_of(out):
            return True
    _check_nothing_in_the_way(out, there, wanted)
    if force:
        _remove(out, there)
    return False


def _check_ours(out: Path, there: _Manifest) -> None:
    if out.exists() and not out.is_dir():
        raise CohortError(f"{out} is a file; name a folder.")
    if there.settings or not out.exists():
        return
    found = next((path for path in sorted(out.iterdir()) if not path.name.startswith(".")), None)
    if found is not None:
        raise CohortError(
            f"{out} holds {found.name}, which is not part of a synthetic cohort; choose "
            "another folder, or add to its contents with --force."
        )


def _check_same(out: Path, there: _Manifest, wanted: _Manifest) -> None:
    if not there.settings:
        return
    differ = [
        f"{name} (={there.settings.get(name)}) where {value} is asked for"
        for name, value in wanted.settings.items()
        if there.settings.get(name) != value
    ]
    if differ:
        raise CohortError(
            f"{out} holds a synthetic cohort of other settings: {'; '.join(differ)}; choose "
            "another folder, or replace it with --force."
        )


def _check_nothing_in_the_way(out: Path, there: _Manifest, wanted: _Manifest) -> None:
    """Refuse to overwrite a file that is not ours, or to mix our images with others."""
    ours, planned = there.files(), wanted.files()
    folders = there.images | wanted.images
    beside = (out / folder for folder in folders if (out / folder).is_dir())
    found = [path.relative_to(out).as_posix() for folder in beside for path in folder.iterdir()]
    found = [name for name in found if not Path(name).name.startswith(".")]
    found += [name for name in planned if name not in ours and (out / name).exists()]
    strange = sorted({name for name in found if name not in ours})
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise CohortError(
            f"{out} holds {strange[0]}{more}, which no synthetic cohort wrote and which is in its "
            "way; move it away or choose another folder (--force does not remove it)."
        )


def _remove(out: Path, there: _Manifest) -> None:
    """Remove our files, truth first and the manifest last, and the folders left empty."""
    for name in there.files():
        (out / name).unlink(missing_ok=True)
    for folder in (*there.images, TRAIN, TEST):
        if (out / folder).is_dir() and not any((out / folder).iterdir()):
            (out / folder).rmdir()


# --- writing ----------------------------------------------------------------------------------


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)  # a full disk gets its room back
        raise


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    _write(path, stream.getvalue().encode())


def _write_tables(
    out: Path, settings: SyntheticSettings, patients: Sequence[SyntheticPatient]
) -> None:
    everyone = shuffled(patients, settings)
    test = [patient for patient in everyone if patient.split == TEST]
    main, train_table, test_table, submission = (out / name for name in TABLES)
    numbered = [(k, *patient.row()) for k, patient in enumerate(everyone)]
    _write_table(main, ("", *TABLE_COLUMNS), numbered)
    _write_table(train_table, TABLE_COLUMNS, [p.row() for p in everyone if p.split == TRAIN])
    if test:
        _write_table(test_table, TABLE_COLUMNS, [patient.row() for patient in test])
        some = test[: max(1, round(_SUBMITTED_SHARE * len(test)))]
        _write_table(submission, ("Id", "Predicted"), [(patient.id, 0) for patient in some])


def _render_patients(
    out: Path,
    settings: SyntheticSettings,
    patients: Sequence[SyntheticPatient],
    workers: int,
    progress: Progress,
) -> None:
    total = sum(patient.images for patient in patients)
    done = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="render")
    try:
        waiting = [pool.submit(_render_patient, out, settings, patient) for patient in patients]
        for finished in as_completed(waiting):
            done += finished.result()
            progress(done, total)
    finally:  # an interrupted or failed run does not render the rest first
        pool.shutdown(cancel_futures=True)


def _render_patient(out: Path, settings: SyntheticSettings, patient: SyntheticPatient) -> int:
    slide = _slide(settings, patient)
    cells = _cell_classes(settings, patient)
    for index, name in enumerate(_names(patient.images)):
        path = out / patient.folder / name
        if not path.exists():  # otherwise it is complete, because it was renamed
            pixels = render_cell(
                _generator(settings, patient, index),
                cells[index] == _ATYPICAL,
                settings.difficulty,
                slide=slide,
                large=_is_large(cells[index]),
                size=settings.image_size,
            )
            _write(path, _encode(pixels))
    return patient.images


def _is_large(cell: str) -> bool | None:
    return cell == _LARGE if cell != _ATYPICAL else None


# --- where the cells are ----------------------------------------------------------------------


def is_synthetic_cohort(root: Path) -> bool:
    """Return whether a folder holds a synthetic cohort of this version."""
    return _Manifest.read(root / MANIFEST).settings.get("version") == _VERSION


def cell_extents(root: Path, images: Sequence[Path]) -> NDArray[np.float32]:
    """Return where the cells of images of a synthetic cohort lie: (n, side, side), 1 inside.

    Truth, for scoring maps. Raises CohortError for an image that is not the cohort's.
    """
    plain = dict(_Manifest.read(root / MANIFEST).settings)
    if plain.pop("version", None) != _VERSION:
        raise CohortError(f"{root} must be a synthetic cohort of this version; got none.")
    settings = SyntheticSettings(**with_tuples(plain))
    patients = {patient.folder: patient for patient in plan_patients(settings)}
    extents = [_cell_extent(settings, patients, path.relative_to(root)) for path in images]
    return np.stack(extents)


def _cell_extent(
    settings: SyntheticSettings, patients: dict[str, SyntheticPatient], image: Path
) -> NDArray[np.float32]:
    patient = patients.get(image.parent.as_posix())
    names = _names(patient.images) if patient else []
    if patient is None or image.name not in names:
        raise CohortError(f"{image} must be an image of the synthetic cohort.")
    index = names.index(image.name)
    cell = _cell_classes(settings, patient)[index]
    return cell_extent(
        _generator(settings, patient, index),
        cell == _ATYPICAL,
        settings.difficulty,
        slide=_slide(settings, patient),
        large=_is_large(cell),
        size=settings.image_size,
    )


def _encode(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _generator(
    settings: SyntheticSettings, patient: SyntheticPatient, *image: int
) -> np.random.Generator:
    key = (_PATIENT_KEY, patient.number, *image)
    return np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=key))


def _slide(settings: SyntheticSettings, patient: SyntheticPatient) -> Slide:
    slide = draw_slide(_generator(settings, patient))
    sequence = np.random.SeedSequence(settings.seed, spawn_key=(_LOOK_KEY, patient.number))
    rng = np.random.default_rng(sequence)
    look = draw_look(rng, settings.sign, patient.label, settings.difficulty, slide)
    return replace(slide, look=look)


def _cell_classes(settings: SyntheticSettings, patient: SyntheticPatient) -> list[str]:
    """Draw the class of each of a patient's cells; the slide, drawn first, shares the generator."""
    rng = _generator(settings, patient)
    slide = draw_slide(rng)
    large = rng.random(patient.images) < slide.large_share
    cells = [_LARGE if is_large else _SMALL for is_large in large]
    if patient.label == 1 and settings.sign == "witness":
        count = max(1, round(rng.uniform(*settings.witness_share) * patient.images))
        for index in rng.permutation(patient.images)[:count].tolist():
            cells[index] = _ATYPICAL
    return cells


def _truth_rows(
    settings: SyntheticSettings, patient: SyntheticPatient
) -> Iterator[tuple[object, ...]]:
    cells = _cell_classes(settings, patient)
    for name, cell in zip(_names(patient.images), cells, strict=True):
        yield patient.split, patient.id, name, patient.label, cell, int(cell == _ATYPICAL)


# --- a plate to look at -----------------------------------------------------------------------


def write_plate(
    settings: SyntheticSettings, path: Path, *, columns: int = 8, force: bool = False
) -> Path:
    """Draw a contact sheet: one row of cells per class, each cell on its own slide.

    Where no cell is atypical: one row per patient of the cohort, reactive and tumoral in turn.

    Raises SettingsError when `path` exists and `force` is not given, or another process is writing
    it; OutputError where the disk is full or closed.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with claimed((path,), force=force):
            return _save_plate(_draw_plate(settings, columns), path)


def _draw_plate(settings: SyntheticSettings, columns: int) -> Image.Image:
    rows = _class_rows(settings) if settings.sign == "witness" else _patient_rows(settings)
    side, band = settings.image_size, 24
    plate = Image.new("RGB", (columns * side, len(rows) * (side + band)), "white")
    draw = ImageDraw.Draw(plate)
    for row, (title, render) in enumerate(rows):
        top = row * (side + band)
        draw.text((6, top + 4), title, "black", ImageFont.load_default(14))
        for column in range(columns):
            plate.paste(Image.fromarray(render(column)), (column * side, top + band))
    return plate


def _class_rows(settings: SyntheticSettings) -> list[_PlateRow]:
    def row(number: int, cell: str) -> _PlateRow:
        title = cell.replace("_", " ")
        if cell == _ATYPICAL:
            title += f", difficulty {settings.difficulty:g}"
        return title, lambda column: _plate_cell(settings, cell, number, column)

    return [row(number, cell) for number, cell in enumerate(CELL_CLASSES)]


def _plate_cell(settings: SyntheticSettings, cell: str, row: int, column: int) -> NDArray[np.uint8]:
    key = (_PLATE_KEY, row, column)
    rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=key))
    return render_cell(
        rng,
        cell == _ATYPICAL,
        settings.difficulty,
        large=_is_large(cell),
        size=settings.image_size,
    )


def _patient_rows(settings: SyntheticSettings) -> list[_PlateRow]:
    def row(patient: SyntheticPatient) -> _PlateRow:
        label = "tumoral" if patient.label else "reactive"
        title = f"{patient.id}, {label}; {settings.sign}, difficulty {settings.difficulty:g}"
        slide = _slide(settings, patient)
        return title, lambda column: render_cell(
            _generator(settings, patient, column),
            False,
            settings.difficulty,
            slide=slide,
            size=settings.image_size,
        )

    patients = plan_patients(settings)
    classes = [[patient for patient in patients if patient.label == label] for label in (0, 1)]
    pairs = islice(zip(*classes, strict=False), _PLATE_PATIENTS)
    return [row(patient) for pair in pairs for patient in pair]


def _save_plate(plate: Image.Image, path: Path) -> Path:
    stream = io.BytesIO()
    plate.save(stream, "PNG")
    _write(path, stream.getvalue())
    return path
