"""A final model: backbones, heads, attributes and decision in one folder.

The folder holds `final.json` and `final.safetensors`; no pickle, no path to anything else. The
members read the same backbones, whose features are computed once, or each its own.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from torch import Tensor, nn

from lymphfeat.cohort.attributes import AttributeRecipe
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.images import VIEWS
from lymphfeat.cohort.provenance import PatientKey
from lymphfeat.errors import ModelError
from lymphfeat.evaluation.decision import Decision, combine
from lymphfeat.features.backbones import Backbone, make_backbone, weights_sha256
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.blank import empty_head
from lymphfeat.heads.head import Head, ReadOut
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.folder import load_tensors, read_facts, write_model
from lymphfeat.model.members import IMAGES, Member
from lymphfeat.model.model import FINAL_FILE
from lymphfeat.model.predictions import Predictions, image_table, measure_by_role, patient_table
from lymphfeat.model.scoring import CohortScorer, ModelRecipe
from lymphfeat.runtime.arrays import Floats
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.files import recover
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.settings import HeadSettings, PredictSettings

FORMAT, FORMAT_VERSION = "lymphfeat-final-model", 1
TENSORS_FILE = "final.safetensors"
_STEP = 1e-3  # of an image logit, to measure what it moves


@dataclass(frozen=True, kw_only=True)
class Source:
    """A backbone, and how an image becomes its input."""

    backbone: Backbone
    recipe: ModelRecipe

    @property
    def pixels(self) -> int:
        """The number of pixels of an image's feature map."""
        side = self.recipe.crop
        with torch.inference_mode():
            return math.prod(self.backbone.cpu()(torch.zeros(1, 3, side, side)).shape[2:])


class _Kept(Head):
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


