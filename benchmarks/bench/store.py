"""Reading a store, beside other ways to keep the same maps, and beside bare numpy.memmap."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from benchmarks.bench.inputs import challenge_store
from benchmarks.bench.measure import LIMIT, OURS, Bench, in_turn, seconds_of
from benchmarks.bench.results import Goal, Line
from lymphfeat.features.store import FeatureStore

MEMMAP = "numpy.memmap"
GOALS = (Goal(text="≤ 1.1 × the time of numpy.memmap", at_least=1 / 1.1),)
Maps = NDArray[np.float16]


class Reader(Protocol):
    """An open file, or folder of files, of which bags and images are copied to memory."""

    def bag(self, patient: int) -> Maps:
        """Read the maps of all images of a patient."""

    def image(self, patient: int, number: int) -> Maps:
        """Read the map of one image of a patient."""


class Rows:
    """Reads from one array of all images, patient after patient: (N, …), mapped or of HDF5."""

    def __init__(self, rows: Any, offsets: NDArray[np.int64]) -> None:
        self._rows, self._offsets = rows, offsets

    def bag(self, patient: int) -> Maps:
        return np.array(self._rows[self._offsets[patient] : self._offsets[patient + 1]])

    def image(self, patient: int, number: int) -> Maps:
        return np.array(self._rows[self._offsets[patient] + number])


class Bags:
    """Reads from one HDF5 file per patient."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def bag(self, patient: int) -> Maps:
        with h5py.File(self._folder / f"{patient}.h5") as file:
            return np.array(file["features"])

    def image(self, patient: int, number: int) -> Maps:
        with h5py.File(self._folder / f"{patient}.h5") as file:
            return np.array(file["features"][number])


class Formats:
    """The same maps in every format, and how each is opened."""

    def __init__(self, bench: Bench, store: FeatureStore) -> None:
        self.offsets, self._store = store.offsets, store.path
        self._folder = bench.new("formats")
        (self._folder / "bags").mkdir(parents=True)
        maps = store.features()
        self._shape = maps.shape
        np.save(self._folder / "maps.npy", maps)
        maps.tofile(self._folder / "maps.raw")
        with h5py.File(self._folder / "chunks.h5", "w") as file:
            file.create_dataset("features", data=maps, chunks=(1, *maps.shape[1:]))
        for patient, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            with h5py.File(self._folder / "bags" / f"{patient}.h5", "w") as file:
                file["features"] = maps[start:stop]

    def openers(self) -> Mapping[str, Callable[[], Reader]]:
        return {
            OURS: self._open_store,
            "one HDF5 file per bag": lambda: Bags(self._folder / "bags"),
            "HDF5, a chunk per image": self._open_chunks,
            "a single .npy": self._open_npy,
            LIMIT: self._open_memmap,
        }

    def _open_store(self) -> Reader:
        store = FeatureStore.open(self._store)
        return Rows(store.features(), store.offsets)

    def _open_chunks(self) -> Reader:
        return Rows(h5py.File(self._folder / "chunks.h5")["features"], self.offsets)

    def _open_npy(self) -> Reader:
        return Rows(np.load(self._folder / "maps.npy", mmap_mode="r"), self.offsets)

    def _open_memmap(self) -> Reader:
        raw = self._folder / "maps.raw"
        return Rows(np.memmap(raw, np.float16, "r", shape=self._shape), self.offsets)

    def forget(self) -> None:
        """Take the files out of the system's memory, so that the next read is from the disk."""
        if not hasattr(os, "posix_fadvise"):
            return
        for path in (self._store, *self._folder.rglob("*.*")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(bench: Bench) -> list[Line]:
    store = FeatureStore.open(challenge_store(bench))
    formats = Formats(bench, store)
    gigabytes = store.features().nbytes / 1e9
    what = (
        f"{len(store.ids)} patients, {len(store.image_names):,} maps, {gigabytes:.2f} GB; the "
        f"limit is {MEMMAP} of a raw file"
    )
    return [
        Line(
            name="store: shuffled pass over all bags",
            unit="ms",
            samples=_shuffled_pass(bench, formats, len(store.ids)),
            goals=GOALS,
            note=f"{what}. Every bag is copied to memory once, in random order; files are in the "
            "page cache.",
        ),
        Line(
            name="store: one random image",
            unit="µs",
            samples=_random_images(bench, formats, store.n_images),
            goals=GOALS,
            note=f"{what}. The mean of {bench.size(2000, 20):,} images, copied to memory; files "
            "are in the page cache.",
        ),
        Line(
            name="store: cold open and one bag",
            unit="ms",
            samples=_cold_open(bench, formats, len(store.ids)),
            goals=GOALS,
            note=f"{what}. Files are taken out of the page cache first. Only the store brings "
            "patients, labels and recipe; all others must be told where bags begin.",
        ),
    ]


def _shuffled_pass(bench: Bench, formats: Formats, patients: int) -> dict[str, list[float]]:
    order = np.random.default_rng(0).permutation(patients).tolist()

    def contestant(reader: Reader) -> Callable[[], float]:
        return lambda: 1e3 * seconds_of(lambda: [reader.bag(patient) for patient in order])

    return in_turn(
        bench, {name: contestant(opened()) for name, opened in formats.openers().items()}
    )


def _random_images(
    bench: Bench, formats: Formats, n_images: NDArray[np.int64]
) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    patients = rng.integers(len(n_images), size=bench.size(2000, 20))
    places = [(int(patient), int(rng.integers(n_images[patient]))) for patient in patients]

    def contestant(reader: Reader) -> Callable[[], float]:
        return lambda: (
            1e6 * seconds_of(lambda: [reader.image(*place) for place in places]) / len(places)
        )

    return in_turn(
        bench, {name: contestant(opened()) for name, opened in formats.openers().items()}
    )


def _cold_open(bench: Bench, formats: Formats, patients: int) -> dict[str, list[float]]:
    def contestant(opened: Callable[[], Reader]) -> Callable[[], float]:
        def measure_once() -> float:
            formats.forget()
            return 1e3 * seconds_of(lambda: opened().bag(patients // 2))

        return measure_once

    return in_turn(bench, {name: contestant(opened) for name, opened in formats.openers().items()})
