"""Odd input, case by case: read, warned of, or refused.

Each case spoils a good tiny cohort, store, run or model, and says what a command makes of it. What
is refused ends with exit code 2 and one line, and leaves the folder as it was.
"""

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from lymphfeat_cli.main import cli
from tests.cohorts import damage_late, write_bags, write_image, write_own, write_text
from tests.folders import contents

ROOT = Path(__file__).parent.parent
SIDE, CROP = 36, 32
TABLE = Path("cells/cohort.csv")
CELL = Path("cells/P1/000000.png")
STORE = Path("s.h5")
GOOD = ("id,label,age,lymph_count", *(f"P{i},{i % 2},{50 + 3 * i},{4 + i}" for i in range(1, 7)))

MACHINE = "--device cpu --threads 1 --precision float32"
BACKBONE = f"--backbone test_resnet --crop {CROP} {MACHINE}"
AUDIT = f"audit --cohort cells --crop {CROP} --json"
EXTRACT = f"extract --cohort cells --out new.h5 {BACKBONE}"
FIT = f"fit-head --store s.h5 --agg mean --epochs 2 --out new {MACHINE}"
FIT_ONCE = f"{FIT} --seeds 1 --folds 3"
TRAIN = f"endtoend --cohort cells --epochs 1 --batch-size 4 --out new {BACKBONE}"
PREDICT = f"predict --model model --cohort cells --out new.csv {MACHINE}"
PREDICT_STORE = f"predict --model final --store s.h5 --out new.csv {MACHINE}"
FINALIZE = "finalize run --row 'mean exact' --out new"


@dataclass(frozen=True)
class Read:
    """The command succeeds and says this (a regular expression), and nothing else is amiss."""

    says: str
    kind = "read"


@dataclass(frozen=True)
class Warned:
    """The command succeeds, and says this of what is odd."""

    says: str
    kind = "warned"


@dataclass(frozen=True)
class Refused:
    """The command ends with exit code 2 and one line, of which this is a part."""

    says: str
    kind = "refused"


@dataclass(frozen=True)
class Case:
    odd: str
    spoil: Callable[[], object]  # in the folder of the good files
    line: str
    then: Read | Warned | Refused


def of_table(odd: str, spoil: Callable[[], object], then: Read | Warned | Refused) -> Case:
    return Case(odd, spoil, AUDIT, then)


def of_images(odd: str, spoil: Callable[[], object], then: Read | Warned | Refused) -> Case:
    return Case(odd, spoil, EXTRACT, then)


# --- how good files are spoilt -------------------------------------------------------------------


def nothing() -> None:
    """Leave the good files as they are: the options are odd."""


def all_of(*spoilers: Callable[[], object]) -> Callable[[], object]:
    return lambda: [spoil() for spoil in spoilers]


def table(*lines: str, **how: str) -> Callable[[], object]:
    return lambda: write_text(TABLE, *lines, **how)


def row(text: str) -> Callable[[], object]:
    """Put this in the place of P1's row, the second."""
    return table(GOOD[0], text, *GOOD[2:])


def column(name: str, *cells: str) -> Callable[[], object]:
    """Add a column; the last cell stands for the rest."""
    given = [*cells, *[cells[-1]] * (6 - len(cells))]
    rows = (f"{line},{cell}" for line, cell in zip(GOOD[1:], given, strict=True))
    return table(f"{GOOD[0]},{name}", *rows)


def move(source: str, target: str) -> Callable[[], object]:
    return lambda: shutil.move(source, target)


def store_file(change: Callable[[h5py.File], object], path: Path = STORE) -> Callable[[], object]:
    def spoil() -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return spoil


def value(place: str, index: Any, new: Any) -> Callable[[h5py.File], object]:
    return lambda file: file[place].__setitem__(index, new)


def flip_bit(path: Path, place: Callable[[], int]) -> Callable[[], object]:
    def spoil() -> None:
        content = bytearray(path.read_bytes())
        content[place()] ^= 0x40
        path.write_bytes(bytes(content))

    return spoil


def in_map() -> int:
    """Return where the map of P3's second image has its fourth value."""
    with h5py.File(STORE, "r") as file:
        features = file["features/frozen"]
        start: int = features.id.get_offset()
        return start + (5 * int(features[0].size) + 3) * 2 + 1


def cut(path: Path | str, keep: int) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:keep])


