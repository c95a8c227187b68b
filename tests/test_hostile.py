"""Files made to do harm: refused in one line, before they take memory, and nothing in them runs.

The corpus holds inputs that `benchmarks/fuzz.py` found; each failed once.
"""

import faulthandler
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import decode_crop
from lymphfeat.errors import CohortError, LymphfeatError, ModelError, SettingsError, StoreError
from lymphfeat.explanation.explanation import explain
from lymphfeat.explanation.page import render_page
from lymphfeat.exporting import export_bags
from lymphfeat.features.exchange.arrays import read_maps, read_patients
from lymphfeat.features.hdf5 import attribute, numbers, open_hdf5
from lymphfeat.features.hdf5_headers import is_virtual
from lymphfeat.features.store import FeatureStore
from lymphfeat.inspection import inspect
from lymphfeat.model.loading import load_model
from lymphfeat.model.model import FACTS_FILE
from lymphfeat.runtime.checkpoint import Checkpoint
from lymphfeat.runtime.saved_tensors import read_saved
from lymphfeat.runtime.strict_json import json_text, parse_json
from lymphfeat.settings import ExplainSettings
from tests.cohorts import write_bags, write_text
from tests.hostile import TARGETS, Harmful, Target, refusal
from tests.memory import peak, reset_peak
from tests.stores import made_up_cohort, write_store
from tests.test_model import make_model
from tests.tiny import write_red_cohort

CORPUS = Path(__file__).parent / "data" / "corpus"
HUGE = 2**40
GROWTH = 64  # MiB, as in benchmarks/fuzz.py


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """End the process if a library searches for ever: no exception could."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def assert_one_line(told: str) -> None:
    assert len(told.splitlines()) == 1
    assert told.isprintable()


# --- what the fuzzer starts from, and what it found -----------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_valid_inputs_are_accepted(target: Target, tmp_path: Path) -> None:
    for number, data in enumerate(target.valid()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert refusal(target, data, folder) is None


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: path.stem)
def test_what_once_did_harm_does_none(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    held = reset_peak()
    told = refusal(TARGETS[path.parent.name], data, tmp_path)
    assert told is None or len(told.splitlines()) == 1
    assert peak() - held < GROWTH


def test_text_of_files_cannot_steer_a_terminal() -> None:
    told = str(CohortError("id P1\x1b[2J\r\n\u202eP2 must be \udc80 é"))
    assert told == r"id P1\x1b[2J\r\n\u202eP2 must be \udc80 é"


# --- HDF5: shapes that lie, and ways out of the file ----------------------------------------------


def put_shape(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, (HUGE, 3), "f4")


def put_chunks(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, (HUGE, 3), "f4", chunks=(1000, 3), compression="gzip")


def put_large_chunk(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, (4, 3), "f4", chunks=(2**27, 3), maxshape=(None, 3), compression=1)
    file[name].id.write_direct_chunk((0, 0), b"\0" * 100)


def put_bomb(file: h5py.Group, name: str) -> None:
    rows = 2**18
    own = file.create_dataset(name, (20 * rows, 3), "f4", compression=9, chunks=(rows, 3))
    zeros = zlib.compress(bytes(12 * rows), 9)
    for number in range(20):
        own.id.write_direct_chunk((number * rows, 0), zeros)


def put_external_link(file: h5py.Group, name: str) -> None:
    file[name] = h5py.ExternalLink("other.h5", "/features")


def put_soft_link(file: h5py.Group, name: str) -> None:
    file[name] = h5py.SoftLink(f"/{name}")


def put_external_file(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, (4, 3), "u1", external=[("/etc/passwd", 0, 12)])


def put_virtual(file: h5py.Group, name: str) -> None:
    layout = h5py.VirtualLayout((4, 3), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "features", (4, 3))
    file.create_virtual_dataset(name, layout)


def put_filter(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, data=np.zeros((4, 3), "i4"), chunks=(4, 3), scaleoffset=0)


def put_objects(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, (4, 3), h5py.vlen_dtype(np.float32))


def put_references(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, (4, 3), h5py.ref_dtype)


def put_records(file: h5py.Group, name: str) -> None:
    file.create_dataset(name, (4,), np.dtype([("a", "f4"), ("b", "f4")]))


def put_nothing(file: h5py.Group, name: str) -> None:
    file[name] = h5py.Empty("f4")


PARTS: dict[Callable[[h5py.Group, str], None], str] = {
    put_shape: "more than the file holds",
    put_chunks: "more than the file holds",
    put_large_chunk: "more than the file holds",
    put_bomb: "more than the file holds",
    put_external_link: "it is a link|got none",
    put_soft_link: "it is a link|got none",
    put_external_file: "it is read from others",
    put_virtual: "it is read from others",
    put_filter: "got filter 6",
    put_objects: "numbers or texts; got object",
    put_references: "numbers or texts; got object",
    put_records: "numbers or texts",
    put_nothing: "must have a shape",
}
each_part = pytest.mark.parametrize(
    ("put", "words"), PARTS.items(), ids=lambda put: getattr(put, "__name__", "")
)


@pytest.fixture
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where an array is read: what is hostile is refused before."""

    def read(self: h5py.Dataset, *args: Any) -> None:
        pytest.fail(f"{self.name} was read")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", read)


