"""Extraction: a store holds what a slow, obvious loop computes."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lymphfeat import extraction
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_checks import leave_out_unusable
from lymphfeat.cohort.image_statistics import NAMES, measure_image
from lymphfeat.cohort.images import NORMALIZATIONS, check_image, decode_crop
from lymphfeat.errors import CohortError, SettingsError, StoreError
from lymphfeat.extraction import extract
from lymphfeat.features.backbones import Backbone, build_backbone
from lymphfeat.features.map_encoder import MapEncoder
from lymphfeat.features.pipeline import encode_files
from lymphfeat.features.store import FeatureStore
from lymphfeat.features.store_writer import StoreWriter
from lymphfeat.features.views import normalize
from lymphfeat.settings import BackboneSettings, ExtractSettings, Precision
from tests.cohorts import damage_late, write_bags, write_image, write_own
from tests.rounding import MORE_THAN_FLOAT32, bfloat16_tolerance

SIDE, CROP = 53, 48
BAGS = {"P1": 3, "P2": 1, "P10": 5}
SETTINGS = ExtractSettings(
    backbone=BackboneSettings(backbone="test_resnet", crop=CROP, normalization="challenge"),
    precision="float32",
    batch_size=4,
    device="cpu",
    threads=1,
)


def write_cells(root: Path) -> Path:
    """Write three patients with nine images."""
    write_own(root, "id,label,age", "P10,,40", "P2,1,", "P1,0,70", bags={})
    write_bags(root, BAGS, side=SIDE)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "cells")


@pytest.fixture
def cohort(root: Path) -> Cohort:
    return Cohort.load(root)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the first rows of the blocks that are written."""
    starts: list[int] = []
    write = StoreWriter.write

    def note(self: StoreWriter, start: int, *rest: Any) -> None:
        starts.append(start)
        write(self, start, *rest)

    monkeypatch.setattr(StoreWriter, "write", note)
    return starts


def interrupt(done: int, total: int, text: str = "") -> None:
    """Press Ctrl-C after two of three blocks."""
    if done == 8:
        raise KeyboardInterrupt


def interrupt_early(done: int, total: int, text: str = "") -> None:
    """Press Ctrl-C after the first image."""
    if done == 1:
        raise KeyboardInterrupt


FLIPS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "identity": lambda image: image,
    "hflip": ImageOps.mirror,
    "vflip": ImageOps.flip,
    "both": lambda image: ImageOps.flip(ImageOps.mirror(image)),
}


@torch.inference_mode()
def slow_map(backbone: Backbone, path: Path, view: str) -> Any:
    """Return one image's map: PIL crops and flips, numpy normalises, the model sees it alone."""
    margin = (SIDE - CROP) // 2
    with Image.open(path) as opened:
        image = opened.crop((margin, margin, margin + CROP, margin + CROP))
    constants = NORMALIZATIONS["challenge"]
    pixels = np.asarray(FLIPS[view](image)) / 255  # (H, W, 3)
    normalised = (pixels - np.array(constants.mean)) / np.array(constants.std)
    batch = torch.from_numpy(normalised.transpose(2, 0, 1)[None]).float()
    return backbone(batch)[0].numpy()  # (C, h, w)


def test_equals_one_image_at_a_time(cohort: Cohort, tmp_path: Path) -> None:
    store = extract(cohort, tmp_path / "s.h5", replace(SETTINGS, views=4))
    store.verify()
    backbone, _ = build_backbone("test_resnet", image_size=CROP)
    assert store.features().shape == (9, 4, 96, 2, 2)
    row = 0
    for id, paths in zip(cohort.ids, cohort.images, strict=True):
        assert store.offsets[store.ids.index(id)] == row
        for path in paths:
            for number, view in enumerate(FLIPS):
                expected = slow_map(backbone, path, view)
                spacing = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float32)
                wrong = np.abs(store.features()[row, number] - expected)
                assert (wrong <= spacing + 1e-5).all(), (path, view)
            row += 1
    assert store.ids == ("P1", "P2", "P10")
    assert store.submission_ids == ("P10",)
    for n in range(1, 4):  # a flipped input is another input
        assert not np.array_equal(store.features()[:, 0], store.features()[:, n])