def facts(path: str, **changes: Any) -> Callable[[], object]:
    def spoil() -> None:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        Path(path).write_text(json.dumps(content | changes), encoding="utf-8")

    return spoil


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def picture(mode: str, format: str = "PNG", size: int = SIDE, **how: Any) -> Callable[[], object]:
    """Put a picture of another kind in the place of P1's first."""
    return lambda: Image.fromarray(noise(size, size, 3)).convert(mode).save(CELL, format, **how)


def declared(side: int) -> Callable[[], object]:
    """Let the header of P1's first image declare another size."""

    def spoil() -> None:
        content = CELL.read_bytes()
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        sealed = header + struct.pack(">I", zlib.crc32(header))
        CELL.write_bytes(content[:12] + sealed + content[33:])

    return spoil


def turned() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(noise(SIDE, SIDE, 3)).save("cells/P1/turned.jpg", exif=exif)


def late_damage() -> None:
    damage_late(write_image(Path("cells/P6/z.jpg"), 5, SIDE))


def newer_weights() -> None:
    tensors = load_file("model/model.safetensors")
    save_file(tensors, "w.safetensors", metadata={"lymphfeat": '{"format_version": 9}'})


def newer_members() -> None:
    shutil.copytree(ROOT / "tests/data/v0.1.0/members", "members")
    facts("members/members.json", format_version=9)()


def folds(*lines: str) -> Callable[[], object]:
    return lambda: write_text(Path("folds.csv"), *lines)


def truth(*lines: str) -> Callable[[], object]:
    return lambda: write_text(Path("truth.csv"), *lines)


# --- the table -----------------------------------------------------------------------------------

FOLDS = tuple(f"P{i},{(i - 1) // 2}" for i in range(1, 7))
WITNESSES = tuple(f"P{i};00000{j}.png;{j}" for i in range(1, 7) for j in (0, 1))
NEWER = r"format_version \(=9\) must be at most 1; .*pip install -U lymphfeat"
UNREADABLE = r"Error: cells/P1/000000.png: cannot be read as an image"

READ = Read('"patients": 6')

CELLS_OF_TABLES = (
    of_table(
        "labels of other kinds",
        table("id,label", "P1,1", "P2,yes", "P3,2"),
        Refused(r"row 3 \(P2\), column label: must be 1 .*'yes'.*row 4 .*'2'"),
    ),
    of_table("label 0.5", row("P1,0.5,53,5"), Refused(r"row 2 \(P1\), column label: .*'0.5'")),
    of_table("label 1.0", row("P1,1.0,53,5"), Read(r'"label": 1,\s+"patients": 3')),
    of_table("label NaN", row("P1,nan,53,5"), Read(r'"label": -1,\s+"patients": 1')),
    of_table("label ?", table("id,label", "P1,?"), Refused(r"row 2 \(P1\), column label")),
    of_table(
        "no column of labels",
        table("id,diagnosis", *(f"P{i},1" for i in range(1, 7))),
        Warned("no column `label`, so every patient is unlabelled"),
    ),
    of_table("age 250", row("P1,1,250,5"), Refused(r"\(P1\), column age: .*0 to 120.*'250'")),
    of_table("age below 0", row("P1,1,-3,5"), Refused(r"\(P1\), column age: .*0 to 120.*'-3'")),
    of_table("age in words", row("P1,1,53 y,5"), Refused("column age: must be a number.*'53 y'")),
    of_table(
        "dates of birth named age",
        row("P1,1,1950-01-01,5"),
        Refused("column age: must be in years; .*name a column of dates of birth `dob`"),
    ),
    of_table("count 0", row("P1,1,53,0"), Refused("column lymph_count: must be above 0")),
    of_table("count below 0", row("P1,1,53,-5"), Refused("column lymph_count: must be above 0")),
    of_table("count <5", row("P1,1,53,<5"), Refused("column lymph_count: must be a number.*'<5'")),
    of_table("count inf", row("P1,1,53,inf"), Refused("column lymph_count: must be a number")),
    of_table("count 1e400", row("P1,1,53,1e400"), Refused("column lymph_count: must be a number")),
    of_table("count NaN", row("P1,1,53,NaN"), Read(r'"name": "lymph_count",\s+"missing": 1')),
    of_table(
        "count per litre",
        row("P1,1,53,12500000000"),
        Refused(r"lymph_count: must be in 10⁹/L, at most 2000, .*another unit another name"),
    ),
    of_table(
        "one decimal comma",
        row('P1,1,53,"12,5"'),
        Refused(r"row 2 \(P1\), column lymph_count: .*decimal point.*'12,5'"),
    ),
    of_table(
        "decimal commas in all of a column",
        column("wbc", '"12,5"'),
        Refused(r"row 2 \(P1\), column wbc: must be a number with a decimal point.*'12,5'"),
    ),
    of_table(
        "commas between thousands",
        column("wbc", '"1,200"'),
        Refused("column wbc: must be a number with a decimal point.*'1,200'"),
    ),
    of_table(
        "a text among numbers",
        column("x", "1", "2", "<5", "4"),
        Refused(r"row 4 \(P3\), column x: must be a number.*'<5'"),
    ),
    of_table(
        "a number in hexadecimal",
        column("x", "0x10", "1"),
        Refused("column x: must be a number.*'0x10'"),
    ),
    of_table(
        "digits of another script", row("P1,1,５３,5"), Refused("column age: must be a number")
    ),
    of_table("gender x", column("gender", "x", "f"), Refused("must be F, M or empty; got 'x'")),
    of_table("gender f", column("gender", "f", "F"), Warned("gender: 1 cell.*'f' read as F")),
    of_table(
        "split val", column("split", "val"), Refused("must be train, test or empty; got 'val'")
    ),
)

