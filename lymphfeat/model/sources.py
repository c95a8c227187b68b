"""The backbones of a final model: what its heads keep of images, or of the maps of a store."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import ModelError, StoreError
from lymphfeat.features.backbones import Backbone, weights_sha256
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.heads.head import Head
from lymphfeat.model.scoring import CohortScorer, ModelRecipe, instances_of
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.part_reader import PartReader
from lymphfeat.runtime.progress import Progress
from lymphfeat.runtime.strict_json import json_value
from lymphfeat.settings import HeadSettings, PredictSettings


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What gives the heads of a model the features of images."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """The number of channels of an image's feature map."""

    @property
    @abstractmethod
    def pixels(self) -> int:
        """The number of pixels of an image's feature map."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What holds its tensors."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return all but the tensors, for a model file; see `source_from_json`."""

    @abstractmethod
    def describe_mismatch(self, store: FeatureStore) -> str:
        """Say what of a store's recipe differs from the model's; empty if its maps fit."""

    def keep_maps(
        self, store: FeatureStore, head: Head, views: Sequence[str], batch_size: int
    ) -> Tensor:
        """Return what a head keeps of the maps of a store: (V, N, K)."""
        if store.recipe["views"][: len(views)] != list(views):
            raise StoreError(
                f"{store.path}: must have the maps of the views {', '.join(views)}; it has those "
                f"of {', '.join(store.recipe['views'])}. Extract with --views, or predict without "
                "--tta."
            )
        maps = PartReader(store.features())  # (N, V, C, h, w)
        with torch.inference_mode():
            chunks = [
                _keep_views(head, maps.read(slice(start, start + batch_size), slice(len(views))))
                for start in range(0, len(maps.array), batch_size)
            ]
        kept = torch.cat(chunks, dim=1)
        wrong = (~kept.isfinite()).any(2).any(0).nonzero()
        if len(wrong):
            store.refuse(FROZEN, int(wrong[0]), "features must be finite numbers")
        return kept


@dataclass(frozen=True, kw_only=True)
class BackboneSource(Source):
    """A backbone, and how an image becomes its input."""

    backbone: Backbone
    recipe: ModelRecipe

    @property
    def channels(self) -> int:
        return self.backbone.channels

    @property
    def pixels(self) -> int:
        side = self.recipe.crop
        with torch.inference_mode():
            return math.prod(self.backbone.cpu()(torch.zeros(1, 3, side, side)).shape[2:])

    @property
    def network(self) -> nn.Module:
        return self.backbone.model

    def to_json(self) -> dict[str, Any]:
        return asdict(self.recipe)

    def keep_images(
        self,
        cohort: Cohort,
        head: Head,
        views: Sequence[str],
        settings: PredictSettings,
        progress: Progress,
        *,
        measured: bool,
    ) -> tuple[Tensor, pd.DataFrame | None]:
        """Return what a head keeps of the images of a cohort in every view: (V, N, K).

        Also their image statistics, (N, S), if they are to be `measured`.
        """
        scorer = CohortScorer(
            *(self.backbone, head, self.recipe, settings),
            views=views,
            unit="pixel",
            measured=measured,
        )
        kept = scorer.score(cohort, progress)[:, :, 0]
        self.backbone.to("cpu")
        return kept, scorer.statistics

    def describe_mismatch(self, store: FeatureStore) -> str:
        if store.is_imported:
            return "they were imported, and the model has a backbone of its own"
        mine, theirs = (
            json_value(asdict(each)) for each in (self.recipe, ModelRecipe.from_json(store.recipe))
        )
        if lines := differing_fields(mine, theirs):
            return "; ".join(lines)
        if store.recipe["weights_sha256"] != weights_sha256(self.backbone.model):
            return f"weights {store.recipe['weights']} are not those of the model"
        return ""