@pytest.mark.usefixtures("_unread")
@each_part
def test_a_bag_of_hdf5_is_checked_before_it_is_read(
    put: Callable[[h5py.Group, str], None], words: str, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "P1.h5", "w") as file:
        put(file, "features")
    with pytest.raises(StoreError, match=rf"P1\.h5: .*({words})") as caught:
        read_maps(tmp_path / "P1.h5")
    assert_one_line(caught.value.args[0])  # str() would escape it


@pytest.mark.usefixtures("_unread")
@pytest.mark.parametrize("place", ["X", "obs/patient", "obs/patient/codes"])
@each_part
def test_a_file_of_anndata_is_checked_before_it_is_read(
    put: Callable[[h5py.Group, str], None], words: str, place: str, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        if place.endswith("codes"):
            file["obs/patient/categories"] = ["P1"]
        put(file, place)
    path, rows = tmp_path / "a.h5ad", np.arange(2)
    with pytest.raises(StoreError, match=rf"a\.h5ad: .*({words})") as caught:
        _ = read_maps(path, rows) if place == "X" else read_patients(path, "patient")
    assert_one_line(caught.value.args[0])  # str() would escape it


PLACES = ("features/frozen", "pooled/frozen", "patients/id", "patients/offsets", "images/crc32")


@pytest.mark.parametrize("place", PLACES)
@each_part
def test_a_store_is_checked_before_it_is_read(
    put: Callable[[h5py.Group, str], None], words: str, place: str, tmp_path: Path
) -> None:
    write_store(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        attributes = dict(file[place].attrs)
        del file[place]
        put(file, place)
        if isinstance(file.get(place, getlink=True), h5py.HardLink):
            file[place].attrs.update(attributes)
    with pytest.raises(StoreError, match=rf"a\.h5: is damaged .*({words})") as caught:
        FeatureStore.open(tmp_path / "a.h5")
    assert_one_line(caught.value.args[0])  # str() would escape it


@pytest.mark.parametrize(
    ("place", "values", "words"),
    [
        ("patients/offsets", [0, 3, 2, 7], "must rise"),
        ("patients/offsets", [0, 2, 2, 7], "must rise"),
        ("patients/offsets", [0, 2, 3, 99], "must divide"),
        ("patients/offsets", [-1, 2, 3, 7], "must divide"),
        ("patients/offsets", [0, 2, 7], "must divide"),
        ("patients/offsets", [0.0, 2.0, 3.0, 7.0], "must rise"),
        ("patients/label", [0, 1, 7], "labels -1, 0 or 1"),
        ("patients/id", np.array([b"P0", b"P0", b"P1"]), "ids of their own"),
        ("images/crc32", [0, 1], "a row for each of 7 images"),
        ("features/frozen", np.zeros((7, 2, 3, 2, 1), np.float32), "must be float16"),
        ("features/frozen", np.zeros((7, 2, 3), np.float16), r"must be maps \(N, V, C, h, w\)"),
    ],
)
def test_parts_of_a_store_that_do_not_agree(
    place: str, values: Any, words: str, tmp_path: Path
) -> None:
    write_store(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        attributes = dict(file[place].attrs)
        del file[place]
        file[place] = values
        file[place].attrs.update(attributes)
    with pytest.raises(StoreError, match=words):
        FeatureStore.open(tmp_path / "a.h5")


def test_a_heap_in_which_a_library_would_search_for_ever(tmp_path: Path) -> None:
    write_store(tmp_path / "a.h5")
    data = bytearray((tmp_path / "a.h5").read_bytes())
    place = data.index(b"GCOL") + 16
    while (number := struct.unpack_from("<H", data, place)[0]) != 0:
        place += 16 + -(-struct.unpack_from("<Q", data, place + 8)[0] // 8) * 8
    assert number == 0
    data[place + 8 : place + 16] = bytes(8)  # the size of what is free
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(StoreError, match="a heap of texts is damaged"):
        FeatureStore.open(tmp_path / "a.h5")


def test_a_patient_may_have_the_name_of_a_heap(tmp_path: Path) -> None:
    cohort = made_up_cohort()
    cohort.table.index = pd.Index(["GCOL1", "P3", "PATIENT4"], name="id", dtype="str")
    assert list(write_store(tmp_path / "a.h5", cohort).ids) == ["GCOL1", "P3", "PATIENT4"]


# --- HDF5: texts that say they have gigabytes -----------------------------------------------------

TEXT = b"a patient"
TEXTS: dict[str, dict[str, Any]] = {
    "row": {},
    "gzip": {"chunks": (2,), "compression": "gzip"},
    "shuffled": {"chunks": (2,), "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": (2,), "compression": "lzf"},
}


def put_texts(path: Path, libver: str = "earliest", **options: Any) -> None:
    """Write four patients, and an attribute, in a file of AnnData."""
    texts = np.array([TEXT] * 4, object)
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset("obs/patient", data=texts, dtype=h5py.string_dtype(), **options)
        file.attrs["name"] = TEXT.decode()


def lie_in_file(path: Path) -> None:
    """Let all lengths that can be seen in a file be gigabytes."""
    data = bytearray(path.read_bytes())
    place = -1
    while (place := data.find(struct.pack("<I", len(TEXT)), place + 1)) >= 0:
        heap = int.from_bytes(data[place + 4 : place + 12], "little")
        if data[heap : heap + 4] == b"GCOL":
            data[place : place + 4] = b"\xff" * 4
    path.write_bytes(data)


def lie_in_chunk(path: Path, unfiltered: bool) -> None:
    with h5py.File(path, "r+") as file:
        own = file["obs/patient"].id
        mask, packed = own.read_direct_chunk((2,))
        raw = b"\xff" * 4 + zlib.decompress(packed)[4:]
        own.write_direct_chunk((2,), *((raw, 3) if unfiltered else (zlib.compress(raw), mask)))


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("options", TEXTS.values(), ids=TEXTS)
def test_texts_of_every_packing_are_read(
    options: dict[str, Any], libver: str, tmp_path: Path
) -> None:
    put_texts(tmp_path / "a.h5ad", libver, **options)
    assert list(read_patients(tmp_path / "a.h5ad", "patient")) == [TEXT.decode()]
    with open_hdf5(tmp_path / "a.h5ad") as file:
        assert attribute(file, "name") == TEXT.decode()


@pytest.mark.parametrize("kind", ["row", "gzip", "shuffled", "shuffled, without filters"])
def test_texts_that_claim_gigabytes_take_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    put_texts(path, **TEXTS[kind.split(",")[0]])
    if kind == "row":
        lie_in_file(path)
    else:
        lie_in_chunk(path, unfiltered="without" in kind)
    held = reset_peak()
    with pytest.raises(StoreError, match=r"declares texts of .* more than the file hold") as caught:
        read_patients(path, "patient")
    assert peak() - held < GROWTH
    assert_one_line(caught.value.args[0])  # str() would escape it


def test_a_text_that_a_shuffle_leaves_out_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((3,))  # 48 bytes, shuffled in units of 32
    properties.set_filter(h5py.h5z.FILTER_SHUFFLE, 1, (32,))
    properties.set_filter(h5py.h5z.FILTER_DEFLATE, 1, (4,))
    with h5py.File(path, "w") as file:
        kind = h5py.h5t.py_create(h5py.string_dtype(), logical=1)
        space = h5py.h5s.create_simple((3,))
        h5py.h5d.create(file.create_group("obs").id, b"patient", kind, space, properties)
        file["obs/patient"][:] = np.array([TEXT] * 3, object)
    with pytest.raises(StoreError, match="must hold whole units"):
        read_patients(path, "patient")


def test_a_header_that_goes_on_in_itself_ends() -> None:
    def block(messages: int) -> bytes:
        onward = struct.pack("<BHBQQ", 16, 16, 0, 64, 4 + 20 + 4 * messages + 4)
        return b"OCHK" + onward + bytes(4 * messages) + bytes(4)

    message = struct.pack("<BHBQQ", 16, 16, 0, 64, len(block(50_000)))
    image = (b"OHDR" + bytes([2, 2]) + struct.pack("<I", 20) + message).ljust(64, b"\0")
    image += block(50_000)
    with pytest.raises(ValueError, match="must have at most 1048576 bytes"):
        is_virtual(0, lambda place, size: image[place : place + size])


def test_an_attribute_that_claims_gigabytes_takes_none(tmp_path: Path) -> None:
    put_texts(tmp_path / "a.h5ad")
    lie_in_file(tmp_path / "a.h5ad")
    held = reset_peak()
    with (
        open_hdf5(tmp_path / "a.h5ad") as file,
        pytest.raises(ValueError, match="name declares texts of 4294967295 bytes, more than"),
    ):
        attribute(file, "name")
    assert peak() - held < GROWTH


def test_a_text_for_what_is_not_stored_takes_nothing(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        options = {"dtype": h5py.string_dtype(), "chunks": (2,), "fillvalue": TEXT.decode()}
        file.create_dataset("obs/patient", (4,), **options)
    lie_in_file(tmp_path / "a.h5ad")
    held = reset_peak()
    with pytest.raises(StoreError, match="must have no text for what is not stored"):
        read_patients(tmp_path / "a.h5ad", "patient")
    assert peak() - held < GROWTH


def test_texts_that_cannot_be_looked_at_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.COMPACT)
        kind, space = (
            h5py.h5t.py_create(h5py.string_dtype(), logical=1),
            h5py.h5s.create_simple((2,)),
        )
        h5py.h5d.create(file.create_group("obs").id, b"patient", kind, space, properties)
    with pytest.raises(StoreError, match="must be stored in a row or in chunks"):
        read_patients(tmp_path / "a.h5ad", "patient")
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.attrs.update({f"a{number}": "x" for number in range(20)})
    with open_hdf5(tmp_path / "a.h5") as file, pytest.raises(ValueError, match="too many attrib"):
        attribute(file, "a0")


@pytest.mark.slow
def test_a_read_of_more_than_two_gigabytes_is_whole(tmp_path: Path) -> None:
    path, size = tmp_path / "large.h5", 2**31 + 2**20
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (size,), "u1")[-3:] = 7  # the rest takes no room
    with open_hdf5(path) as file:
        assert numbers(file, "x")[()][-4:].tolist() == [0, 7, 7, 7]


def test_rows_that_a_file_of_anndata_lacks(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file["X"] = np.zeros((2, 3), np.float32)
        file["obs/patient"] = ["P1", "P1", "P1"]
    (rows,) = read_patients(tmp_path / "a.h5ad", "patient").values()
    with pytest.raises(StoreError, match="X must have a row for each of obs"):
        read_maps(tmp_path / "a.h5ad", rows)


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npy", ".npz"])
def test_no_bag_is_unpickled(suffix: str, tmp_path: Path) -> None:
    content = np.array([Harmful(tmp_path / "run")], object)
    path = tmp_path / f"P1{suffix}"
    if suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, features=content)
    else:
        torch.save(Harmful(tmp_path / "run"), path)
    with pytest.raises(StoreError):
        read_maps(path)
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_and_no_weights_are_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": Harmful(tmp_path / "run")}, path)
    with pytest.raises(ModelError, match="cannot be read as a checkpoint"):
        Checkpoint(path, {}, {}).read()
    with pytest.raises(LymphfeatError, match="cannot be read as weights"):
        TARGETS["weights"].read(path.read_bytes(), tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**20, 2**20),
        torch.eye(2).to_sparse().sparse_resize_((2**30, 2**30), 2, 0),
        torch.zeros(2**20, 2**20, device="meta"),
    ],
    ids=["strides", "sparse", "meta"],
)
def test_tensors_larger_than_their_file(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"features": tensor}, tmp_path / "P1.pt")
    with pytest.raises(ValueError, match=r"dense|more than the file holds"):
        read_saved(tmp_path / "P1.pt")
    with pytest.raises(StoreError, match=r"P1\.pt: cannot be read \(.*(dense|more than the file)"):
        read_maps(tmp_path / "P1.pt")