@dataclass(frozen=True, kw_only=True)
class FinalModel:
    """A row of `fit-head`, ready for new patients: one refit on everybody, or several members.

    Also the members of `endtoend --folds --fusion`. The members' calibrated logits are averaged.
    `without_attributes` predicts from images alone, with the decision that was learnt for that.
    """

    row: str
    sources: tuple[Source, ...]
    members: tuple[Member, ...]
    attributes: AttributeRecipe
    facts: TrainingFacts
    # the honest figures of the row, and of its images alone, as they were measured
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tta: bool = False  # whether `predict` averages over the four flips by default
    images_only: bool = False

    @property
    def fused(self) -> bool:
        """Whether the clinical attributes count."""
        return not self.images_only and self.members[0].fusion is not None

    @property
    def decision(self) -> Decision:
        """The decision about the mean of the members."""
        return combine(
            [each.decision if self.fused else each.image_decision for each in self.members]
        )

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float | None]]:
        """How `endtoend` measured the patients that it was trained on, out of fold."""
        return self.facts.metrics

    @property
    def threshold(self) -> float:
        """The calibrated probability above which a patient is called tumoral."""
        return self.decision.threshold

    @property
    def threshold_from(self) -> str:
        """What the threshold was chosen on."""
        return self.decision.threshold_from

    def without_attributes(self) -> "FinalModel":
        """Return the model that reads images only."""
        return replace(self, images_only=True)

    def at_sensitivity(self, target: float) -> "FinalModel":
        """Decide by every member's operating point for a sensitivity; see `Model`."""
        members = [
            replace(
                member,
                decision=member.decision.at_sensitivity(target),
                image_decision=member.image_decision.at_sensitivity(target),
            )
            for member in self.members
        ]
        return replace(self, members=tuple(members))

    def measure(self, patients: pd.DataFrame) -> dict[str, dict[str, float | None]]:
        """Measure predicted patients with a label, as `Model.measure` does."""
        return measure_by_role(patients, self.threshold)

    def seen(self, patients: Sequence[PatientKey]) -> list[str]:
        """Return what the model has seen of each patient, as one of `SEEN`."""
        return self.facts.seen(patients)

    # --- predicting ------------------------------------------------------------------------------

    def predict(
        self,
        cohort: Cohort,
        settings: PredictSettings | None = None,
        *,
        progress: Progress = silent,
    ) -> Predictions:
        """Predict every patient and image of a cohort, each only from its own data.

        With `settings.tta` logits are the mean over the four flips. Raises CohortError for a table
        without the attributes that the model reads.
        """
        settings = settings or PredictSettings()
        attributes = self._attributes(cohort.table)
        tta = self.tta if settings.tta is None else settings.tta
        views = VIEWS if tta else VIEWS[:1]
        with cpu_threads(settings.threads), whole_float32():
            kept = []
            for number, source in enumerate(self.sources):
                scorer = CohortScorer(
                    source.backbone,
                    self._reader(number),
                    source.recipe,
                    settings,
                    views=views,
                    unit="pixel",
                )
                own = part_of(progress, number, len(self.sources), "")
                kept.append(scorer.score(cohort, own)[:, :, 0])  # (V, N, K)
                source.backbone.to("cpu")
            return self._predictions(cohort, kept, attributes)

    def _sources_of(self, member: Member) -> Sequence[int]:
        return member.sources or range(len(self.sources))

    def _reader(self, source: int) -> "_Kept | _Pooled":
        """Return what keeps of a source's images what its readers need of them.

        Heads that read several sources read pooled images.
        """
        readers = [member for member in self.members if source in self._sources_of(member)]
        if any(len(self._sources_of(member)) > 1 for member in readers):
            return _Pooled()
        return _Kept([head for member in readers for head in member.heads])

    def _attributes(self, table: pd.DataFrame) -> Floats | None:
        return self.attributes.matrix(table) if self.fused else None

    def _read(self, kept: Sequence[Tensor], images: Bags) -> list[list[ReadOut]]:
        """Return what each member's heads read out of what was kept of images, (N, K) a source."""
        parts = [self._parts(number, own) for number, own in enumerate(kept)]
        read = []
        for member in self.members:
            own = [parts[number] for number in self._sources_of(member)]
            read.append(
                [
                    head.read_out(torch.cat([next(each) for each in own], dim=-1), images)
                    for head in member.heads
                ]
            )
        return read

    def _parts(self, source: int, kept: Tensor) -> Iterator[Tensor]:
        """Yield what each head that reads a source needs of images, (N, U, D): from (N, K)."""
        reader, own = self._reader(source), self.sources[source]
        if isinstance(reader, _Pooled):
            return repeat(kept[:, None])
        return iter(reader.split(kept, own.pixels, own.backbone.channels))

    def _predictions(
        self, cohort: Cohort, kept: Sequence[Tensor], attributes: Floats | None
    ) -> Predictions:
        """Make tables of what was kept of a cohort's images in every view, (V, N, K) a source."""
        images = Bags.of(cohort.n_images)
        views = [self._read(view, images) for view in zip(*kept, strict=True)]
        groups = self.attributes.groups
        logits, parts, tables = [], [], []
        for number, member in enumerate(self.members):
            read = [view[number] for view in views]
            image = np.mean([member.image_logits(each) for each in read], axis=0)  # (P,)
            logits.append(member.fused_logits(image, attributes))
            parts.append(member.parts(image, attributes, groups))
            moved = member.parts(image + _STEP, attributes, groups)[:, 0]
            slope = (moved - parts[-1][:, 0]) / _STEP
            tables.append(_image_values(member, read, slope, parts[-1][:, 0], images))
        calibrated = np.mean(logits, axis=0)  # (P,)
        patients = patient_table(
            cohort,
            self.seen(patient_keys(cohort)),
            expit(calibrated),
            self.decision,
        )
        if len(self.members) > 1:
            patients["spread"] = np.std(expit(logits), axis=0)
        patients = patients.assign(**self._speaks(calibrated, np.mean(parts, axis=0)))
        if self.fused:
            notes = self.attributes.notes(cohort.table)
            patients["notes"] = ["; ".join(notes.get(id, ())) for id in cohort.ids]
        values = np.mean(tables, axis=0).astype(np.float32)  # (3, N)
        return Predictions(patients=patients, images=image_table(cohort, *values))

    def _speaks(self, logit: Floats, parts: Floats) -> dict[str, Floats]:
        """Name what images and each attribute add to the logit (P,); `rest` is the same for all."""
        names = [IMAGES, *(self.attributes.names if self.fused else ())]
        columns = {f"from_{name}": parts[:, i] for i, name in enumerate(names)}
        return columns | {"rest": logit - parts.sum(1)}

    # --- the folder ------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `final.safetensors` and `final.json` to a folder, creating it if needed."""
        network = self._network()
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "row": self.row,
            "sources": [asdict(source.recipe) for source in self.sources],
            "members": [member.to_json() for member in self.members],
            "attributes": self.attributes.to_json(),
            "decision": self.decision.to_json(),
            "figures": self.figures,
            "tta": self.tta,
            "tensors_sha256": weights_sha256(network),
            "training": self.facts.to_json(),
        }
        write_model(network, Path(folder, TENSORS_FILE), content, Path(folder, FINAL_FILE))

    def _network(self) -> nn.ModuleDict:
        """Name the tensors: source.<number>.<timm's key>, member.<number>.<head's number>.<key>."""
        return nn.ModuleDict(
            {
                "source": nn.ModuleList(source.backbone.model for source in self.sources),
                "member": nn.ModuleList(nn.ModuleList(member.heads) for member in self.members),
            }
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "FinalModel":
        """Read a final model's folder; raises ModelError, saying what to do, if it is damaged."""
        folder = Path(folder)
        recover(folder)
        hint = "make one with `lymphfeat finalize`"
        content = read_facts(folder / FINAL_FILE, FORMAT, FORMAT_VERSION, hint=hint)
        try:
            model = _build(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{folder / FINAL_FILE}: is damaged ({type(error).__name__}: {error}); copy the "
                "model folder again or make the model again."
            ) from None
        sha256 = str(content.get("tensors_sha256"))
        load_tensors(model._network(), folder / TENSORS_FILE, sha256, facts=FINAL_FILE)
        return model


class _Pooled(Head):
    """Keeps the pooled image."""

    settings = (HeadSettings(agg="mean", solver="exact"),)

    def keep(self, instances: Tensor) -> Tensor:
        return instances.mean(1, keepdim=True)


def _image_values(
    member: Member, views: Sequence[Sequence[ReadOut]], slope: Floats, part: Floats, images: Bags
) -> Floats:
    """Return score, weight and contribution of the images: (3, N).

    Scores and weights are those of the heads, averaged by what each counts. Contributions are what
    the heads say, times the `slope` (P,) of the patient's logit by its images', and add up to
    `part` (P,), what the images add to it: what belongs to no image is shared out equally.
    """
    counts = member.image_coefficients()
    sizes = np.abs(counts) / np.abs(counts).sum() if counts.any() else counts

    def mean(name: str, counts: Floats) -> Floats:
        values = [
            np.sum([c * _numbers(read, name) for c, read in zip(counts, view, strict=True)], axis=0)
            for view in views
        ]
        return np.asarray(np.mean(values, axis=0))

    owner = images.index.numpy()  # (N,)
    if all(head.of_logits for head in member.heads):
        own = slope[owner] * mean("contribution", counts)
    else:  # shares of a probability
        own = mean("weight", sizes) * part[owner]
    left = part - np.bincount(owner, own, minlength=len(part))  # (P,)
    own = own + (left / images.sizes.numpy())[owner]
    return np.stack([mean("score", sizes), mean("weight", sizes), own])


def _numbers(read: ReadOut, name: str) -> Floats:
    return np.asarray(getattr(read, name).double().numpy())


def _build_member(content: Mapping[str, Any], channels: Sequence[int]) -> Member:
    """Build a member, its heads blank, of a model whose sources have these numbers of channels."""
    own = [channels[number] for number in content.get("sources") or range(len(channels))]
    heads = [empty_head(HeadSettings(**each), *own) for each in content["heads"]]
    return Member.from_json(content, heads)


def _build(content: Mapping[str, Any]) -> FinalModel:
    recipes = [ModelRecipe.from_json(each) for each in content["sources"]]
    sources = tuple(
        Source(
            backbone=make_backbone(
                recipe.backbone, image_size=recipe.crop, output_stride=recipe.output_stride
            ),
            recipe=recipe,
        )
        for recipe in recipes
    )
    channels = [source.backbone.channels for source in sources]
    members = [_build_member(member, channels) for member in content["members"]]
    return FinalModel(
        row=str(content["row"]),
        sources=sources,
        members=tuple(members),
        attributes=AttributeRecipe.from_json(content["attributes"]),
        facts=TrainingFacts.from_json(content["training"]),
        figures=content["figures"],
        tta=bool(content.get("tta", False)),  # models of earlier versions have none
    )
