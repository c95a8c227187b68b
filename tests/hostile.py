"""What reads files of others, valid inputs for each, and how to spoil them.

An input is the bytes of one file (of a model, its two files). `benchmarks/fuzz.py` spoils inputs of
the `TARGETS` at random; `test_hostile.py` reads those that once did harm.
"""

import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import click
import h5py
import numpy as np
import safetensors.torch
import torch

from lymphfeat.cohort.attributes import Attribute, AttributeRecipe
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.csv_rows import peek_columns
from lymphfeat.cohort.splits import read_splits
from lymphfeat.cohort.tables import read_tables
from lymphfeat.errors import LymphfeatError
from lymphfeat.evaluation.decision import Decision
from lymphfeat.features.backbones import read_provenance, read_weights
from lymphfeat.features.exchange.arrays import read_maps, read_patients
from lymphfeat.features.store import FeatureStore
from lymphfeat.heads.blank import empty_head
from lymphfeat.inspection import inspect
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.held_out import HeldOut
from lymphfeat.model.members import Member
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE, WEIGHTS_FILE, Model
from lymphfeat.model.scoring import ModelRecipe
from lymphfeat.model.sources import ImportedSource
from lymphfeat.settings import HeadSettings
from lymphfeat_cli.main import COMMANDS, cli, read_config
from tests.stores import made_up_cohort, write_store
from tests.tiny import BACKBONE

BETWEEN = b"\n--- tensors ---\n"  # facts and tensors of a model, in one input
TINY = Path(__file__).parent / "data"
Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader of files."""

    name: str
    valid: Callable[[], Sequence[bytes]]  # inputs that it accepts
    read: Callable[[bytes, Path], object]  # an input, and a folder for it
    mutations: Sequence[Mutation]  # one is drawn at a time
    tokens: Sequence[bytes] = ()  # words of the format


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# --- spoiling bytes -------------------------------------------------------------------------------

_NUMBERS = (
    0,
    1,
    2**7,
    2**8 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**64 - 1,
)


def flip(data: bytes, rng: random.Random) -> bytes:
    """Change one to eight bits or bytes."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if found:
            place = rng.randrange(len(found))
            found[place] = rng.choice((found[place] ^ (1 << rng.randrange(8)), rng.randrange(256)))
    return bytes(found)


def renumber(data: bytes, rng: random.Random) -> bytes:
    """Write a telling number over one, two, four or eight bytes."""
    size = rng.choice((1, 2, 4, 8))
    place = rng.randrange(max(1, len(data) - size))
    number = rng.choice(_NUMBERS) % (1 << 8 * size)
    order: Literal["little", "big"] = rng.choice(("little", "big"))
    return data[:place] + number.to_bytes(size, order) + data[place + size :]