def test_arrays_larger_than_their_file(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 3), }\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(12)
    (tmp_path / "P1.npy").write_bytes(array)
    with zipfile.ZipFile(tmp_path / "P1.npz", "w") as file:
        file.writestr("features.npy", array)
    np.savez_compressed(tmp_path / "P2.npz", features=np.zeros((2**21, 3), np.float32))
    for name in ("P1.npy", "P1.npz", "P2.npz"):
        with pytest.raises(StoreError, match=rf"{name}: cannot be read") as caught:
            read_maps(tmp_path / name)
        assert_one_line(caught.value.args[0])  # str() would escape it


# --- JSON and models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "NaN",
        "[-Infinity]",
        "1e999",
        "9" * 21,
        "9" * 5000,
        b"\xff",
    ],
)
def test_json_that_overflows(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (any words)
        parse_json(text)


def test_json_that_we_write_is_read() -> None:
    content = {"a": [1, -(2**63), 2**64 - 1, 1e308, -0.0, None, True, "\ud800é\0"], "": {}}
    assert parse_json(json_text(content)) == content


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["recipe"].update(crop=10**6), "crop .* must lie in"),
        (lambda c: c["recipe"].update(backbone="vit_giant_patch14_224"), "larger than its tensors"),
        (
            lambda c: c["recipe"].update(backbone="resnet18"),
            "cannot be read as this model's tensors",
        ),
        (lambda c: c["head"].update(agg="attention", width=10**9), "larger than its tensors"),
        (lambda c: c["head"].update(agg="lstm", layers=10**9), "layers .* must lie in"),
        (lambda c: c["head"].update(agg="prototypes", prototypes=10**12), "larger than its tens"),
        (lambda c: c.update(weights_sha256="0"), "tensors must be those that model.json"),
    ],
)
def test_facts_that_the_tensors_do_not_bear_out(
    change: Callable[[Any], object], words: str, tmp_path: Path
) -> None:
    make_model().save(tmp_path / "m")
    edit(tmp_path / "m" / FACTS_FILE, change)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(tmp_path / "m")
    assert_one_line(caught.value.args[0])  # str() would escape it