DATES = (
    of_table(
        "no such day in M/D/YYYY",
        table("id,label,DOB", "P1,1,25/12/1950"),
        Refused(r"row 2 \(P1\), column dob: '25/12/1950' is not a date when read as M/D/YYYY"),
    ),
    of_table(
        "31 February",
        table("id,label,dob", "P1,1,31-02-1950"),
        Refused("column dob: '31-02-1950' is not a date when read as DD-MM-YYYY; write YYYY-MM-DD"),
    ),
    of_table(
        "a date with dots",
        table("id,label,dob", "P1,1,01.02.1950"),
        Refused("column dob: must be M/D/YYYY, DD-MM-YYYY, YYYY-MM-DD or empty"),
    ),
    of_table(
        "a year of two digits",
        table("id,label,dob", "P1,1,1/2/50"),
        Refused("column dob: must be M/D/YYYY"),
    ),
    of_table(
        "a spreadsheet's number of days",
        table("id,label,dob", "P1,1,18294"),
        Refused("column dob: must be M/D/YYYY"),
    ),
    of_table(
        "born after the reference date",
        table("id,label,dob", "P1,1,2022-01-01"),
        Refused("120 years before the reference date 2021-01-01; got .*--reference-date"),
    ),
    of_table(
        "born 121 years ago",
        table("id,label,dob", "P1,1,1900-01-01"),
        Refused("must be within the 120 years"),
    ),
    of_table(
        "ambiguous dates",
        table("id,label,dob", *(f"P{i},1,05-03-1950" for i in range(1, 7))),
        Warned("6 as DD-MM-YYYY .6 would be misread by guessing"),
    ),
    of_table(
        "another column of dates",
        column("sampled", "1940-01-01"),
        Warned("column sampled: holds dates, left out"),
    ),
    of_table(
        "age and date of birth",
        column("dob", "1950-01-01"),
        Refused("has columns `dob` and `age`; keep one"),
    ),
)

IDS = (
    of_table(
        "an id twice", table(*GOOD, GOOD[1]), Refused("ids occur twice: P1 in .* row 8 and row 2")
    ),
    of_table(
        "an id twice, with spaces", table(*GOOD, " P1 ,1,5,5"), Refused("twice: P1 .* row 8 and")
    ),
    of_table(
        "no id",
        table("id,label", "P1,1", ",0", " ,1"),
        Refused("patients without an id: .* row 3; .* row 4"),
    ),
    of_table("id NA", all_of(row("NA,1,53,5"), move("cells/P1", "cells/NA")), READ),
    of_table(
        "id 007, folder 7",
        all_of(row("007,1,53,5"), move("cells/P1", "cells/7")),
        Refused(r"without images: 007 \(the folder 7\?\); 1 image folder.* 7 \(2 images\)"),
    ),
    of_table(
        "ids 007 and 7",
        all_of(
            table(GOOD[0], "007,1,53,5", "7,0,56,6", *GOOD[3:]),
            move("cells/P1", "cells/007"),
            move("cells/P2", "cells/7"),
        ),
        Warned("ids 007, 7: read as different patients, although they differ only in"),
    ),
    of_table("id p1, folder P1", row("p1,1,53,5"), Refused(r"images: p1 \(the folder P1\?\)")),
    of_table(
        "an id with a space",
        all_of(row("P 1,1,53,5"), move("cells/P1", "cells/P 1")),
        READ,
    ),
    of_table(
        "an accent in one character and in two",
        all_of(row("Jos\u00e9,1,53,5"), move("cells/P1", "cells/Jose\u0301")),
        READ,
    ),
    of_table(
        "a path as id",
        row("../secret,1,5,5"),
        Refused(r"row 2: '../secret' cannot be a folder's name. Rename"),
    ),
    of_table("id ..", row("..,1,5,5"), Refused("row 2: '..' cannot be a folder's name")),
    of_table(
        "an escape sequence as id",
        row("\x1b[31mP1,1,5,5"),
        Refused(r"row 2: '\\x1b\[31mP1' has characters that are not printed"),
    ),
    of_table(
        "a NUL in an id",
        row("P1\0,1,5,5"),
        Refused(r"'P1\\x00' has characters that are not printed"),
    ),
    of_table("an id of 300 letters", row("P" * 300 + ",1,5,5"), Refused("longer than 255 bytes")),
)

