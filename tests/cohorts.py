"""Tiny cohorts on disk, with every quirk of METHOD §6, for tests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

HEADER = ",ID,LABEL,GENDER,DOB,LYMPH_COUNT"


def write_image(path: Path, seed: int, side: int = 16) -> Path:
    """Write noise that no other seed gives, in the format of the suffix."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_bags(
    root: Path, bags: Mapping[str, int], suffix: str = ".png", side: int = 16, *, first: int = 0
) -> None:
    """Write `bags` (folder -> number of images) of distinct images under `root`.

    Those of other numbers `first`, at least as far away as there are bags, are distinct, too.
    """
    for patient, (folder, count) in enumerate(bags.items(), first):
        for index in range(count):
            name = f"{index:06d}{suffix}"
            write_image(root / folder / name, 1000 * patient + index, side)


def write_text(path: Path, *lines: str, end: str = "\n", encoding: str = "utf-8") -> Path:
    """Write lines to a file, byte for byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def damage_late(path: Path) -> None:
    """Damage a JPEG where only decoding it notices: another image begins in its middle."""
    content = path.read_bytes()
    path.write_bytes(content[:-200] + b"\xff\xc0" + content[-198:])


def write_challenge(root: Path, suffix: str = ".jpg", side: int = 16) -> Path:
    """Write seven patients in the challenge's layout with all its quirks.

    Row order is not id order; both date conventions, of which 05-03-1950 would be swapped by a
    guess; one lower-case f; a missing attribute of each kind; stray tables inside the image
    folders, the test one in another order; __MACOSX, .DS_Store; trainset doubled.
    """
    write_text(
        root / "clinical_annotation.csv",
        HEADER,
        "0,P10,1,M,8/16/1969,35.5",
        "1,P2,0,f,05-03-1950,2.28",
        "2,P9,1,F,12/5/1985,295",
        "3,P1,0,,,",
        "4,P11,-1,M,25-12-1940,7.5",
        "5,P3,-1,F,1/2/1990,8",
        "6,P100,-1,F,3/4/1931,9",
    )
    write_text(
        root / "trainset" / "trainset_true.csv",
        HEADER[1:],
        "P10,1,M,16-08-1969,35.50",
        "P2,0,F,3/5/1950,2.28",
        "P9,1,F,12/5/1985,295",
        "P1,0,,,",
    )
    write_text(
        root / "testset" / "testset_data.csv",
        HEADER[1:],
        "P100,-1,F,3/4/1931,9",
        "P3,-1,F,1/2/1990,8",
        "P11,-1,M,25-12-1940,7.5",
    )
    write_text(root / "sample_submission.csv", "Id,Predicted", "P3,0")
    train = {
        f"trainset/trainset/{id}": n for id, n in (("P1", 1), ("P2", 3), ("P9", 2), ("P10", 2))
    }
    test = {"testset/P3": 2, "testset/P11": 1, "testset/P100": 4}
    write_bags(root, {**train, **test}, suffix, side)
    write_text(root / "__MACOSX" / "trainset" / "P1" / "._000000.jpg", "resource fork")
    write_text(root / "trainset" / "trainset" / "P1" / ".DS_Store", "finder")
    write_text(root / "testset" / "P3" / "._000000.jpg", "resource fork")
    return root


def write_own(
    root: Path, *lines: str, bags: Mapping[str, int] | None = None, suffix: str = ".png"
) -> Path:
    """Write a cohort of one's own: the table's lines and, by default, two images for each id."""
    write_text(root / "cohort.csv", *lines)
    ids = [line.split(",")[0] for line in lines[1:]]
    write_bags(root, dict.fromkeys(ids, 2) if bags is None else bags, suffix)
    return root