@pytest.mark.parametrize("name", ["../m", "..", ".", "", "/m", "a/b", 7, None, ["m"]])
def test_members_lie_in_their_folder(name: Any, tmp_path: Path) -> None:
    make_model().save(tmp_path / "m")
    write_text(tmp_path / "all" / "members.json", json.dumps({"members": [name]}))
    with pytest.raises(ModelError, match=r"members\.json: is damaged"):
        load_model(tmp_path / "all")


@pytest.mark.parametrize("name", ["../aim", "/aim", "new/../../aim", "..", "", "a\0"])
def test_an_interrupted_swap_moves_nothing_out_of_its_folder(name: str, tmp_path: Path) -> None:
    """A folder from elsewhere may come with a swap that never was."""
    here = tmp_path / "here"
    write_text(tmp_path / "aim", "mine")
    write_text(here / "model.partial" / "aim", "theirs")
    (here / "model.partial" / "new").mkdir()
    write_text(here / "model.partial" / "swap.json", json.dumps({name: True}))
    with pytest.raises(SettingsError, match=r"swap\.json must name the files of a result"):
        inspect(here / "model")
    assert (tmp_path / "aim").read_text().strip() == "mine"
    assert (here / "model.partial" / "aim").exists()


def test_weights_with_a_header_that_is_no_json(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}
    for facts in ("[" * 50_000, "NaN", "[]", '{"provenance": 7}', '{"trained_on": 7}'):
        data = safetensors.torch.save(tensors, {"lymphfeat": facts})
        told = refusal(TARGETS["weights"], data, tmp_path)
        assert (told is None) == (facts == "[]")
        assert_one_line(told or " ")


