"""Extraction: JPEGs on disk -> store, beside a plain loop and what no loop can avoid."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import lymphfeat as lf
from benchmarks.bench.inputs import bag_sizes, dealt_out
from benchmarks.bench.measure import LIMIT, OURS, Bench, in_turn, nothing_hashed, seconds_of
from benchmarks.bench.results import Goal, Line
from lymphfeat.cohort.images import find_normalization
from lymphfeat.runtime.devices import choose_precision, has_fast_bfloat16
from lymphfeat.settings import BackboneSettings, ExtractSettings, Precision

CROP, BATCH = 112, 64
COMPILED = "compiled by inductor"
PLAIN = "timm + DataLoader + h5py"
GOALS = (
    Goal(text="≥ .9 × the limit", at_least=0.9),
    Goal(text=f"≥ 1.5 × {PLAIN}", at_least=1.5, against=PLAIN),
)
Forward = Callable[[Tensor], Tensor]


def measure(bench: Bench) -> list[Line]:
    return [_line(bench, precision) for precision in precisions()]


def precisions() -> tuple[Precision, ...]:
    """Name the precisions that this processor computes in hardware."""
    native = has_fast_bfloat16(torch.device("cpu"))
    return ("float32", "bfloat16") if native else ("float32",)


def _line(bench: Bench, precision: Precision) -> Line:
    cohort = lf.Cohort.load(dealt_out(bench, bag_sizes(bench.size(50, 4), bench.size(4000, 20))))
    paths = [path for own in cohort.images for path in own]
    dtype = choose_precision(precision, torch.device("cpu"))
    best = find_best_pass(bench, dtype)

    def ours() -> float:
        with nothing_hashed(bench):
            return len(paths) / seconds_of(lambda: _extract(bench, cohort, precision))

    def plain() -> float:
        out = bench.new("plain.h5")
        seconds = seconds_of(lambda: extract_plainly(bench, paths, dtype, out))
        out.unlink()
        return len(paths) / seconds

    def limit() -> float:
        passing = best.core_seconds(batches=bench.size(10, 1))
        return bench.threads / (passing + decoding_seconds(paths))

    return Line(
        name=f"extraction, {precision}",
        unit="images/s",
        samples=in_turn(bench, {OURS: ours, PLAIN: plain, LIMIT: limit}),
        goals=GOALS,
        note=f"{len(paths):,} JPEGs of 224 px, ResNet-18, crop {CROP}, batches of {BATCH}, random "
        f"weights; workers of the DataLoader: {bench.threads}. Best bare pass: {best.name}.",
    )


def _extract(bench: Bench, cohort: lf.Cohort, precision: Precision) -> None:
    settings = ExtractSettings(
        backbone=BackboneSettings(backbone="resnet18", weights="none", crop=CROP),
        batch_size=BATCH,
        precision=precision,
        device="cpu",
        threads=bench.threads,
    )
    out = bench.new("store.h5")
    lf.extract(cohort, out, settings)
    out.unlink()


# --- what one would write -------------------------------------------------------------------------


def resnet18() -> Any:
    """Make timm's ResNet-18 with random weights and no classifier, in eval mode."""
    return timm.create_model("resnet18", pretrained=False, num_classes=0).eval()


