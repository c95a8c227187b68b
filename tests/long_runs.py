"""What a process holds while it works on, and stores too large to be written."""

import gc
import mmap
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

import lymphfeat as lf
from lymphfeat.features.store import MapShape, map_rows
from lymphfeat.features.store_writer import _create
from tests.stores import FROZEN, RECIPE, made_up_cohort
from tests.tiny import BACKBONE

REPORTED = MapShape(views=1, channels=512, height=4, width=4)  # ResNet-18 at 112 px
HEADS = ("mean+std", "topk", "bnsigmoid")
_CELLS = 512
ON_CPU: dict[str, Any] = {"device": "cpu", "precision": "float32", "threads": 1}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process holds at one moment."""

    rss: int  # bytes in memory
    anonymous: int  # of which no file holds a copy
    descriptors: int
    threads: int
    temporary: int  # entries of the temporary folder

    @classmethod
    def now(cls, of: int | str = "self") -> "Held":
        """Look at a process, by its id (Linux)."""
        status = status_of(of)
        return cls(
            rss=status["VmRSS"],
            anonymous=status["RssAnon"],
            descriptors=sum(1 for _ in Path(f"/proc/{of}/fd").iterdir()),
            threads=status["Threads"],
            temporary=sum(1 for _ in Path(tempfile.gettempdir()).iterdir()),
        )


def status_of(process: int | str = "self") -> dict[str, int]:
    """Read the numbers of /proc/…/status; sizes in bytes."""
    found = {}
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split() or [""]
        if number.isdecimal():
            found[name] = int(number) << (10 if unit == ["kB"] else 0)
    return found


def soak(cohort: lf.Cohort, folder: Path, rounds: int) -> Iterator[int]:
    """Extract, fit, finish and predict again and again; yield the number of every round done."""
    extraction = lf.ExtractSettings(backbone=BACKBONE, batch_size=4, **ON_CPU)
    fitting = lf.FitSettings(seeds=1, folds=3, epochs=2, **ON_CPU)
    for number in range(rounds):
        out = folder / "round"
        lf.extract(cohort, out / "store.h5", extraction)
        store = lf.FeatureStore.open(out / "store.h5")
        store.verify()
        lf.fit_heads(store, agg=HEADS, settings=fitting, out=out / "run")
        lf.finalize(out / "run", out / "model", row="bnsigmoid")
        model = lf.load_model(out / "model")
        model.predict(cohort, lf.PredictSettings(**ON_CPU))
        shutil.rmtree(out)
        yield number


def watched(words: Sequence[str]) -> dict[str, int]:
    """Run a command in a process of its own; return the peaks of what it held, in bytes."""
    peaks = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0)
    line = [sys.executable, "-m", "lymphfeat_cli", *words]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = status_of(process.pid)
            peaks = {name: max(peak, status.get(name, 0)) for name, peak in peaks.items()}
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with exit status {process.returncode}")
    return peaks


def settled() -> Held:
    """Look at this process once nothing waits to be collected."""
    gc.collect()
    return Held.now()


def sizes_of(patients: int) -> list[int]:
    """Draw patients' numbers of images: 300 to 700, on average 500."""
    half = np.random.default_rng(1).integers(300, 501, patients // 2)
    sizes = np.concatenate([half, 1000 - half])
    return [int(size) for size in np.random.default_rng(2).permutation(sizes)]


def write_sparse_store(
    path: Path, sizes: Sequence[int], shape: MapShape = REPORTED, *, empty: int = 1
) -> None:
    """Write a store of patients with `sizes` images each; their maps take a page of disk each.

    Of every `empty` patients only one has maps; the others are all zeros.

    All other pages are holes in the file, which read as zeros. Labels take turns, and a few
    channels say them. Maps and pooled features agree.
    """
    n = sum(sizes)
    cohort = made_up_cohort(sizes)
    cohort.table["label"] = np.arange(len(sizes)) % 2
    cohort.table["split"] = "train"
    hashes = [f"{image:064x}" for image in range(n)]
    _create(path, RECIPE, cohort, shape, [FROZEN], hashes, (), None)
    maps = map_rows(path, "features/frozen", "r+")  # (N, V, C, h, w)
    pooled = map_rows(path, "pooled/frozen", "r+")  # (N, V, C)
    map_rows(path, "images/crc32", "r+")[:] = np.arange(n)
    channels = _channels_of_a_page(maps)
    skipped = maps.offset + channels.start * maps[0, 0, 0].nbytes
    with path.open("r+b") as file:  # what is written through a mapping may fill pages around it
        for patient, (start, stop) in enumerate(pairwise(cohort.offsets)):
            if patient // 2 % empty:
                continue
            own = _maps_of(patient, stop - start, maps[0, 0, channels].shape)
            for image, values in zip(range(start, stop), own, strict=True):
                file.seek(skipped + image * maps[0].nbytes)
                file.write(values.tobytes())
            pooled[start:stop, 0, channels] = own.mean((2, 3), dtype=np.float32)
    with h5py.File(path, "r+") as file:
        file.attrs.modify("complete", np.uint8(1))


def _channels_of_a_page(maps: np.memmap[Any, Any]) -> slice:
    """Return channels that lie in one page in every image, where images are whole pages."""
    one = maps[0, 0, 0].nbytes
    first = -(-(-maps.offset % mmap.PAGESIZE) // one)
    return slice(first, first + max(1, mmap.PAGESIZE // one - 1))


def _maps_of(patient: int, n: int, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Draw maps (n, C, h, w) of a patient; those of odd ones are a little larger."""
    cells = np.random.default_rng(0).normal(0, 1, (_CELLS, *shape))
    drawn = np.random.default_rng(patient)
    shift = drawn.normal(0.2 * (patient % 2), 1, (len(cells[0]), 1, 1))  # of each channel
    brightness = drawn.normal(0, 0.1, (n, 1, 1, 1))
    return (cells[drawn.integers(_CELLS, size=n)] + shift + brightness).astype(np.float16)