FILES_OF_TABLES = (
    of_table("a byte-order mark", table(*GOOD, encoding="utf-8-sig"), READ),
    of_table("UTF-16", table(*GOOD, encoding="utf-16"), READ),
    of_table("lines that end in CR LF", table(*GOOD, end="\r\n"), READ),
    of_table("lines that end in CR", table(*GOOD, end="\r"), READ),
    of_table(
        "semicolons and decimal commas",
        table(*(line.replace(",", ";").replace(";5", ";5,5", 1) for line in GOOD)),
        Warned("separated by semicolons, so a comma in a number is a decimal comma"),
    ),
    of_table("quoted newlines", column("x", '"two\nlines"', "b"), READ),
    of_table(
        "Latin-1",
        table("id,label,site", "P1,1,Köln", encoding="latin-1"),
        Refused("cohort.csv line 2 is not UTF-8 text; save it as `CSV UTF-8`"),
    ),
    of_table("an empty table", table(), Refused(r"found only cohort.csv \(not a CSV table\)")),
    of_table("a header alone", table(GOOD[0]), Refused("has a header but no patients")),
    of_table("no header", table(*GOOD[1:]), Refused(r"found only cohort.csv \(1, 5, 53, P1\)")),
    of_table(
        "a column patient for id",
        table("patient,label", "P1,1"),
        Refused(r"found only cohort.csv \(label, patient\); rename its columns"),
    ),
    of_table(
        "a spreadsheet named CSV",
        lambda: TABLE.write_bytes(b"PK\x03\x04" + bytes(range(256))),
        Refused("has no table: it must hold a CSV with the columns `id` and `label`"),
    ),
    of_table("short rows", row("P1,1"), Refused("header has 4 cells, .* row 2 has 2. Quote")),
    of_table("long rows", row("P1,1,5,5,9"), Refused("header has 4 cells, .* row 2 has 5. Quote")),
    of_table("an open quote", row('P1,"1,5,5'), Refused("line 7 is not CSV .* a quote left open")),
    of_table(
        "a column twice", table("id,label,Label", "P1,1,1"), Refused("columns twice: label. Keep")
    ),
    of_table(
        "a nameless column of values",
        table("id,label,", "P1,1,important"),
        Refused("column with values but no name: row 2 'important'. Name it"),
    ),
    of_table(
        "two tables",
        lambda: shutil.copy(TABLE, "cells/b.csv"),
        Refused("several tables: b.csv; cohort.csv. Choose .*--table"),
    ),
    of_table(
        "the challenge's table without ids",
        all_of(
            lambda: TABLE.unlink(),
            lambda: write_text(Path("cells/clinical_annotation.csv"), "PATIENT,LABEL", "P1,1"),
        ),
        Refused("must name a column `id`; got PATIENT"),
    ),
    of_table(
        "tables that disagree",
        all_of(
            lambda: TABLE.rename("cells/clinical_annotation.csv"),
            lambda: write_text(Path("cells/train/train_data.csv"), "id,label", "P1,0"),
        ),
        Refused("tables disagree: P1, column label: '1' in .* row 2, '0' in .* row 2"),
    ),
)