class Photographs(Dataset[Tensor]):
    """Normalised centre crops (3, 112, 112)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        constants = find_normalization("imagenet")
        self._paths = paths
        self._transform = transforms.Compose(
            [
                transforms.CenterCrop(CROP),
                transforms.ToTensor(),
                transforms.Normalize(constants.mean, constants.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self._paths[number]) as image:
            tensor: Tensor = self._transform(image.convert("RGB"))
        return tensor


@torch.inference_mode()
def extract_plainly(bench: Bench, paths: Sequence[Path], dtype: torch.dtype, out: Path) -> None:
    """Write the maps of all images to an HDF5 file in float16, batch after batch."""
    model = resnet18()
    loader = DataLoader(Photographs(paths), batch_size=BATCH, num_workers=bench.threads)
    with h5py.File(out, "w") as file:
        features = file.create_dataset("features", (len(paths), 512, 4, 4), "float16")
        row = 0
        for images in loader:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                maps = model.forward_features(images)  # (n, 512, 4, 4)
            features[row : row + len(maps)] = maps.float().numpy()
            row += len(maps)


# --- what cannot be avoided -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A way to run the bare backbone: one batch on all cores, or one on each."""

    name: str
    forward: Forward
    threads: int
    side_by_side: bool

    def core_seconds(self, batches: int) -> float:
        """Return how long an image occupies one core, of batches that are ready."""
        each = 1 if self.side_by_side else self.threads  # cores of a batch
        with ThreadPoolExecutor(self.threads // each) as pool:
            cores = range(self.threads // each)
            list(pool.map(lambda _: self._run(each, 1), cores))  # warms up
            seconds = seconds_of(lambda: list(pool.map(lambda _: self._run(each, batches), cores)))
        torch.set_num_threads(self.threads)
        return seconds * each / (batches * BATCH)

    @torch.inference_mode()
    def _run(self, threads: int, batches: int) -> None:
        torch.set_num_threads(threads)
        images = torch.randn(BATCH, 3, CROP, CROP).contiguous(memory_format=torch.channels_last)
        for _ in range(batches):
            self.forward(images)


def find_best_pass(bench: Bench, dtype: torch.dtype) -> Pass:
    """Try the ways to run the bare backbone that torch offers; return the fastest.

    The compiler may be missing, or fail: then what torch has without it is the best. What it
    compiles is for all cores.
    """
    ways = _ways(dtype, compiled=bool(shutil.which("g++")) and not bench.quick)
    passes = [
        Pass(f"{name}, {'one batch per core' if each else 'all cores'}", way, bench.threads, each)
        for name, way in ways.items()
        for each in ((False,) if COMPILED in name else (False, True))
    ]
    times: dict[float, Pass] = {}
    for one in passes:
        with suppress(TorchDynamoException):
            times[one.core_seconds(bench.size(10, 1))] = one
    return times[min(times)]


def _ways(dtype: torch.dtype, *, compiled: bool) -> Mapping[str, Forward]:
    model = resnet18().to(memory_format=torch.channels_last)
    folded = fold_batchnorm(model)
    plain, lower = model.forward_features, folded.to(dtype).forward_features

    def cast(images: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            maps: Tensor = plain(images)
        return maps

    def bare(images: Tensor) -> Tensor:
        maps: Tensor = lower(images.to(dtype))
        return maps

    ways: dict[str, Forward] = {"channels last": cast, "batch-norm folded": bare}
    if compiled:
        frozen: Forward = torch.compile(lower, options={"freezing": True})
        ways[f"batch-norm folded, {COMPILED}"] = lambda images: frozen(images.to(dtype))
    return ways


def fold_batchnorm(model: Any) -> Any:
    """Return a copy of a network in eval mode, every batch-norm in the convolution before it."""
    copied = resnet18()
    copied.load_state_dict(model.state_dict())
    for parent in copied.modules():
        before: tuple[str, nn.Module] | None = None
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.BatchNorm2d) and before and isinstance(before[1], nn.Conv2d):
                setattr(parent, before[0], fuse_conv_bn_eval(before[1], part))
                setattr(parent, name, nn.Identity())
            before = name, part
    return copied.to(memory_format=torch.channels_last)


def decoding_seconds(paths: Sequence[Path], most: int = 300) -> float:
    """Return the seconds of one core for decoding an image and cutting out its centre."""

    def decode() -> None:
        for path in paths[:most]:
            with Image.open(path) as image:
                left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
                image.convert("RGB").crop((left, top, left + CROP, top + CROP))

    return seconds_of(decode) / len(paths[:most])