@dataclass(frozen=True, kw_only=True)
class ImportedSource(Source):
    """Features that another tool has made: they come from stores alone."""

    backbone_name: str
    weights_sha256: str  # empty where they are not known
    shape: tuple[int, int, int]  # (C, h, w)

    @classmethod
    def of(cls, store: FeatureStore) -> "ImportedSource":
        """Take what is known of the features of an imported store."""
        return cls(
            backbone_name=store.recipe["backbone"],
            weights_sha256=store.recipe["weights_sha256"],
            shape=(store.shape.channels, store.shape.height, store.shape.width),
        )

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def pixels(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def network(self) -> nn.Module:
        return nn.Identity()

    def to_json(self) -> dict[str, Any]:
        return {"imported": asdict(self)}

    def describe_mismatch(self, store: FeatureStore) -> str:
        if not store.is_imported:
            return "the model is of imported features, and these were extracted from images"
        theirs = ImportedSource.of(store)
        return "; ".join(differing_fields(json_value(asdict(self)), json_value(asdict(theirs))))


def source_from_json(content: Mapping[str, Any]) -> Source:
    """Read what `to_json` returned; the tensors of a backbone are blank."""
    if "imported" in content:
        own = content["imported"]
        channels, height, width = own["shape"]
        return ImportedSource(**own | {"shape": (channels, height, width)})
    recipe = ModelRecipe.from_json(content)
    return BackboneSource(backbone=recipe.make_backbone(), recipe=recipe)


def refuse_imported(sources: Sequence[Source]) -> list[BackboneSource]:
    """Return the sources as backbones; raises ModelError if one has none."""
    backbones = [source for source in sources if isinstance(source, BackboneSource)]
    if len(backbones) < len(sources):
        raise ModelError(
            "model must have a backbone to read images; it was made of imported features. Import "
            "the patients' features, too, and use `lymphfeat predict --store`."
        )
    return backbones


def _keep_views(head: Head, maps: NDArray[np.float16]) -> Tensor:
    """Keep of the maps (n, V, C, h, w) of some images: (V, n, K)."""
    views = torch.from_numpy(np.asarray(maps, np.float32)).unbind(1)
    return torch.stack([head.keep(instances_of(view, "pixel"))[:, 0] for view in views])


def check_stores(sources: Sequence[Source], stores: Sequence[FeatureStore]) -> None:
    """Raise StoreError unless stores hold what the sources make of the same images."""
    if len(stores) != len(sources):
        raise StoreError(
            f"store (={', '.join(str(each.path) for each in stores)}) must name a store for each "
            f"of the model's {len(sources)} backbones, in its order."
        )
    for source, store in zip(sources, stores, strict=True):
        if differs := source.describe_mismatch(store):
            raise StoreError(
                f"{store.path}: must hold the maps that this model reads: {differs}. Extract with "
                "the same settings and weights, or read the images: --cohort without --store."
            )
        stores[0].check_same_images(store)


class Kept(Head):
    """What several heads keep of images, side by side in one vector per image."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.settings = heads[0].settings

    def keep(self, instances: Tensor) -> Tensor:
        """Return what the heads keep of the pixels (n, U, C) of images: (n, 1, K)."""
        return torch.cat([kept.flatten(1) for kept in self._each(instances)], dim=1)[:, None]

    def _each(self, pixels: Tensor) -> Iterator[Tensor]:
        pooled = pixels.mean(1, keepdim=True)  # (n, 1, C)
        for head in self.heads:
            assert isinstance(head, Head)
            yield head.keep(pixels if _reads_pixels(head) else pooled)

    def split(self, kept: Tensor, pixels: int, channels: int) -> list[Tensor]:
        """Return what each head kept, (N, U, D), of images of so many pixels: from (N, K)."""
        blank = [each.shape[1:] for each in self._each(torch.zeros(1, pixels, channels))]
        parts = torch.split(kept, [shape.numel() for shape in blank], dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, blank, strict=True)]


def _reads_pixels(head: Head) -> bool:
    return head.settings[0].unit == "pixel"


class Pooled(Head):
    """Keeps the pooled image."""

    settings = (HeadSettings(agg="mean", solver="exact"),)

    def keep(self, instances: Tensor) -> Tensor:
        return instances.mean(1, keepdim=True)