def cut(data: bytes, rng: random.Random) -> bytes:
    """Remove the end or a part."""
    start, stop = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:start] if rng.random() < 0.5 else data[:start] + data[stop:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Write a part again, there or elsewhere."""
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.choice((1, 4, 16, 64, 256))]
    place = rng.randrange(len(data) + 1)
    return data[:place] + part * rng.choice((1, 1, 2, 20)) + data[place:]


BYTES = (flip, flip, renumber, renumber, cut, repeat)


# --- spoiling texts -------------------------------------------------------------------------------

_CELLS = (
    *("", "0", "1", "-1", "2", "nan", "NA", "1e999", "-1e-999", "9" * 400, "0x10", "1_000", "inf"),
    *("1/13/1950", "31-02-1950", "1950-02-30", "01-01-0000", "1950-01-01T00:00:00", "٣", "½", "−1"),
    *("../P1", "/etc/passwd", "P1/../P2", "..", ".", "a\0b", "a\nb", "\r", "\ufeff", "\u202e", "é"),
    *('"', '""', "'", ",", ";", "\t", "sep=;", "=1+1", "<script>", "\x1b[31m", "P" + "1" * 5000),
    *(
        "id",
        "label",
        "split",
        "fold",
        "train",
        "val",
        "test",
        "dob",
        "age",
        "gender",
        "lymph_count",
    ),
)


def respell(data: bytes, rng: random.Random) -> bytes:
    """Change cells, rows and separators of a CSV."""
    text = data.decode("utf-8", "surrogateescape")
    separator = rng.choice(",,,,;\t|")
    rows = [line.split(",") for line in text.splitlines()] or [[""]]
    for _ in range(rng.choice((1, 1, 2, 3, 10))):
        row = rng.choice(rows)
        kind = rng.randrange(6)
        if kind < 3 and row:
            row[rng.randrange(len(row))] = rng.choice(_CELLS)
        elif kind == 3:
            row.insert(rng.randrange(len(row) + 1), rng.choice(_CELLS))
        elif kind == 4:
            rows.insert(rng.randrange(len(rows) + 1), list(rng.choice(rows)))
        elif row:
            del row[rng.randrange(len(row))]
    end = rng.choice(("\n", "\n", "\r\n", "\r", "\n\n"))
    encoding = rng.choice(("utf-8",) * 6 + ("utf-16", "utf-8-sig", "latin-1"))
    return end.join(map(separator.join, rows)).encode(encoding, "replace")


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**19, -(10**18), 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "0", "frozen", "../x", "/x", "\0", "\ud800", "P1", "mean", "topk", "x" * 300),
    *([], {}, [[]], [None], {"": None}, [0, 1], ["a", "b"], [1e308], {"id": "a", "images": "b"}),
)
_RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "9" * 30, "9" * 5000, "0" * 9, "-", "[" * 100_000),
    *('{"a":' * 5000, "[" * 900 + "]" * 900, '"\\ud800"', '"\\u0000"', "tru", "//", "1.0e", "'a'"),
)


def rewrite(data: bytes, rng: random.Random) -> bytes:
    """Change values of JSON, or remove them."""
    try:
        content = json.loads(data)
    except ValueError:
        return flip(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        content = _replaced(content, rng)
    text = json.dumps(content)
    if rng.random() < 0.1:
        text = text.replace(json.dumps(_MARK), rng.choice(_RAW))
    return text.encode("utf-8", "surrogatepass")


_MARK = "here"


def _replaced(content: Any, rng: random.Random) -> Any:
    """Replace one value somewhere in a tree."""
    places: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (dict, list)):
            keys = list(each) if isinstance(each, dict) else list(range(len(each)))
            places += [(each, key) for key in keys]
            waiting += [each[key] for key in keys]
    if not places:
        return deepcopy(rng.choice(_VALUES))
    parent, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = _MARK
    elif kind == 2:
        other = rng.choice(places)[0]  # another part, or one around this
        parent[key] = deepcopy(other) if len(json.dumps(content)) < 100_000 else None
    elif kind == 3 and isinstance(parent, list):
        parent.append(deepcopy(parent[key]))
    else:
        parent[key] = deepcopy(rng.choice(_VALUES))
    return content


def insert(tokens: Sequence[bytes]) -> Mutation:
    """Write words of the format somewhere."""

    def inserted(data: bytes, rng: random.Random) -> bytes:
        for _ in range(rng.choice((1, 1, 2, 4))):
            place, token = rng.randrange(len(data) + 1), rng.choice(tokens)
            data = data[:place] + token + data[place + rng.choice((0, len(token))) :]
        return data

    return inserted


_TOML = (
    *(
        "1",
        "-1",
        "0",
        "0.5",
        "1e300",
        "nan",
        "true",
        '"x"',
        '""',
        '"1"',
        '"mean"',
        "[]",
        "[1]",
        "{}",
    ),
    *(
        '["mean"]',
        '[["a"]]',
        "{a = 1}",
        "2020-01-01",
        "07:32:00",
        "1979-05-27T07:32:00Z",
        "[1, 'a']",
    ),
    *("99999999999999999999", "9" * 5000, '"\\u0000"', "'../x'", "[nan]", "0x10", '"none"', "1_0"),
)


def reset(data: bytes, rng: random.Random) -> bytes:
    """Give options of TOML other values, or commands other options."""
    lines = data.decode("utf-8", "replace").splitlines() or [""]
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(lines))
        key, equals, _ = lines[place].partition(" = ")
        if not equals:
            lines[place] = f"[{rng.choice(list(COMMANDS))}]"
        elif rng.random() < 0.3:
            key = rng.choice(_options())
        lines[place] = f"{key} = {rng.choice(_TOML)}" if equals else lines[place]
    return "\n".join(lines).encode()


@cache
def _options() -> list[str]:
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in COMMANDS]
    found = {option for each in commands if each for own in each.params for option in own.opts}
    return sorted(option.lstrip("-") for option in found)


# --- spoiling archives and HDF5 -------------------------------------------------------------------


def repack(data: bytes, rng: random.Random) -> bytes:
    """Spoil a member of a zip file, which is whole again afterwards."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as file, zipfile.ZipFile(out, "w") as new:
        names = file.namelist()
        chosen = rng.choice(names)
        for name in names:
            own = file.read(name)
            if name == chosen:
                own = rng.choice((*BYTES, _in_header))(own, rng)
                if rng.random() < 0.05:
                    own = bytes(2**22)
            if name != chosen or rng.random() < 0.95:
                packed = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
                new.writestr(zipfile.ZipInfo(name), own, packed)
    return out.getvalue()


def _in_header(data: bytes, rng: random.Random) -> bytes:
    """Change numbers written as texts, as in the header of .npy."""
    return _digits(data, rng, b"0123456789")


def _digits(data: bytes, rng: random.Random, digits: bytes) -> bytes:
    places = [place for place, byte in enumerate(data[:4096]) if byte in digits]
    if not places:
        return flip(data, rng)
    place = rng.choice(places)
    number = str(rng.choice((*_NUMBERS, -1, 10**30))).encode()
    return data[:place] + number + data[place + rng.choice((1, len(number))) :]


def rebuild(data: bytes, rng: random.Random) -> bytes:
    """Replace parts of an HDF5 file by others, through h5py."""
    stream = io.BytesIO(data)
    with h5py.File(stream, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(rng.choice((1, 1, 2))):
            _change(file, rng.choice(names), rng)
    return stream.getvalue()


def _change(file: h5py.File, name: str, rng: random.Random) -> None:
    item = file.get(name)
    if item is None:
        return
    if len(item.attrs) and rng.random() < 0.4:
        key = rng.choice(list(item.attrs))
        del item.attrs[key]
        if rng.random() < 0.8:
            item.attrs[key] = rng.choice(_ATTRIBUTES)
        return
    shape = getattr(item, "shape", (3,))
    del item, file[name]
    if rng.random() < 0.9:
        rng.choice(_PARTS)(file, name, shape, rng)


_ATTRIBUTES: tuple[Any, ...] = (
    *("", "x", "{}", "[]", "null", "[" * 9000, "NaN", b"\xff", 0, -1, 2**63, np.float64("nan")),
    *(
        np.zeros(0),
        np.zeros((2, 2)),
        np.array(["a", "b"], "S1"),
        h5py.Empty("f4"),
        "9" * 5000,
        True,
    ),
)
_DTYPES = ("f2", "f4", "f8", "i1", "i8", "u4", "S1", "S9", "?", "c8", "V3", ">f4")


def _sides(shape: tuple[int, ...] | None, rng: random.Random) -> tuple[int, ...]:
    sides = list(shape or ())
    for _ in range(rng.randrange(3)):
        kind, big = rng.randrange(3), rng.choice((0, 1, 2, 5, 1000, 2**31, 2**40, 2**62))
        if kind == 0:
            sides.append(big)
        elif kind == 1 and sides:
            sides[rng.randrange(len(sides))] = big
        elif sides:
            del sides[rng.randrange(len(sides))]
    return tuple(sides[:30])


def _put_plain(file: h5py.File, name: str, shape: Any, rng: random.Random) -> None:
    sides, dtype = _sides(shape, rng), rng.choice(_DTYPES)
    small = 0 < int(np.prod(sides, dtype=float)) <= 1000
    if small:
        file.create_dataset(name, data=np.zeros(sides, dtype))
    else:
        file.create_dataset(name, sides, dtype)


def _put_chunks(file: h5py.File, name: str, shape: Any, rng: random.Random) -> None:
    sides = _sides(shape, rng) or (4,)
    chunks = tuple(max(1, min(side, rng.choice((1, 7, 1000, 2**20)))) for side in sides)
    packed = rng.choice((None, "gzip", "lzf", "scaleoffset"))
    options: dict[str, Any] = {"compression": packed}
    if packed == "scaleoffset":
        options = {"scaleoffset": 0}
    file.create_dataset(
        name,
        sides,
        rng.choice(("f2", "f4", "i8")) if packed != "scaleoffset" else "i4",
        chunks=chunks,
        **options,
    )
    if rng.random() < 0.5 and np.prod(sides, dtype=float) < 1e4:
        file[name][...] = 1


def _put_link(file: h5py.File, name: str, shape: Any, rng: random.Random) -> None:
    links = (h5py.SoftLink("/"), h5py.SoftLink(f"/{name}"), h5py.ExternalLink("other.h5", "/x"))
    file[name] = rng.choice((*links, file["/"]))


def _put_virtual(file: h5py.File, name: str, shape: Any, rng: random.Random) -> None:
    layout = h5py.VirtualLayout(shape or (3,), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", shape or (3,))
    file.create_virtual_dataset(name, layout)


def _put_external(file: h5py.File, name: str, shape: Any, rng: random.Random) -> None:
    sides = shape or (3,)
    size = int(np.prod(sides, dtype=float)) * 4
    file.create_dataset(name, sides, "f4", external=[("/etc/passwd", 0, max(1, size))])


def _put_objects(file: h5py.File, name: str, shape: Any, rng: random.Random) -> None:
    kinds = (h5py.ref_dtype, h5py.regionref_dtype, h5py.vlen_dtype(np.int32), h5py.string_dtype())
    file.create_dataset(name, shape or (3,), rng.choice(kinds))


def _put_group(file: h5py.File, name: str, shape: Any, rng: random.Random) -> None:
    file.create_group(name)


_PARTS = (
    *(_put_plain, _put_plain, _put_chunks, _put_link, _put_virtual, _put_external, _put_objects),
    _put_group,
)


# --- tables, folds, settings ----------------------------------------------------------------------

_TABLE = b"""id,label,split,gender,dob,lymph_count,site
P1,1,train,F,1/31/1950,5.5,a
P2,0,train,M,31-01-1951,4,b
P10,,test,,1960-01-31,,a
"""
_FOLDS = (b"id,fold\nP1,1\nP2,2\nP3,1\n", b"slide_id,split\nP1,train\nP2,val\nP3,test\n",
          b"train,val,test\nP1,P2,P3\nP4,,\n")  # fmt: skip
_SPLITS = (
    b'{"a": {"seed": 0, "repeat": 1, "train": ["P1", "P2"], "validation": ["P3"], "parents": []}}'
)
_CONFIG = b"""[fit-head]
agg = ["topk", "mean"]
seeds = 2
folds = 3
k-agg = [5, 10]
[extract]
crop = 112
weights = "none"
backbone = "resnet18"
[synth]
patients = 3
seed = 1
[import]
reference-date = 2020-01-01
allow-missing = true
"""


def _written(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


def _read_table(data: bytes, folder: Path) -> object:
    path = _written(data, folder / "table.csv")
    peek_columns(path)
    table = read_tables([path], date(2021, 1, 1))
    return Cohort.of_bags(folder, table, {id: ["0"] for id in table.frame.index})


def _read_folds(data: bytes, folder: Path) -> object:
    name = "splits.json" if data[:1] == b"{" else "splits_0.csv"
    return read_splits(_written(data, folder / name))


def _read_config(data: bytes, folder: Path) -> object:
    """Read defaults, and check them as each command does."""
    for name, defaults in read_config(_written(data, folder / "lymphfeat.toml")).items():
        command = cli.get_command(click.Context(cli), name)
        assert command
        for parameter in command.params:
            if parameter.name in defaults:
                parent = click.Context(command, info_name=name, default_map=defaults)
                parameter.handle_parse_result(parent, {}, [])
    return None


# --- stores and bags ------------------------------------------------------------------------------


def _stores() -> list[bytes]:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.h5")
        write_store(path, made_up_cohort((2, 1), age=[1.0, np.nan], site=["a", "b"]))
        return [
            path.read_bytes(),
            (TINY / "format-v1.h5").read_bytes(),
            (TINY / "format-v2.h5").read_bytes(),
        ]


def _read_store(data: bytes, folder: Path) -> object:
    store = FeatureStore.open(_written(data, folder / "store.h5"))
    store.verify()
    assert store.image_statistics is None or len(store.image_statistics) == len(store.image_names)
    assert (store.n_images > 0).all()
    assert len(store.keys) == len(store.labels)
    assert [store.images_seen(name) for name in store.feature_sets]
    return store.describe(), store.splits, store.covariates


def _hdf5(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, own in arrays.items():
            file[name] = own
    return stream.getvalue()


_BAG = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def _bags_of_hdf5() -> list[bytes]:
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        file.create_dataset("feats", data=_BAG, chunks=(2, 3), compression="gzip", shuffle=True)
    return [_hdf5(features=_BAG[None], coords=np.zeros((4, 2), int)), packed.getvalue()]


def _bags_of_anndata() -> list[bytes]:
    patients = np.array([b"P1", b"P1", b"P2", b"P3"], object)
    texts, found = h5py.string_dtype(), []
    for categorical in (True, False):
        stream = io.BytesIO()
        with h5py.File(stream, "w") as file:
            file["X"] = _BAG
            if categorical:
                file["obs/patient/codes"] = np.array([0, 0, 1, 2], np.int8)
                file.create_dataset("obs/patient/categories", data=patients[1:], dtype=texts)
            else:
                file.create_dataset("obs/patient/values", data=patients, dtype=texts)
                file["obs/patient/mask"] = np.zeros(4, bool)
        found.append(stream.getvalue())
    return found


def _bags_of_torch() -> list[bytes]:
    found = []
    for content, new in (
        (torch.from_numpy(_BAG), True),
        ({"features": torch.from_numpy(_BAG), "coords": torch.zeros(4, 2)}, True),
        (torch.from_numpy(_BAG), False),
    ):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=new)
        found.append(stream.getvalue())
    return found


def _numpy(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()


def _read_bag(suffix: str) -> Callable[[bytes, Path], object]:
    return lambda data, folder: read_maps(_written(data, folder / f"P1{suffix}"))


def _read_anndata(data: bytes, folder: Path) -> object:
    path = _written(data, folder / "bags.h5ad")
    return [read_maps(path, rows).shape for rows in read_patients(path, "patient").values()]


# --- weights and models ---------------------------------------------------------------------------


def _weights() -> list[bytes]:
    tensors = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}
    facts = {"provenance": {"labels": [{"id": "P1", "images": "00 11"}], "images": []}, "seed": 1}
    found = [safetensors.torch.save(tensors, {"lymphfeat": json.dumps(facts)})]
    for content in (tensors, {"teacher": {f"module.{name}": own for name, own in tensors.items()}}):
        stream = io.BytesIO()
        torch.save(content, stream)
        found.append(stream.getvalue())
    return found


def _read_weights(data: bytes, folder: Path) -> object:
    name = "a.pth" if data[:2] == b"PK" else "a.safetensors"
    path = _written(data, folder / name)
    return read_weights(path), read_provenance(path)


@cache
def _final_models() -> list[bytes]:
    facts = TrainingFacts(trained_on=("P1", "P2"))
    source = ImportedSource(backbone_name="b", weights_sha256="", shape=(3, 1, 1))
    judged = HeldOut(
        scheme="refit", logits=np.array([0.5, -0.5]), labels=np.array([1, 0]),
        member=np.zeros(2, np.int64), ids=("P1", "P2"),
    )  # fmt: skip
    found = []
    for aggs in (("topk",), ("mean", "attention")):
        members = tuple(
            Member(
                heads=(empty_head(HeadSettings(agg=agg, width=2), 3),),
                decision=Decision(),
                image_decision=Decision(),
            )
            for agg in aggs
        )
        model = FinalModel(
            row="row", sources=(source,), members=members,
            attributes=AttributeRecipe((Attribute(name="age", low=1, high=2),)),
            facts=facts, held_out={"images": judged},
        )  # fmt: skip
        found.append(_joined(model, FINAL_FILE, "final.safetensors"))
    return found


@cache
def _models() -> list[bytes]:
    recipe = ModelRecipe.of(BACKBONE)
    backbone = recipe.make_backbone()
    head = empty_head(HeadSettings(agg="mean"), backbone.channels)
    model = Model(backbone, head, recipe=recipe, facts=TrainingFacts(trained_on=("P1",)))
    return [_joined(model, FACTS_FILE, WEIGHTS_FILE)]


def _joined(model: FinalModel | Model, facts: str, tensors: str) -> bytes:
    with TemporaryDirectory() as folder:
        model.save(folder)
        return BETWEEN.join(Path(folder, name).read_bytes() for name in (facts, tensors))


def _read_model(facts: str, tensors: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        parts = data.split(BETWEEN, 1)
        _written(parts[0], folder / facts)
        _written(parts[-1], folder / tensors)
        return inspect(folder)

    return read


def in_part(mutations: Sequence[Mutation], number: int) -> Mutation:
    """Spoil one of a model's two files."""

    def spoiled(data: bytes, rng: random.Random) -> bytes:
        parts = data.split(BETWEEN, 1)
        if number < len(parts):
            parts[number] = rng.choice(mutations)(parts[number], rng)
        return BETWEEN.join(parts)

    return spoiled


_JSON_TOKENS = tuple(text.encode() for text in _RAW if len(text) < 6000)
_CSV_TOKENS = tuple(text.encode() for text in _CELLS)
_TOML_TOKENS = (
    *(b"[", b"]", b"[[", b"=", b'"', b"'''", b"\n", b"\\", b"{", b"}", b"nan", b"-inf", b"1e999"),
    *(
        b"true",
        b"1979-05-27T07:32:00Z",
        b"25:61:61",
        b"9" * 5000,
        b"[" * 3000,
        b"{a=" * 2000,
        b"\xff",
    ),
    *(
        b"[1, 2]",
        b'["a"]',
        b"{a = 1}",
        b"-1",
        b"0.5",
        b'""',
        b"[predict]",
        b"config = 1",
        b"out = []",
    ),
    *(b"agg = 1", b"seeds = {}", b"help = true", b"crop = 1e400", b"0x7fffffffffffffffff"),
)
_TENSORS = (*BYTES, _in_header)
TARGETS = {
    target.name: target
    for target in (
        Target(name="table", valid=lambda: [_TABLE, b"id,label\nP1,1\nP2,0\n"], read=_read_table,
               mutations=(*BYTES, *(respell,) * 8, insert(_CSV_TOKENS))),
        Target(name="folds", valid=lambda: [*_FOLDS, _SPLITS], read=_read_folds,
               mutations=(*BYTES, *(respell,) * 4, *(rewrite,) * 4, insert(_CSV_TOKENS))),
        Target(name="config", valid=lambda: [_CONFIG], read=_read_config,
               mutations=(*BYTES, *(insert(_TOML_TOKENS),) * 3, *(reset,) * 9)),
        Target(name="store", valid=_stores, read=_read_store, mutations=(*BYTES, rebuild, rebuild)),
        Target(name="h5", valid=_bags_of_hdf5, read=_read_bag(".h5"),
               mutations=(*BYTES, rebuild, rebuild)),
        Target(name="h5ad", valid=_bags_of_anndata, read=_read_anndata,
               mutations=(*BYTES, rebuild, rebuild)),
        Target(name="pt", valid=_bags_of_torch, read=_read_bag(".pt"),
               mutations=(*BYTES, *(repack,) * 6)),
        Target(name="npy",
               valid=lambda: [_numpy(np.save, own) for own in (_BAG, _BAG.astype(">f8"))],
               read=_read_bag(".npy"), mutations=(*BYTES, *(_in_header,) * 3)),
        Target(name="npz", valid=lambda: [_numpy(np.savez, features=_BAG, label=np.array(1)),
                                          _numpy(np.savez_compressed, feats=_BAG)],
               read=_read_bag(".npz"), mutations=(*BYTES, *(repack,) * 6)),
        Target(name="weights", valid=_weights, read=_read_weights,
               mutations=(*BYTES, *(repack,) * 3, *(_in_header,) * 2, insert(_JSON_TOKENS))),
        Target(name="model", valid=_final_models, read=_read_model(FINAL_FILE, "final.safetensors"),
               mutations=(*(in_part((*BYTES, *(rewrite,) * 12, insert(_JSON_TOKENS)), 0),) * 3,
                          in_part(_TENSORS, 1))),
        Target(name="network", valid=_models, read=_read_model(FACTS_FILE, WEIGHTS_FILE),
               mutations=(*(in_part((*BYTES, *(rewrite,) * 12, insert(_JSON_TOKENS)), 0),) * 3,
                          in_part(_TENSORS, 1))),
    )
}  # fmt: skip


def refusal(target: Target, data: bytes, folder: Path) -> str | None:
    """Read an input; return the words in which it was refused, or None if it was accepted."""
    try:
        target.read(data, folder)
    except click.ClickException as error:
        return error.format_message()
    except LymphfeatError as error:
        return str(error)
    return None


def spoil(target: Target, valid: Sequence[bytes], rng: random.Random) -> bytes:
    """Make an input: a valid one, changed one to three times."""
    data = rng.choice(valid)
    for step in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(target.mutations)
        if step and mutation is rebuild:  # libhdf5 may crash where it writes to what is spoilt
            mutation = flip
        try:
            data = mutation(data, rng)
        except (NameError, AttributeError):  # mistakes of ours
            raise
        except Exception:  # spoilt beyond what a mutation can read
            data = flip(data, rng)
    return data