@pytest.mark.seconds
def test_bfloat16_is_as_near_as_its_roundings_allow(cohort: Cohort, tmp_path: Path) -> None:
    exact = extract(cohort, tmp_path / "a.h5", SETTINGS)
    rough = extract(cohort, tmp_path / "b.h5", replace(SETTINGS, precision="bfloat16"))
    backbone, _ = build_backbone("test_resnet", image_size=CROP)
    backbone.eval()
    # Either store rounds its maps to float16 once more, by at most 2^-11 of a value (to 2^-25 the
    # tiniest ones).
    stored = 2.0**-11 * exact.features()[:, 0].astype(float) + 2.0**-25  # (N, C, h, w), none < 0
    moved = np.abs(rough.pooled()[:, 0] - exact.pooled()[:, 0])  # (N, C)
    tolerance = 2 * stored.mean((2, 3))
    paths = [path for paths in cohort.images for path in paths]
    for row, path in enumerate(paths):
        pixels = torch.from_numpy(decode_crop(path, CROP).pixels)[None]
        tolerance[row] += bfloat16_tolerance(
            backbone,
            normalize(pixels, NORMALIZATIONS["challenge"]),
            backbone.parameters(),
            lambda maps: maps.mean((2, 3))[0],
        )
    assert (moved <= tolerance).all()
    assert moved.max() > MORE_THAN_FLOAT32 * tolerance.max()


def test_auto_is_a_precision_and_says_which(
    auto_precision: Precision, cohort: Cohort, tmp_path: Path
) -> None:
    named = extract(cohort, tmp_path / "a.h5", replace(SETTINGS, precision=auto_precision))
    auto = extract(cohort, tmp_path / "b.h5", replace(SETTINGS, precision="auto"))
    assert auto.recipe["precision"] == auto_precision
    assert auto.path.read_bytes() == named.path.read_bytes()


def test_the_recipe_holds_what_decides(cohort: Cohort, tmp_path: Path) -> None:
    recipe = dict(extract(cohort, tmp_path / "s.h5", SETTINGS).recipe)
    assert recipe.pop("cohort")["images"] == 9
    assert recipe.pop("versions")["torch"] == torch.__version__
    assert len(recipe.pop("weights_sha256")) == 64
    assert recipe == {
        "backbone": "test_resnet",
        "output_stride": None,
        "weights": "none",
        "crop": CROP,
        "normalization": {
            "name": "challenge",
            "mean": [0.8183, 0.6977, 0.7034],
            "std": [0.1917, 0.2156, 0.0917],
        },
        "views": ["identity"],
        "precision": "float32",
        "batch_size": 4,
        "device": "cpu",
        "threads": 1,
        "batchnorm": "folded",
    }


