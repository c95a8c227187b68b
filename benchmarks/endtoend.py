"""End-to-end training: memory of large patients, and a whole cohort of the challenge's size.

    python benchmarks/endtoend.py memory                # a patient of 512 and one of 5,000 images
    python benchmarks/endtoend.py challenge --epochs 40 # 163 patients, 13,453 images (wants a GPU)

Images are random bytes. `make bench` compares a step with a plain loop and with the bare backbone.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import numpy as np
import torch

from lymphfeat.cohort.images import find_normalization
from lymphfeat.features.backbones import build_backbone
from lymphfeat.finetuning.encoder import Encoder
from lymphfeat.finetuning.fine_tuners import FINE_TUNERS, FineTuner
from lymphfeat.finetuning.pixels import PixelCache, Roster
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.registry import AGGREGATORS
from lymphfeat.heads.stack import HeadStack, initial_scorer
from lymphfeat.runtime.devices import choose_device, choose_precision, peak_memory
from lymphfeat.settings import BackboneSettings, EndToEndSettings, Gradient, HeadSettings

CROP = 112
CHALLENGE = (163, 13_453)  # labelled patients, their images


@dataclass(frozen=True)
class Machine:
    """Where to compute, and in which precision."""

    device: torch.device
    dtype: torch.dtype

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_fine_tuner(sizes: list[int], settings: EndToEndSettings, machine: Machine) -> FineTuner:
    """Make a fine-tuner on patients of this many random images each."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(sizes), 3, CROP, CROP)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    cache = PixelCache(pixels, find_normalization("imagenet"), machine.device)
    backbone, _ = build_backbone(
        settings.backbone.backbone, weights="none", image_size=settings.backbone.crop
    )
    backbone.to(machine.device).to(memory_format=torch.channels_last)
    weight, bias = initial_scorer(backbone.channels, generator)
    head = resolve(settings.head)
    roster = Roster(
        starts=torch.tensor([0, *np.cumsum(sizes)[:-1].tolist()]),
        sizes=torch.tensor(sizes),
        labels=(torch.arange(len(sizes)) % 2).float(),
    )
    stack = HeadStack([head], weight[None], bias[None]).to(machine.device)
    encoder = Encoder(backbone, cache, unit=head.unit, dtype=machine.dtype)
    make = FINE_TUNERS[AGGREGATORS[head.agg].family]
    return make(encoder, stack, roster, settings, generator)


def seconds_of(work: Callable[[], object], machine: Machine) -> float:
    """Return how long some work takes."""
    machine.wait()
    start = time.perf_counter()
    work()
    machine.wait()
    return time.perf_counter() - start


@click.group()
def cli() -> None:
    """Measure end-to-end training."""


def machine_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every measurement has."""
    for option in (
        click.option("--backbone", default="resnet18", show_default=True),
        click.option("--device", default="auto", show_default=True),
        click.option("--precision", default="auto", show_default=True),
        click.option("--threads", type=int, default=torch.get_num_threads(), show_default=True),
    ):
        function = option(function)
    return function


def _machine(device: str, precision: str, threads: int) -> Machine:
    torch.set_num_threads(threads)
    chosen = choose_device(device)
    return Machine(device=chosen, dtype=choose_precision(precision, chosen))


@cli.command()
@click.option("--images", default="512,5000", show_default=True, help="Of the patient, in turn.")
@click.option("--gradient", default="subset", show_default=True)
def memory(images: str, gradient: str) -> None:
    """Train one step on a patient of many images, each in a process of its own."""
    for count in images.split(","):
        subprocess.run([sys.executable, __file__, "one", count, gradient], check=True)


@cli.command(hidden=True)
@click.argument("images", type=int)
@click.argument("gradient")
def one(images: int, gradient: Gradient) -> None:
    """Train one step on one patient, and one of a single image."""
    machine = _machine("auto", "auto", torch.get_num_threads())
    settings = EndToEndSettings(
        backbone=BackboneSettings(weights="none", crop=CROP),
        head=HeadSettings(agg="bnsigmoid", lr=1e-4),
        batch_size=2,
        gradient=gradient,
    )
    tuner = make_fine_tuner([images, 1], settings, machine)
    before = peak_memory(machine.device)
    taken = seconds_of(tuner.run_epoch, machine)
    peak, crops = peak_memory(machine.device), images * 3 * CROP * CROP
    print(
        f"{images:6d} images, {gradient}: {taken:6.1f} s, peak {peak / 1e9:.2f} GB, "
        f"{before / 1e9:.2f} GB before; {crops / 1e9:.2f} GB of it are crops",
        flush=True,
    )


@cli.command()
@machine_options
@click.option("--epochs", default=40, show_default=True)
def challenge(backbone: str, device: str, precision: str, threads: int, epochs: int) -> None:
    """Train on a random cohort of the challenge's size, with the default settings."""
    machine = _machine(device, precision, threads)
    patients, images = CHALLENGE
    sizes = np.full(patients, images // patients)
    sizes[: images - sizes.sum()] += 1
    settings = EndToEndSettings(
        backbone=BackboneSettings(backbone=backbone, weights="none", crop=CROP)
    )
    tuner = make_fine_tuner(sizes.tolist(), settings, machine)
    tuner.run_epoch()
    seen = 0

    def train() -> None:
        nonlocal seen
        for _ in range(epochs):
            seen += tuner.run_epoch().images

    taken = seconds_of(train, machine)
    host = peak_memory(torch.device("cpu")) / 1e9
    print(
        f"{backbone}, {epochs} epochs: {taken:.1f} s, {seen / taken:.0f} images/s, peak "
        f"{peak_memory(machine.device) / 1e9:.1f} GB on {machine.device}, {host:.1f} GB of the host"
    )


if __name__ == "__main__":
    cli()