FOLDERS = (
    of_table(
        "a patient without images",
        lambda: shutil.rmtree("cells/P1"),
        Refused(r"cells: 1 patient\(s\) without images: P1. Add or rename .*--allow-missing"),
    ),
    of_table(
        "a patient whose folder is empty",
        all_of(lambda: shutil.rmtree("cells/P1"), lambda: Path("cells/P1").mkdir()),
        Refused("without images: P1"),
    ),
    Case(
        "a patient without images, allowed",
        lambda: shutil.rmtree("cells/P1"),
        f"{AUDIT} --allow-missing",
        Warned(r"left out 1 patient\(s\) without images: P1"),
    ),
    of_table(
        "a folder without a row",
        table(*GOOD[:-1]),
        Refused(r"1 image folder\(s\) without table row: P6 \(2 images\)"),
    ),
    of_table(
        "two folders of a patient",
        lambda: shutil.copytree("cells/P1", "cells/more/P1"),
        Refused("several image folders under cells: P1: P1 and more/P1"),
    ),
    of_table(
        "a patient inside another",
        move("cells/P2", "cells/P1/P2"),
        Refused("image folder P1/P2 is inside the folders of several patients: P1; P2"),
    ),
    of_table(
        "images beside the folders",
        lambda: shutil.copy(CELL, "cells/stray.png"),
        Warned(r"1 image\(s\) outside any patient's folder not read: stray.png"),
    ),
    of_table(
        "a link in a circle",
        lambda: Path("cells/P1/loop").symlink_to("../", target_is_directory=True),
        Refused("cells/P1/loop is a link to a folder above itself; remove the link"),
    ),
    of_images(
        "a link to nothing",
        lambda: Path("cells/P1/z.png").symlink_to("gone.png"),
        Refused(r"cells/P1/z.png: cannot be read \(No such file or directory\)"),
    ),
    Case("no folder", nothing, AUDIT.replace("cells", "gone"), Refused("gone does not exist")),
    Case(
        "a file for the folder",
        nothing,
        AUDIT.replace("cells", "s.h5"),
        Refused("is a file; unpack it first"),
    ),
)

