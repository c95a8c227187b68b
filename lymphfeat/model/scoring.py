"""Scoring images with a frozen backbone and head, and reading out patients."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_checks import check_images
from lymphfeat.cohort.image_statistics import NAMES
from lymphfeat.cohort.images import Crop, Normalization, crop_decoder, find_normalization
from lymphfeat.cohort.stains import stain_normaliser
from lymphfeat.errors import ModelError
from lymphfeat.features.backbones import Backbone, make_backbone, ready_to_run
from lymphfeat.features.pipeline import PIECE, encode_files
from lymphfeat.features.views import flip_view, normalize
from lymphfeat.heads.head import Head
from lymphfeat.runtime.devices import autocast, choose_device, choose_precision
from lymphfeat.runtime.progress import Progress, RateMeter
from lymphfeat.settings import (
    AS_IT_IS,
    BackboneSettings,
    MapLayout,
    PredictSettings,
    StainNormalization,
    crop_of,
)

Show = Callable[[Sequence[NDArray[np.uint8]]], object]  # images (3, crop, crop), in order


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """How an image file becomes the input of the backbone, and which backbone that is."""

    backbone: str  # a timm name
    output_stride: int | None
    crop: int  # pixels, about the image's centre
    normalization: Normalization
    layout: MapLayout = AS_IT_IS
    field_um: float | None = None  # side of the crop in µm, where the pixels' size was known
    stain_normalization: StainNormalization = "none"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelRecipe":
        """Read what `dataclasses.asdict` makes of a recipe, from JSON, or from a store's recipe."""
        constants = content["normalization"]
        normalization = Normalization(
            name=constants["name"], mean=tuple(constants["mean"]), std=tuple(constants["std"])
        )
        sides = {name: content[name] for name in ("backbone", "output_stride", "crop")}
        layout = content.get("layout", {})
        BackboneSettings(**sides, **layout)  # refuses values out of their range
        return cls(
            **sides,
            normalization=normalization,
            layout=MapLayout(**layout),
            field_um=content.get("field_um"),
            stain_normalization=content.get("stain_normalization", "none"),
        )

    @classmethod
    def of(cls, settings: BackboneSettings) -> "ModelRecipe":
        """Return the recipe of settings."""
        return cls(
            backbone=settings.backbone,
            output_stride=settings.output_stride,
            crop=settings.crop,
            normalization=find_normalization(settings.normalization),
            layout=settings.layout,
            field_um=settings.field_um,
            stain_normalization=settings.stain_normalization,
        )

    def make_backbone(self) -> Backbone:
        """Make the backbone, its weights random."""
        return make_backbone(
            self.backbone,
            image_size=self.crop,
            output_stride=self.output_stride,
            layout=self.layout,
        )

    def at_scale(self, um_per_px: float | None) -> "ModelRecipe":
        """Return the recipe for pictures of another scale; None is that of the training pictures.

        Raises ModelError for a model whose crop is not in µm.
        """
        if um_per_px is None:
            return self
        if self.field_um is None:
            raise ModelError(
                f"um_per_px (={um_per_px:g}) must go with a model whose crop is in µm; this one's "
                f"is {self.crop} pixels. Leave it out, or train with --field-um."
            )
        return replace(self, crop=crop_of(self.field_um, um_per_px))


def instances_of(maps: Tensor, unit: str) -> Tensor:
    """Lay feature maps (n, C, h, w) out as instances (n, U, C): an image's pixels, or its mean."""
    return maps.flatten(2).mT if unit == "pixel" else maps.mean((2, 3))[:, None]