# --- paths and images -----------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["..", "../P2", "/etc", "a/../../b", "."])
def test_an_id_is_never_a_path(id: str, tmp_path: Path) -> None:
    write_bags(tmp_path / "cohort", {"P1": 1})
    write_bags(tmp_path, {"P2": 1})
    write_text(tmp_path / "cohort" / "table.csv", "id,label", "P1,1", f"{id},0")
    with pytest.raises(CohortError, match=r"cannot be a folder's name|without images"):
        Cohort.load(tmp_path / "cohort")


@pytest.mark.parametrize("id", ["..", "../P2", "/etc", "a\\b", "C:x", ".x"])
def test_an_id_that_cannot_name_a_file_is_not_exported(id: str, tmp_path: Path) -> None:
    cohort = made_up_cohort((1, 1))
    cohort.table.index = cohort.table.index.where(cohort.table.index != "P1", id)
    store = write_store(tmp_path / "a.h5", cohort)
    with pytest.raises(StoreError, match="must have an id that can name a file"):
        export_bags(store, tmp_path / "out", "npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_a_pipe_among_images_is_refused(tmp_path: Path) -> None:
    """Reading it would never end; nor would a link to a device."""
    write_bags(tmp_path, {"P1": 1})
    write_text(tmp_path / "table.csv", "id,label", "P1,1")
    os.mkfifo(tmp_path / "P1" / "x.png")
    with pytest.raises(CohortError, match=r"x\.png must be a file or a folder"):
        Cohort.load(tmp_path)
    (tmp_path / "P1" / "x.png").unlink()
    (tmp_path / "P1" / "x.png").symlink_to("/dev/zero")
    with pytest.raises(CohortError, match=r"x\.png must be a file or a folder"):
        Cohort.load(tmp_path)


@pytest.mark.seconds
def test_folders_too_deep_are_refused(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(1500):
        deep = deep / "a"
        try:
            deep.mkdir()
        except OSError:  # a path has an end
            break
    write_text(tmp_path / "table.csv", "id,label", "P1,1")
    with pytest.raises(CohortError, match=r"too many folders|cannot be read"):
        Cohort.load(tmp_path)
    for folder in (deep, *deep.parents[: len(deep.parents) - len(tmp_path.parents) - 1]):
        with suppress(FileNotFoundError):
            folder.rmdir()  # pytest cannot remove so many folders within each other
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv"}


def test_only_formats_of_images_are_decoded(tmp_path: Path) -> None:
    """Whatever the suffix says: EPS would be handed to Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(CohortError, match="not an image of any known format"):
        decode_crop(tmp_path / "a.png", 8)


# --- the page -------------------------------------------------------------------------------------

EVIL = (
    "</script><script>alert(1)</script><!--<script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}<b onclick=alert(1)>&lt;",
    "]]>--><svg \u2028onload=alert(1)>",
)


SLASH = "\u2215"  # like /, which no file system has in a name


def _id(number: int, word: str) -> str:
    return f"P{number}{word}".replace("/", SLASH).replace("\u2028", "")  # ids must be printable


class _Parsed(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[str]]] = []
        self.handlers: list[str] = []
        self.data: dict[str, str] = {}
        self._open: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attrs]))
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self._open = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.data[self._open] = self.data.get(self._open, "") + data


def render(root: Path, words: tuple[str, ...]) -> _Parsed:
    """Render a cohort with these words wherever a user's words can be."""
    for number, word in enumerate(words):
        own = root / f"P{number}"
        (own / "0.png").rename(own / f"0{word.replace('/', SLASH)}.png")
        own.rename(root / _id(number, word))
    lines = (root / "cohort.csv").read_text().splitlines()
    quoted = ['"' + word.replace('"', '""') + '"' for word in words]
    rows = [",".join([lines[0], quoted[0], quoted[1]])]
    for number, word in enumerate(words):
        id = _id(number, word).replace('"', '""')
        rows.append(f'"{id}",{number % 2},{quoted[number]},{number}')
    write_text(root / "cohort.csv", *rows)
    cohort = Cohort.load(root)
    settings = ExplainSettings(device="cpu", precision="float32")
    return _Parsed(render_page(explain(make_model("topk"), cohort, settings)))


@pytest.mark.seconds
def test_words_of_users_add_nothing_to_the_page(tmp_path: Path) -> None:
    evil_root = tmp_path / EVIL[1].replace("/", "")
    tame = render(write_red_cohort(tmp_path / "tame", "0101"), ("a", "b", "c", "d"))
    evil = render(write_red_cohort(evil_root, "0101"), EVIL)
    assert evil.elements == tame.elements
    assert not evil.handlers
    content = {name: json.loads(text) for name, text in evil.data.items()}
    own = {f"{kind}{number}" for kind in "ps" for number in range(4)}
    assert content.keys() == {"data"} | own
    assert content["data"]["attributes"] == list(EVIL[:2])
    assert [each["attributes"][EVIL[0]] for each in content["data"]["patients"]] == list(EVIL)