IMAGES = (
    of_images("a truncated PNG", cut(CELL, 500), Refused(f"{UNREADABLE} .*--on-error skip")),
    of_images(
        "a truncated JPEG",
        all_of(lambda: write_image(Path("cells/P1/z.jpg"), 1, SIDE), cut("cells/P1/z.jpg", 600)),
        Refused("cells/P1/z.jpg: cannot be read as an image .*Truncated"),
    ),
    of_images("a flipped bit in a PNG", flip_bit(CELL, lambda: 1000), Refused(UNREADABLE)),
    of_images("an empty image", cut(CELL, 0), Refused(rf"{UNREADABLE} \(the file is empty\)")),
    of_images(
        "a web page as image",
        lambda: CELL.write_text("<html>404</html>"),
        Refused(rf"{UNREADABLE} \(not an image of any known format\)"),
    ),
    of_images(
        "16 bits per channel",
        lambda: Image.fromarray(np.full((SIDE, SIDE), 40_000, np.uint16)).save(CELL),
        Refused(r"pixel mode \(=I;16\) must be 8 bits per channel; convert"),
    ),
    of_images(
        "smaller than the crop",
        picture("RGB", size=CROP - 1),
        Refused(r"size \(=31x31\) must be at least the crop \(=32\); choose a smaller --crop"),
    ),
    of_images(
        "a whole slide as a cell",
        declared(12_000),
        Refused(r"size \(=12000x12000\) must be at most \d+ pixels; an image must show one cell"),
    ),
    of_images(
        "a decompression bomb",
        declared(20_000),
        Refused(f"{UNREADABLE} .*decompression bomb"),
    ),
    of_images("grey", picture("L"), Read("12 images of 6 patients")),
    of_images("RGBA", picture("RGBA"), Read("12 images of 6 patients")),
    of_images("CMYK", picture("CMYK", "JPEG"), Read("12 images of 6 patients")),
    of_images(
        "a palette with transparency",
        picture("P", transparency=bytes(range(256))),
        Read("12 images of 6 patients"),
    ),
    of_images("a PNG that is a GIF", picture("P", "GIF"), Read("12 images of 6 patients")),
    of_images("an orientation in EXIF", turned, Read("13 images of 6 patients")),
    of_table(
        "an animation",
        picture("RGB", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
        Warned("2 frames, only the first is used"),
    ),
    of_table(
        "images shared by patients",
        lambda: shutil.copy(CELL, "cells/P2/z.png"),
        Warned(r"leak: 1 image\(s\) shared by different patients"),
    ),
    Case(
        "damaged images, left out",
        all_of(cut(CELL, 500), cut("cells/P2/000001.png", 0)),
        f"{EXTRACT} --on-error skip",
        Warned(r"P1/000000.png: cannot .*P2/000001.png: .*left out 2 image.*10 images of 6 patie"),
    ),
    Case(
        "a patient of damaged images",
        all_of(cut(CELL, 500), cut("cells/P1/000001.png", 0)),
        f"{EXTRACT} --on-error skip",
        Refused(r"patients without a usable image: P1 \(2 images\). .*--allow-missing"),
    ),
    Case(
        "a patient of damaged images, allowed",
        all_of(cut(CELL, 500), cut("cells/P1/000001.png", 0)),
        f"{EXTRACT} --on-error skip --allow-missing",
        Warned(r"left out 1 patient\(s\) without a usable image: P1\n.*10 images of 5 patients"),
    ),
    Case("a damaged image in predict", cut(CELL, 500), PREDICT, Refused(UNREADABLE)),
    Case(
        "a damaged image in predict, left out",
        cut(CELL, 500),
        f"{PREDICT} --on-error skip",
        Warned(r"left out 1 image\(s\) .*6 patients, 11 images"),
    ),
    Case("a damaged image in endtoend", cut(CELL, 500), TRAIN, Refused(UNREADABLE)),
    Case(
        "a JPEG damaged in its middle, left out",
        late_damage,
        f"{EXTRACT} --on-error skip",
        Warned("P6/z.jpg: cannot be read .*12 images of 6 patients"),
    ),
)

STORES = (
    Case(
        "a newer store",
        store_file(lambda file: file.attrs.modify("format_version", 9)),
        "info s.h5",
        Refused(r"s.h5: format_version \(=9\) must be at most 2; .*pip install -U lymphfeat"),
    ),
    Case(
        "a store of version 0",
        store_file(lambda file: file.attrs.modify("format_version", 0)),
        FIT_ONCE,
        Refused(r"format_version \(=0\)"),
    ),
    Case(
        "a truncated store",
        cut(STORE, 9000),
        FIT_ONCE,
        Refused("s.h5: is not a readable HDF5 file"),
    ),
    Case("an empty store", cut(STORE, 0), "info s.h5", Refused("copy it again, or make it again")),
    Case(
        "a table for the store",
        lambda: shutil.copy(TABLE, STORE),
        FIT_ONCE,
        Refused("s.h5: is not a readable HDF5 file"),
    ),
    Case(
        "a flipped bit in a map",
        flip_bit(STORE, in_map),
        "info s.h5 --verify",
        Refused("/features/frozen, image 000001.png of P3: map and pooled feature must agree"),
    ),
    Case(
        "NaN in a pooled feature",
        store_file(value("pooled/frozen", (5, 0, 3), np.nan)),
        FIT_ONCE,
        Refused("image 000001.png of P3: features must be finite numbers"),
    ),
    Case(
        "NaN in a map",
        store_file(value("features/frozen", (5, 0, 3), np.nan)),
        FIT_ONCE.replace("mean", "bnsigmoid"),
        Refused("features of P3 .row 5 of the store. must be finite numbers"),
    ),
    Case(
        "NaN in a map that is read at every step",
        store_file(value("features/frozen", (5, 0, 3), np.nan)),
        f"{FIT_ONCE.replace('mean', 'bnsigmoid')} --memory 1e-9",
        Refused("features of P3 .row 5 of the store. must be finite numbers"),
    ),
    Case(
        "infinity in a map and its mean",
        all_of(
            store_file(value("features/frozen", (5, 0, 3), np.inf)),
            store_file(value("pooled/frozen", (5, 0, 3), np.inf)),
        ),
        "info s.h5 --verify",
        Refused("image 000001.png of P3"),
    ),
    Case(
        "NaN in a store to predict",
        store_file(value("features/frozen", (5, 0, 3), np.nan)),
        PREDICT_STORE,
        Refused("image 000001.png of P3: features must be finite numbers"),
    ),
    Case(
        "a store of another recipe",
        store_file(
            lambda file: file.attrs.modify(
                "recipe", file.attrs["recipe"].replace(f'"crop": {CROP}', '"crop": 30')
            )
        ),
        PREDICT_STORE,
        Refused(r"must hold the maps that this model reads: crop is 30 there, 32 now"),
    ),
    Case(
        "a store of one class",
        store_file(value("patients/label", slice(None), 1)),
        FIT_ONCE,
        Refused(r"labelled reactive patients \(=0\) must be at least 3"),
    ),
    Case(
        "a store without labels",
        store_file(value("patients/label", slice(None), -1)),
        FIT_ONCE,
        Refused(r"labelled reactive patients \(=0\) must be at least 3"),
    ),
)

MODELS = (
    Case("a newer model", facts("model/model.json", format_version=9), PREDICT, Refused(NEWER)),
    Case(
        "a version in quotes",
        facts("model/model.json", format_version="1"),
        PREDICT,
        Refused(r"format_version \(='1'\) must be at most 1"),
    ),
    Case(
        "a newer final model",
        facts("final/final.json", format_version=9),
        PREDICT_STORE,
        Refused(NEWER),
    ),
    Case(
        "newer members",
        newer_members,
        PREDICT.replace("model model", "model members"),
        Refused(f"members/members.json: {NEWER}"),
    ),
    Case(
        "newer weights",
        newer_weights,
        f"{EXTRACT} --weights w.safetensors",
        Refused(f"w.safetensors: {NEWER}"),
    ),
    Case("a newer run", facts("run/config.json", format_version=9), FINALIZE, Refused(NEWER)),
    Case(
        "a newer run to compare",
        facts("run/config.json", format_version=9),
        "compare run",
        Refused(f"run/config.json: {NEWER}"),
    ),
    Case(
        "a truncated model",
        cut("model/model.safetensors", -50),
        PREDICT,
        Refused("model.safetensors: cannot be read as this model's tensors"),
    ),
    Case(
        "a flipped bit in a model",
        flip_bit(Path("model/model.safetensors"), lambda: -9),
        PREDICT,
        Refused("tensors must be those that model.json was written with; got others. Copy both"),
    ),
    Case(
        "a model's facts cut short",
        cut("model/model.json", 99),
        PREDICT,
        Refused("model.json: is not valid JSON .*copy the model folder again"),
    ),
    Case(
        "a model without tensors",
        lambda: Path("model/model.safetensors").unlink(),
        PREDICT,
        Refused("model.safetensors: cannot be read .*there is no such file"),
    ),
)

OPTIONS = (
    Case("zero seeds", nothing, f"{FIT} --seeds 0", Refused("--seeds.*0 is not in the range")),
    Case(
        "epochs below 0", nothing, f"{FIT} --epochs -1", Refused("--epochs.*-1 is not in the range")
    ),
    Case("lr NaN", nothing, f"{TRAIN} --lr nan", Refused(r"lr \(=nan\) must be above 0")),
    Case("a percentage of NaN", nothing, f"{FIT} --k-percent nan", Refused(r"lie in \(0, 100\]")),
    Case("more folds than patients", nothing, f"{FIT} --folds 99", Refused("be at least 99")),
    Case("k above the bag", nothing, f"{FIT_ONCE} --agg topk --k-agg 99", Read(r"top99")),
    Case(
        "one class to train on",
        table("id,label", *(f"P{i},1" for i in range(1, 7))),
        TRAIN,
        Refused(r"labelled patients of both classes; got 6 tumoral .* 0 reactive"),
    ),
    Case(
        "a date in another form",
        nothing,
        f"{AUDIT} --reference-date 31.12.2020",
        Refused("'31.12.2020' does not match the format '%Y-%m-%d'"),
    ),
    Case(
        "an age in words for one patient",
        nothing,
        f"predict --model final --images cells/P1 --age old --out new.csv {MACHINE}",
        Refused(r"attributes \(P1\), column age: must be a number.*'old'"),
    ),
    Case(
        "no images of the one patient",
        lambda: Path("none").mkdir(),
        f"predict --model model --images none --out new.csv {MACHINE}",
        Refused(r"folder \(=none\) must hold the images of a patient; got none"),
    ),
    Case(
        "an option that does not exist in lymphfeat.toml",
        lambda: Path("lymphfeat.toml").write_text("[extract]\ncropp = 3\n"),
        EXTRACT,
        Refused(r"lymphfeat.toml: \[extract\] has no option cropp"),
    ),
)

FOLD_FILES = (
    Case("no fold file", folds(), f"{FIT} --splits folds.csv", Refused("must have the columns id")),
    Case(
        "a fold file of a header",
        folds("id,fold"),
        f"{FIT} --splits folds.csv",
        Refused("folds.csv has a header but no patients"),
    ),
    Case(
        "unknown patients in folds",
        folds("id,fold", *FOLDS, "P99,1"),
        f"{FIT} --splits folds.csv",
        Refused("must name patients of this cohort; got P99. Was it made for another cohort"),
    ),
    Case(
        "a patient in two folds",
        folds("id,fold", *FOLDS, "P1,1"),
        f"{FIT} --splits folds.csv",
        Refused("folds.csv rows 2 and 8: each patient must have one row; got P1 twice"),
    ),
    Case(
        "a misspelt side",
        folds("id,split", "P1,train", "P2,tets"),
        f"{FIT} --splits folds.csv",
        Refused(r"folds.csv row 3 \(P2\), column split: must be train, val, test.*'tets'"),
    ),
    Case(
        "folds without both classes",
        folds("id,fold", *(f"P{i},{i % 2}" for i in range(1, 7))),
        f"{FIT} --splits folds.csv",
        Refused("patients of split fold-0 must include both classes"),
    ),
    Case(
        "splits cut short",
        lambda: Path("folds.json").write_text("{"),
        f"{FIT} --splits folds.json",
        Refused("folds.json: must be a JSON file of splits, id -> seed, repeat, train, validation"),
    ),
)

TRUTH_FILES = (
    Case(
        "semicolons in a truth file",
        truth("ID;FILE;IS_WITNESS", *WITNESSES),
        f"{FIT_ONCE} --truth truth.csv --json",
        Read('"witness_auc'),
    ),
    Case(
        "a truth that is not 0 or 1",
        truth("ID,FILE,IS_WITNESS", "P1,000000.png,2"),
        f"{FIT_ONCE} --truth truth.csv",
        Refused("truth.csv row 2, column IS_WITNESS: must be 0 or 1; got '2'"),
    ),
    Case(
        "short rows in a truth file",
        truth("ID,FILE,IS_WITNESS", "P1,000000.png"),
        f"{FIT_ONCE} --truth truth.csv",
        Refused("truth.csv row 2 has 2 cells, the header 3"),
    ),
    Case(
        "the truth of another cohort",
        truth("ID,FILE,IS_WITNESS", "Q1,000000.png,1"),
        f"{FIT_ONCE} --truth truth.csv",
        Refused("must name every image of s.h5; 12 are missing, the first is 000000.png of P1"),
    ),
)

GROUPS = {
    "cells of tables": CELLS_OF_TABLES,
    "dates": DATES,
    "ids": IDS,
    "files of tables": FILES_OF_TABLES,
    "folders": FOLDERS,
    "images": IMAGES,
    "stores": STORES,
    "models, runs, weights": MODELS,
    "options": OPTIONS,
    "fold files": FOLD_FILES,
    "truth files": TRUTH_FILES,
}
CASES = tuple(case for cases in GROUPS.values() for case in cases)


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cohort of six patients, and its store, run, final model and model."""
    place = tmp_path_factory.mktemp("good")
    write_own(place / "cells", *GOOD, bags={})
    write_bags(place / "cells", {f"P{i}": 2 for i in range(1, 7)}, side=SIDE)
    with chdir(place):
        for line in (
            EXTRACT.replace("new.h5", "s.h5"),
            FIT_ONCE.replace("new", "run"),
            FINALIZE.replace("new", "final"),
            TRAIN.replace("new", "model"),
        ):
            result = CliRunner().invoke(cli, shlex.split(line), catch_exceptions=False)
            assert result.exit_code == 0, result.output
    return place


@pytest.fixture
def here(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(good, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.odd)
def test_odd_input(case: Case, here: Path) -> None:
    case.spoil()
    before = contents(here)
    result = CliRunner().invoke(cli, shlex.split(case.line), catch_exceptions=False)
    said = result.output
    assert re.search(case.then.says, said, re.DOTALL), said
    if case.then.kind == "refused":
        assert result.exit_code == 2, said
        assert len(error_lines(result.stderr)) == 1, result.stderr
        assert result.stdout == ""
        assert contents(here) == before
    else:
        assert result.exit_code == 0, said
    if case.then.kind == "read":
        assert "Warning" not in result.stderr


def error_lines(stderr: str) -> list[str]:
    """Return the lines, without those that click puts before a mistake in the options."""
    usage = ("Usage: ", "Try ", "")
    return [line for line in stderr.splitlines() if not line.startswith(usage[:2]) and line]


@pytest.mark.seconds
@pytest.mark.parametrize("odd", ["Latin-1", "a truncated PNG", "an empty store"])
def test_in_a_process_of_its_own(odd: str, here: Path) -> None:
    (case,) = (case for case in CASES if case.odd == odd)
    case.spoil()
    done = subprocess.run(
        [sys.executable, "-m", "lymphfeat_cli", *shlex.split(case.line)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"Error: .*{case.then.says}.*\n|{case.then.says}.*\n", done.stderr)
    assert done.stdout == ""


def test_cases_have_names_of_their_own() -> None:
    assert [name for name, count in Counter(case.odd for case in CASES).items() if count > 1] == []


@pytest.mark.parametrize("group", GROUPS)
def test_the_page_counts_them(group: str) -> None:
    counts = Counter(case.then.kind for case in GROUPS[group])
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(group)} \| (\d+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    assert found, f"a row {group!r} in docs/reliability.md"
    assert tuple(map(int, found.groups())) == tuple(
        counts[k] for k in ("read", "warned", "refused")
    )
