"""What larger backbones say of each cell: the targets that a smaller one is distilled on.

Every cell is shown in a few views of different magnification. Each teacher's pooled features are
standardised over all views; their principal components, together, are what the student learns to
predict from another view of the same magnification, in other colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from lymphfeat.cohort.images import Normalization
from lymphfeat.features.augmentation import Augmentation
from lymphfeat.features.backbones import Backbone, build_backbone
from lymphfeat.features.views import normalize
from lymphfeat.runtime.devices import autocast
from lymphfeat.runtime.progress import Progress
from lymphfeat.settings import PretrainSettings

_STAIN = 0.4  # of the student's: a teacher that was not made for such changes is not to be misled
_BLUR = 0.2
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A backbone to learn from, in evaluation mode."""

    name: str
    backbone: Backbone
    normalization: Normalization
    sha256: str  # of its weights

    @classmethod
    def load(cls, text: str, size: int) -> "Teacher":
        """Load `BACKBONE` with ImageNet weights, or `BACKBONE=WEIGHTS`, for views of a size."""
        name, _, weights = text.partition("=")
        backbone, loaded = build_backbone(name, weights=weights or "imagenet", image_size=size)
        config: dict[str, Any] = backbone.model.pretrained_cfg  # type: ignore[assignment]
        mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
        normalization = Normalization(name=name, mean=mean, std=std)  # type: ignore[arg-type]
        return cls(
            name=name,
            backbone=backbone.eval(),
            normalization=normalization,
            sha256=loaded.sha256,
        )


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Of N cells in V views: the magnification of each view (N, V), and its targets (N, V, D)."""

    zooms: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Lessons":
        return Lessons(zooms=self.zooms.to(device), targets=self.targets.to(device))


def teach(
    teachers: Sequence[Teacher],
    fields: Tensor,
    settings: PretrainSettings,
    dtype: torch.dtype,
    progress: Progress,
) -> Lessons:
    """Show all cells, fields of pixels (N, 3, F, F) uint8, to all teachers.

    The magnification of a cell's v-th view is drawn from the v-th part of the range, log-uniform.
    """
    generator = torch.Generator(fields.device).manual_seed(settings.seed)
    zooms = _draw_zooms(len(fields), settings, generator)  # (N, V)
    augmentation = Augmentation(
        size=settings.teacher_size, stain=_STAIN * settings.stain, blur=_BLUR, noise=0
    )
    enlarged = settings.teacher_size / settings.view_size
    features: list[list[Tensor]] = [[] for _ in teachers]
    for view in range(settings.teacher_views):
        for rows in torch.split(torch.arange(len(fields), device=fields.device), _BATCH):
            pixels = augmentation.draw(fields[rows], generator, zooms[rows, view] * enlarged)
            for said, teacher in zip(features, teachers, strict=True):
                said.append(_pooled(teacher, pixels, dtype))
            done = view * len(fields) + int(rows[-1]) + 1
            progress(done, zooms.numel(), "views shown to the teachers")
    targets = [torch.cat(said).view(settings.teacher_views, len(fields), -1) for said in features]
    return Lessons(zooms=zooms, targets=principal_components(targets, settings))


def _draw_zooms(n: int, settings: PretrainSettings, generator: torch.Generator) -> Tensor:
    views = settings.teacher_views
    low, high = (math.log(zoom) for zoom in settings.zoom)
    part = torch.rand((n, views), generator=generator, device=generator.device)
    part = (part + torch.arange(views, device=part.device)) / views  # (N, V)
    return torch.exp(low + (high - low) * part)


@torch.inference_mode()
def _pooled(teacher: Teacher, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    images = normalize(pixels, teacher.normalization)
    images = images.contiguous(memory_format=torch.channels_last)
    with autocast(images.device, dtype):
        maps: Tensor = teacher.backbone(images)  # (n, C, h, w)
    return maps.float().mean((2, 3)).half().cpu()  # (n, C)


def principal_components(features: Sequence[Tensor], settings: PretrainSettings) -> Tensor:
    """Return the principal components of standardised features (V, N, C each) as (N, V, D)."""
    views, n, _ = features[0].shape
    standard = [_standardised(part.flatten(0, 1).float()) for part in features]
    together = torch.cat(standard, dim=1).numpy()  # (V·N, C of all)
    width = min(settings.components, *together.shape)
    pca = PCA(width, svd_solver="randomized", random_state=settings.seed)
    scores: Tensor = torch.from_numpy(pca.fit_transform(together)).float()  # (V·N, D)
    scores /= scores.std(0).clamp_min(1e-6) ** settings.whitening
    scores = (scores / scores.std()).view(views, n, -1)
    return torch.transpose(scores, 0, 1).contiguous()  # (N, V, D)


def _standardised(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / (features.std(0) + 1e-3) / features.shape[1] ** 0.5