class CohortScorer:
    """Scores the images of cohorts, batch after batch, with a frozen model."""

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        recipe: ModelRecipe,
        settings: PredictSettings,
        *,
        views: Sequence[str],
        unit: str | None = None,
        measured: bool = False,
        show: Show | None = None,
    ) -> None:
        """Take the unit to score; None uses the head's. `views` are used whatever the settings.

        With `measured` there are `statistics` of the images scored. `show` is given the pixels of
        all images, in order, so that nobody has to decode them again.
        """
        device = choose_device(settings.device)
        self._head = copy.deepcopy(head).eval().to(device)
        self._recipe = recipe.at_scale(settings.um_per_px)
        self._unit = head.settings[0].unit if unit is None else unit
        self._views, self._device, self._batch_size = views, device, settings.batch_size
        self._dtype = choose_precision(settings.precision, device)
        self._backbone = ready_to_run(copy.deepcopy(backbone), self._dtype, device)
        self._measured, self._show = measured, show
        self._statistics: list[NDArray[np.float32]] = []

    @property
    def statistics(self) -> pd.DataFrame | None:
        """The image statistics of all images scored, (N, S); None if they were not asked for."""
        if not self._measured:
            return None
        return pd.DataFrame(np.stack(self._statistics), columns=list(NAMES))

    def score(self, cohort: Cohort, progress: Progress) -> Tensor:
        """Return what the head keeps of all images in every view: (V, N, U, D) on the CPU."""
        paths = [path for images in cohort.images for path in images]
        return _finite(torch.cat(list(self._score_batches(cohort, progress)), dim=1), paths)

    def score_patients(self, cohort: Cohort, progress: Progress) -> Iterator[Tensor]:
        """Yield the same of one patient after another, without holding the others: (V, n, U, D)."""
        batches = self._score_batches(cohort, progress)
        held = next(batches)
        for paths in cohort.images:
            while held.shape[1] < len(paths):
                held = torch.cat([held, next(batches)], dim=1)
            yield _finite(held[:, : len(paths)], paths)
            held = held[:, len(paths) :]

    def _score_batches(self, cohort: Cohort, progress: Progress) -> Iterator[Tensor]:
        paths, recipe = [path for images in cohort.images for path in images], self._recipe
        # On a CPU, small ones: a single patient's images are for all cores.
        size = min(self._batch_size, PIECE) if self._device.type == "cpu" else self._batch_size
        check_images(paths, recipe.crop)
        meter = RateMeter(progress, len(paths))
        normalise = stain_normaliser(recipe.stain_normalization, cohort.images, recipe.crop)
        scored = encode_files(
            [paths[start : start + size] for start in range(0, len(paths), size)],
            crop_decoder(recipe.crop, measured=self._measured, normalise=normalise),
            self._score_crops,
            device=self._device,
            threads=torch.get_num_threads(),
        )
        for scores, crops in scored:
            if self._show is not None:
                self._show([crop.original for crop in crops])
            self._statistics += [c.statistics for c in crops if c.statistics is not None]
            yield scores
            meter.add(scores.shape[1])

    @torch.inference_mode()
    def _score_crops(self, crops: Sequence[Crop]) -> tuple[Tensor, Sequence[Crop]]:
        """Return what the head keeps of crops, (V, n, U, D), and the crops."""
        return self._score_batch(np.stack([crop.pixels for crop in crops])), crops

    def _score_batch(self, pixels: NDArray[np.uint8]) -> Tensor:
        images = normalize(torch.from_numpy(pixels).to(self._device), self._recipe.normalization)
        images = images.contiguous(memory_format=torch.channels_last)  # (n, 3, H, W)
        return torch.stack([self._score_view(flip_view(images, view)) for view in self._views])

    def _score_view(self, images: Tensor) -> Tensor:
        with autocast(self._device, self._dtype):
            maps = self._backbone(images)  # (n, C, h, w)
        instances = instances_of(maps.float(), self._unit)  # (n, U, C)
        return self._head.keep(instances).cpu()  # (n, U, D)


def _finite(kept: Tensor, paths: Sequence[Path]) -> Tensor:
    bad = (~kept.isfinite()).flatten(2).any(2).any(0).nonzero()
    if len(bad):
        raise ModelError(
            f"{paths[int(bad[0])]}: the model's score must be a finite number; got NaN or "
            f"infinity for {len(bad)} images. Training has diverged: train again with a smaller "
            "--lr."
        )
    return kept