def test_progress_ends_at_the_total(cohort: Cohort, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    texts: list[str] = []

    def watch(done: int, total: int, text: str = "") -> None:
        calls.append((done, total))
        texts.append(text)

    extract(cohort, tmp_path / "s.h5", SETTINGS, progress=watch)
    assert calls == [(0, 9), (4, 9), (8, 9), (9, 9)]
    assert texts[-1].endswith("images/s")


def test_threads_are_given_back(cohort: Cohort, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    extract(cohort, tmp_path / "s.h5", SETTINGS)
    assert torch.get_num_threads() == before


def test_an_equal_store_is_left_as_it_is(
    cohort: Cohort, tmp_path: Path, written: list[int]
) -> None:
    out = tmp_path / "deep" / "er" / "s.h5"
    extract(cohort, out, SETTINGS)
    stamp = out.stat().st_mtime_ns
    assert extract(cohort, out, SETTINGS).path == out
    assert out.stat().st_mtime_ns == stamp
    assert written == [0, 4, 8]
    extract(cohort, out, SETTINGS, force=True)
    assert written == [0, 4, 8, 0, 4, 8]
    assert [path.name for path in out.parent.iterdir()] == ["s.h5"]


def test_another_recipe_is_refused_or_forced(cohort: Cohort, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.h5"
    extract(cohort, out, SETTINGS)
    before = out.read_bytes()
    other = replace(SETTINGS, views=2, batch_size=3)
    message = f"{out} already holds a store with a different recipe: "
    message += "views is ['identity'] there, ['identity'"
    with pytest.raises(StoreError, match=re.escape(message)):
        extract(cohort, out, other)
    write_image(root / "P2" / "new.png", 7, SIDE)
    with pytest.raises(StoreError, match=re.escape("cohort.images is 9 there, 10 now")):
        extract(Cohort.load(root), out, SETTINGS)
    assert out.read_bytes() == before
    assert extract(cohort, out, other, force=True).shape.views == 2


def test_a_store_that_differs_in_rounding_alone_is_reused(
    cohort: Cohort, tmp_path: Path, written: list[int]
) -> None:
    out = tmp_path / "s.h5"
    assert extract(cohort, out, SETTINGS).notes == ()
    assert extract(cohort, out, SETTINGS).notes == ()
    with h5py.File(out, "r+") as file:  # as another machine writes it
        recipe = json.loads(file.attrs["recipe"])
        recipe |= {"device": "cuda", "threads": None, "weights": "copy.safetensors"}
        recipe["versions"] |= {"torch": "1.0", "timm": "0.9", "format": 0}
        file.attrs.modify("recipe", json.dumps(recipe))
    before = out.read_bytes()
    store = extract(cohort, out, replace(SETTINGS, batch_size=3))
    assert store.path == out
    assert out.read_bytes() == before
    assert written == [0, 4, 8]
    (note,) = store.notes
    for told in (
        "batch_size is 4 there, 3 now",
        "device is cuda there, cpu now",
        "threads is None there, 1 now",
        "versions.torch is 1.0 there",
        "versions.timm is 0.9 there",
        "weights is copy.safetensors there, none now",
        "--force",
    ):
        assert told in note
    with pytest.raises(StoreError, match=r"different recipe: crop is 48 there, 40 now\. Choose"):
        extract(cohort, out, replace(SETTINGS, backbone=replace(SETTINGS.backbone, crop=40)))
    assert extract(cohort, out, SETTINGS, force=True).notes == ()
    assert FeatureStore.open(out).recipe["device"] == "cpu"


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone", "test_vit"),
        ("output_stride", 8),
        ("weights_sha256", "0" * 64),
        ("crop", 40),
        ("normalization", {"name": "imagenet"}),
        ("views", ["identity", "hflip"]),
        ("precision", "bfloat16"),
        ("cohort", {"patients": 3, "images": 9, "sha256": "0" * 64}),  # of names and sizes
        ("finetune", {"epochs": 3}),
        ("new", 1),
    ],
)
def test_a_store_that_differs_in_more_is_refused(
    cohort: Cohort, tmp_path: Path, key: str, value: Any
) -> None:
    out = tmp_path / "s.h5"
    extract(cohort, out, SETTINGS)
    with h5py.File(out, "r+") as file:
        recipe = json.loads(file.attrs["recipe"]) | {key: value, "threads": 7}
        file.attrs.modify("recipe", json.dumps(recipe))
    with pytest.raises(
        StoreError, match=f"already holds a store with a different recipe: {key}"
    ) as caught:
        extract(cohort, out, SETTINGS)
    assert "threads" not in str(caught.value)


def test_an_unfinished_store_is_finished_by_its_own_recipe_alone(
    cohort: Cohort, tmp_path: Path
) -> None:
    out = tmp_path / "s.h5"
    with pytest.raises(KeyboardInterrupt):
        extract(cohort, out, SETTINGS, progress=interrupt)
    with pytest.raises(StoreError, match=r"an unfinished store .*: batch_size is 4 there, 3 now"):
        extract(cohort, out, replace(SETTINGS, batch_size=3))


@pytest.mark.parametrize(("blocks", "expected"), [(0.5, 1), (3.5, 3), (100, 4)])
def test_no_more_threads_than_there_is_memory_for_their_maps(
    cohort: Cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocks: float,
    expected: int,
) -> None:
    settings, used = replace(SETTINGS, threads=4), []
    shape = extract(cohort, tmp_path / "a.h5", settings).shape
    block = 4 * math.prod(shape.rows(settings.batch_size))  # bytes of float32

    def watched(*arguments: Any, threads: int, **more: Any) -> Any:
        used.append(threads)
        return encode_files(*arguments, threads=threads, **more)

    monkeypatch.setattr(extraction, "encode_files", watched)
    monkeypatch.setattr(extraction, "available_memory", lambda device: int(4 * blocks * block))
    extract(cohort, tmp_path / "b.h5", settings)
    assert used == [expected]


def test_threads_do_not_change_the_maps(cohort: Cohort, tmp_path: Path) -> None:
    one, three = (
        extract(cohort, tmp_path / f"{n}.h5", replace(SETTINGS, batch_size=2, threads=n))
        for n in (1, 3)
    )
    assert np.array_equal(one.features(), three.features())
    assert np.array_equal(one.pooled(), three.pooled())
    assert one.recipe == three.recipe
    assert three.notes == ()


def test_a_forced_store_that_fails_keeps_the_old(
    cohort: Cohort, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.h5"
    extract(cohort, out, SETTINGS)
    before = out.read_bytes()
    (root / "P10" / "000004.png").write_text("no image")
    with pytest.raises(CohortError):
        extract(Cohort.load(root), out, SETTINGS, force=True)
    assert out.read_bytes() == before


def test_the_statistics_are_those_of_the_crops(cohort: Cohort, tmp_path: Path) -> None:
    found = extract(cohort, tmp_path / "s.h5", SETTINGS).image_statistics
    assert found is not None
    paths = [path for images in cohort.images for path in images]
    expected = np.stack([measure_image(decode_crop(path, CROP).pixels) for path in paths])
    assert tuple(found) == NAMES
    assert np.array_equal(found.to_numpy(), expected)


def test_goes_on_after_an_interruption(cohort: Cohort, tmp_path: Path, written: list[int]) -> None:
    extract(cohort, tmp_path / "whole.h5", SETTINGS)
    out = tmp_path / "s.h5"
    with pytest.raises(KeyboardInterrupt):
        extract(cohort, out, SETTINGS, progress=interrupt)
    assert not out.exists()
    written.clear()
    extract(cohort, out, SETTINGS)
    assert written == [8]
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


# --- images that cannot be used ------------------------------------------------------------------


def test_unreadable_images_are_named_before_the_work_begins(
    cohort: Cohort, root: Path, tmp_path: Path, written: list[int]
) -> None:
    for name in ("P10/000004.png", "P2/000000.png"):
        good = (root / name).read_bytes()
        (root / name).write_bytes(good[:100] + bytes(len(good) - 100))
    with pytest.raises(CohortError, match=r"P2.*: cannot be read .* 1 more .*P10.000004.png: can"):
        extract(cohort, tmp_path / "out" / "s.h5", SETTINGS)
    assert written == []
    assert not (tmp_path / "out").exists()


@pytest.fixture
def late(tmp_path: Path) -> Path:
    """Write JPEG cells, of which the ninth is damaged where only decoding it notices."""
    write_own(tmp_path / "late", "id,label", "P1,0", "P2,1", "P10,", bags={})
    write_bags(tmp_path / "late", BAGS, ".jpg", SIDE)
    path = tmp_path / "late" / "P10" / "000004.jpg"
    path.with_suffix(".good").write_bytes(path.read_bytes())
    damage_late(path)
    check_image(path, CROP)
    return path


@pytest.mark.parametrize("then", ["restored", "removed", "left out"])
def test_a_late_damage_costs_no_finished_block(
    late: Path, then: str, tmp_path: Path, written: list[int]
) -> None:
    root, out = late.parents[1], tmp_path / "s.h5"
    with pytest.raises(CohortError, match=r"broken data stream.*--on-error skip.*goes on from"):
        extract(Cohort.load(root), out, SETTINGS)
    assert written == [0, 4]
    cohort = Cohort.load(root)
    if then == "restored":
        late.write_bytes(late.with_suffix(".good").read_bytes())
    elif then == "removed":
        late.unlink()
        cohort = Cohort.load(root)
    else:
        cohort = leave_out_unusable(cohort, CROP)
    store = extract(cohort, out, SETTINGS)
    assert written == ([0, 4, 8] if then == "restored" else [0, 4])
    store.verify()
    assert len(store.image_names) == (9 if then == "restored" else 8)
    assert not list(tmp_path.glob("s.h5.*"))
    again = extract(cohort, tmp_path / "again.h5", SETTINGS)
    assert out.read_bytes() == again.path.read_bytes()


def test_finished_blocks_are_not_taken_over_where_a_patients_images_share_a_stain(
    cohort: Cohort, tmp_path: Path
) -> None:
    backbone = replace(SETTINGS.backbone, stain_normalization="patient")
    settings = replace(SETTINGS, backbone=backbone, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        extract(cohort, tmp_path / "s.h5", settings, progress=interrupt_early)
    left = cohort.without_images({cohort.images[0][2]: "is damaged"})  # the third of the patient
    with pytest.raises(StoreError, match="start over with --force"):
        extract(left, tmp_path / "s.h5", settings)


def test_finished_blocks_of_other_images_are_not_taken_over(
    cohort: Cohort, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.h5"
    with pytest.raises(KeyboardInterrupt):
        extract(cohort, out, SETTINGS, progress=interrupt)
    write_image(root / "P1" / "000000.png", 99, SIDE)
    with pytest.raises(StoreError, match=r"cohort\.sha256 is .* start over with --force"):
        extract(cohort, out, SETTINGS)
    extract(cohort, out, SETTINGS, force=True).verify()
    assert out.read_bytes() == extract(cohort, tmp_path / "t.h5", SETTINGS).path.read_bytes()


def test_images_left_out_are_in_the_recipe(cohort: Cohort, root: Path, tmp_path: Path) -> None:
    (root / "P1" / "000001.png").write_bytes(b"")
    write_image(root / "P10" / "000000.png", 7, CROP - 1)
    usable = leave_out_unusable(cohort, CROP)
    store = extract(usable, tmp_path / "s.h5", SETTINGS)
    assert store.recipe["left_out"] == {"P1": ["P1/000001.png"], "P10": ["P10/000000.png"]}
    assert store.n_images.tolist() == [2, 1, 4]
    for told in ("the file is empty", "size (=47x47) must be", "left out 2 image(s)"):
        assert told in "\n".join(usable.notes)
    assert extract(usable, tmp_path / "s.h5", SETTINGS).notes == ()  # is reused


def test_a_patient_without_a_usable_image_needs_consent(root: Path) -> None:
    (root / "P2" / "000000.png").write_bytes(b"")
    with pytest.raises(CohortError, match=r"without a usable image: P2 \(1 images\).*--allow-mis"):
        leave_out_unusable(Cohort.load(root), CROP)
    usable = leave_out_unusable(Cohort.load(root, allow_missing=True), CROP)
    assert usable.ids == ("P1", "P10")
    assert usable.notes[-1] == "left out 1 patient(s) without a usable image: P2"
    with pytest.raises(CohortError, match="without a usable image: P1"):  # nobody would be left
        leave_out_unusable(Cohort.load(root, allow_missing=True), SIDE + 1)


def test_maps_too_large_for_float16_are_refused(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = MapEncoder.encode
    monkeypatch.setattr(MapEncoder, "encode", lambda self, pixels: encode(self, pixels) * 1e9)
    with pytest.raises(StoreError, match=r"frozen, row 0: magnitude .*--normal") as caught:
        extract(cohort, tmp_path / "s.h5", SETTINGS)
    assert "--precision" not in str(caught.value)  # a store holds float16, whatever computes it
    assert not (tmp_path / "s.h5").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"views": 5}, SettingsError, "views (=5) must lie in [1, 4]"),
        (
            {"precision": "half"},
            SettingsError,
            "precision (=half) must be one of auto, float32, bfloat16",
        ),
        (
            {"backbone": replace(SETTINGS.backbone, crop=54)},
            CohortError,
            "size (=53x53) must be at least the crop (=54)",
        ),
    ],
)
def test_mistakes_write_nothing(
    cohort: Cohort, tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        extract(cohort, tmp_path / "s.h5", replace(SETTINGS, **change))
    assert not (tmp_path / "s.h5").exists()


def test_out_must_not_be_a_folder(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=re.escape(f"out (={tmp_path}) must be a file; got a fol")):
        extract(cohort, tmp_path, SETTINGS, force=True)


def test_text_given_as_store_is_kept(cohort: Cohort, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(StoreError, match="is not a readable HDF5 file"):
        extract(cohort, tmp_path / "notes.txt", SETTINGS)
    assert (tmp_path / "notes.txt").read_text() == "precious"
