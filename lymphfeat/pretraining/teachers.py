"""What larger backbones say of each cell: the targets that a smaller one is distilled on.

Every cell is shown in a few views of different magnification. Each teacher's pooled features are
standardised over all views; the components that views of one cell agree on are what the student
learns to predict, from views in other colours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
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
_BASIS = 512  # principal components in which directions are sought
_RIDGE = 1e-6
Doubles = NDArray[np.float64]


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
    for teacher in teachers:
        teacher.backbone.to(fields.device)
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
    shape = (settings.teacher_views, len(fields), -1)
    together = [torch.cat(said).view(shape) for said in features]  # (V, N, C) of each
    targets = steady_components(together, zooms, settings.components, settings.seed)
    return Lessons(zooms=zooms, targets=targets)


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


def steady_components(features: Sequence[Tensor], zooms: Tensor, n: int, seed: int) -> Tensor:
    """Return what views agree on in features (V, N, C each) of all teachers: (N, V, n).

    Each teacher's features are standardised and, together, reduced to principal components. What
    magnification does to them is fitted (a parabola in its logarithm) and taken out. Then the
    directions are found in which cells differ most, relative to how views of one cell differ:
    eigenvectors of the covariance between cells against the total one; the eigenvalue is the share
    of the variance that a view tells of its cell. The targets are the means over a cell's views and
    the effect of each view's magnification, in these directions; their deviation is that share,
    scaled to a mean square of 1.
    """
    views, cells, _ = features[0].shape
    together = torch.cat([_standardised(part.flatten(0, 1).float()) for part in features], dim=1)
    width = min(_BASIS, *together.shape)
    pca = PCA(width, svd_solver="randomized", random_state=seed)
    scores = pca.fit_transform(together.numpy()).astype(np.float64)  # (V·N, width)
    magnified = _fit_zooms(zooms.cpu().numpy(), scores)
    rest = (scores - magnified).reshape(views, cells, -1)
    means = rest.mean(0)  # (N, width)
    spread = (rest - means).reshape(views * cells, -1)
    within = spread.T @ spread / (cells * (views - 1))
    between = means.T @ means / cells - within / views
    shares, directions = eigh(between, between + within + _RIDGE * np.eye(width))  # ascending
    steady, shares = directions[:, ::-1][:, :n], shares[::-1][:n].clip(min=0)
    targets = (means + magnified.reshape(views, cells, -1)) @ steady  # (V, N, n)
    targets *= shares / np.sqrt((shares**2).mean()) / targets.std((0, 1))
    return torch.from_numpy(targets.astype(np.float32).transpose(1, 0, 2).copy())


def _fit_zooms(zooms: Doubles, scores: Doubles) -> Doubles:
    """Return what magnifications (N, V) explain of centred scores (V·N, width)."""
    log = np.log(zooms).T.ravel()  # (V·N,), as the scores
    powers = np.stack([log, log**2], axis=1)
    powers -= powers.mean(0)
    found, *_ = np.linalg.lstsq(powers, scores, rcond=None)
    explained: Doubles = powers @ found
    return explained


def _standardised(features: Tensor) -> Tensor:
    centred: Tensor = features - features.mean(0)
    return centred / (features.std(0) + 1e-3) / math.sqrt(features.shape[1])
