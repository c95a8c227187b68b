"""The portable model: backbone, head and all it takes to apply them to new patients.

A model folder holds `model.safetensors` (tensors, float32) and `model.json` (everything else); no
pickle. `model.json` is written last and carries the hash of the tensors, so a folder that has one
is whole or is refused.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from scipy.special import expit
from torch import Tensor, nn

from lymphfeat.backbones import (
    Backbone,
    choose_device,
    choose_precision,
    flip_view,
    make_backbone,
    normalize,
    weights_sha256,
)
from lymphfeat.bags import Bags
from lymphfeat.cohort import Cohort
from lymphfeat.compute import RateMeter, autocast, cpu_threads, whole_float32
from lymphfeat.decision import Decision, average, combine
from lymphfeat.errors import ModelError
from lymphfeat.files import find_checkpoints, recover, replace_file
from lymphfeat.heads import HeadStack
from lymphfeat.identity import patient_keys
from lymphfeat.images import VIEWS, Crop, Normalization, stream_crops
from lymphfeat.intervals import bootstrap_metrics
from lymphfeat.metrics import all_metrics, fold_auc
from lymphfeat.progress import Progress, silent
from lymphfeat.provenance import NOBODY, PatientKey, Provenance, keys_from_json, keys_to_json
from lymphfeat.settings import HeadSettings
from lymphfeat.strict_json import json_text

FORMAT = "lymphfeat-model"
FORMAT_VERSION = 1
WEIGHTS_FILE, FACTS_FILE = "model.safetensors", "model.json"
_UNDECIDED = Decision()
_WITH_INTERVAL = ("ba", "auc")
MEMBERS_FILE, MEMBERS_FORMAT = "members.json", "lymphfeat-members"
# What a model has seen of a patient: its label in training; its label in validation, where nothing
# was learnt from it; its images without its label; nothing.
SEEN = ("label", "validation", "images", "no")
ROLE_OF = {"label": "train", "validation": "validation", "images": "new", "no": "new"}


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """How an image file becomes the input of the backbone, and which backbone that is."""

    backbone: str  # a timm name
    output_stride: int | None
    crop: int  # pixels, about the image's centre
    normalization: Normalization


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """Where a model comes from."""

    trained_on: tuple[str, ...]  # ids of its own training patients
    validated_on: tuple[PatientKey, ...] = ()
    provenance: Provenance = NOBODY  # all it comes from, its initial weights included
    cohort: Mapping[str, Any] = field(default_factory=dict)  # its fingerprint
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    seed: int = 0
    initial_weights: str = "none"
    initial_weights_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    # "train", "validation" -> the metrics of those patients, as predicted by the final model
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of a cohort.

    patients: id, label (missing where unknown), seen (one of `SEEN`), n_images, probability (of
        tumoral), calibrated (missing where the model has no calibration), predicted (1 where the
        probability is above the threshold). Of several models the probability is calibrated
        already, and there is also spread, the standard deviation of the members' calibrated
        probabilities.
    images: patient, image (file name), logit (the mean of its instances' logits), probability (its
        logistic), weight: the image's share in its patient's decision, adding up to 1 a patient.
    """

    patients: pd.DataFrame
    images: pd.DataFrame

    def decided(self, decision: Decision) -> "Predictions":
        """Return the same probabilities, calibrated and called by a decision."""
        decided = _decided(self.patients["probability"].to_numpy(np.float64), decision)
        return replace(self, patients=self.patients.assign(**decided))

    def save(self, patients: Path | None = None, images: Path | None = None) -> None:
        """Write either table as CSV, whole or not at all."""
        for table, path in ((self.patients, patients), (self.images, images)):
            if path is not None:
                replace_file(path, partial(_write_table, table))

    @classmethod
    def read(cls, patients: Path, images: Path) -> "Predictions":
        """Read both tables back."""
        labels: dict[str, Any] = {"id": str, "label": "Int64"}
        return cls(
            patients=pd.read_csv(
                patients, dtype=labels, keep_default_na=False, na_values={"label": [""]}
            ),
            images=pd.read_csv(images, dtype={"patient": str, "image": str}, keep_default_na=False),
        )


def _write_table(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, lineterminator="\n")


def _decided(probability: NDArray[np.float64], decision: Decision) -> dict[str, Any]:
    return {
        "calibrated": np.nan
        if decision.calibration is None
        else decision.calibration.apply(probability),
        "predicted": (probability > decision.threshold).astype(np.int64),
    }


def patient_metrics(
    patients: pd.DataFrame, threshold: ArrayLike, folds: NDArray[np.int64] | None = None
) -> dict[str, float | None]:
    """Measure predicted patients, all labelled; None where a class is missing.

    `threshold` is one number or each patient's own. Beside BA and AUC stand their 95 % bootstrap
    intervals over patients, as `ba_low`, `ba_high`, …. With `folds` (P,), of different models, the
    AUC is that within folds, and `auc_pooled` that of all patients together.
    """
    labels = patients["label"].to_numpy(np.int64)
    probability = patients["probability"].to_numpy(np.float64)
    values = {k: float(v) for k, v in all_metrics(probability, labels, threshold).items()}
    if folds is not None:
        values["auc_pooled"] = values["auc"]
        values["auc"] = float(fold_auc(probability, labels, folds))
    intervals = bootstrap_metrics(probability, labels, threshold, folds)
    for name in _WITH_INTERVAL:
        values[f"{name}_low"], values[f"{name}_high"] = intervals[name]
    return {"patients": len(patients)} | {
        name: value if math.isfinite(value) else None for name, value in values.items()
    }


def average_predictions(
    members: Sequence[Predictions], decisions: Sequence[Decision]
) -> Predictions:
    """Average what several models say of one cohort, and decide as `combine` says.

    The probability is the logistic of the mean of their calibrated logits.
    """
    raw = np.stack([member.patients["probability"].to_numpy(np.float64) for member in members])
    probability = average(decisions, raw)  # (M, P) -> (P,)
    calibrated = [decision.calibrate(p) for decision, p in zip(decisions, raw, strict=True)]
    patients = members[0].patients.assign(
        probability=probability,
        **_decided(probability, combine(decisions)),
        spread=np.std(calibrated, axis=0),
        seen=_most_seen([member.patients["seen"] for member in members]),
    )
    images = members[0].images.copy()
    for name in ("logit", "probability", "weight"):
        images[name] = np.mean([member.images[name] for member in members], axis=0)
    return Predictions(patients=patients, images=images)


def _most_seen(columns: Sequence["pd.Series[str]"]) -> list[str]:
    """Return what the members together have seen of each patient."""
    return [min(seen, key=SEEN.index) for seen in zip(*columns, strict=True)]


def member_folders(folder: Path) -> list[Path]:
    """Return the model folders of k-fold members, or the folder itself."""
    recover(folder)
    path = folder / MEMBERS_FILE
    if not path.is_file():
        return [folder]
    try:
        return [folder / name for name in json.loads(path.read_text(encoding="utf-8"))["members"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is damaged ({error}); copy the model folder anew.") from None


class Model:
    """A trained backbone and head; `predict` applies them to any cohort, labels not needed."""

    def __init__(
        self,
        backbone: Backbone,
        head: HeadStack,
        *,
        recipe: ModelRecipe,
        facts: TrainingFacts,
        decision: Decision = _UNDECIDED,
        tta: bool = False,
    ) -> None:
        self.backbone = backbone.eval()
        self.head = head.eval()  # of one head
        self.recipe = recipe
        self.facts = facts
        self.decision = decision
        self.tta = tta  # whether `predict` takes the mean over the four flips unless told otherwise

    @property
    def head_settings(self) -> HeadSettings:
        """Return the settings of the head."""
        return self.head.settings[0]

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float | None]]:
        """Return how the final model predicts the patients it was trained and validated on."""
        return self.facts.metrics

    @property
    def threshold(self) -> float:
        """Return the probability above which a patient is called tumoral."""
        return self.decision.threshold

    @property
    def threshold_from(self) -> str:
        """Say what the threshold was chosen on."""
        return self.decision.threshold_from

    def save(self, folder: Path | str) -> None:
        """Write `model.safetensors` and `model.json` to a folder, made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: value.detach().cpu().contiguous()
            for key, value in _network(self.backbone, self.head).state_dict().items()
        }
        replace_file(folder / WEIGHTS_FILE, lambda path: path.write_bytes(save(tensors)))
        text = json_text(self._to_json(), indent=2)
        replace_file(folder / FACTS_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "recipe": asdict(self.recipe),
            "head": asdict(self.head_settings),
            **self.decision.to_json(),
            "tta": self.tta,
            "weights_sha256": weights_sha256(_network(self.backbone, self.head)),
            "training": asdict(self.facts)
            | {
                "validated_on": keys_to_json(self.facts.validated_on),
                "provenance": self.facts.provenance.to_json(),
            },
        }

    @classmethod
    def load(cls, folder: Path | str) -> "Model":
        """Read a model folder; raises ModelError, saying what to do, for one that is not whole."""
        folder = Path(folder)
        recover(folder)
        facts = _read_facts(folder)
        try:
            model = _build(facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{folder / FACTS_FILE}: is damaged ({type(error).__name__}: {error}); "
                "copy the model folder anew or train it again."
            ) from None
        _load_tensors(model, folder, str(facts.get("weights_sha256")))
        return model

    def predict(
        self,
        cohort: Cohort,
        *,
        tta: bool | None = None,
        device: str = "auto",
        precision: str = "float32",
        threads: int | None = None,
        batch_size: int = 64,
        progress: Progress = silent,
    ) -> Predictions:
        """Predict every patient and image of a cohort, each from nothing but its own images.

        With `tta` everything is the mean over the four flips; None is the model's own choice.
        Images are decoded and scored in batches; only their logits are kept. `precision` is
        float32, bfloat16 or auto; only float32 gives the same probabilities on every machine, but
        for the order of sums.
        """
        chosen = choose_device(device)
        views = VIEWS if (self.tta if tta is None else tta) else VIEWS[:1]
        with cpu_threads(threads), whole_float32():
            scorer = CohortScorer(
                self, views, dtype=choose_precision(precision, chosen), device=chosen
            )
            logits = scorer.score(cohort, batch_size, progress)  # (V, N, U)
            return self._read_out(cohort, logits)

    def measure(self, patients: pd.DataFrame) -> dict[str, dict[str, float | None]]:
        """Measure the labelled ones of predicted patients, by what the model has seen of them.

        The groups are "train" (their labels were learnt from, by the model or by what it was made
        of: how well the model fits, not how well it predicts), "validation" and "new".
        """
        known = patients[patients["label"].notna()]
        groups = known["seen"].map(ROLE_OF)
        return {
            group: patient_metrics(known[groups == group], self.threshold)
            for group in ("train", "validation", "new")
            if (groups == group).any()
        }

    def seen(self, patients: Sequence[PatientKey]) -> list[str]:
        """Say of each patient what the model has seen of it, as one of `SEEN`."""
        validated = Provenance(labels=self.facts.validated_on)

        def seen_of(patient: PatientKey) -> str:
            if self.facts.provenance.has_label_of(patient):
                return "label"
            if validated.has_label_of(patient):
                return "validation"
            return "images" if self.facts.provenance.has_images_of(patient) else "no"

        return [seen_of(patient) for patient in patients]

    def _read_out(self, cohort: Cohort, logits: Tensor) -> Predictions:
        images = Bags.of(cohort.n_images)
        read = [read_out(self.head, images, view) for view in logits]
        probability = torch.stack([view.probability for view in read]).mean(0).numpy()  # (P,)
        weight = torch.stack([view.weight for view in read]).mean(0).numpy()  # (N,)
        logit = logits.mean((0, 2)).numpy()  # (N,)
        return Predictions(
            patients=_patient_table(
                cohort, self.seen(patient_keys(cohort)), probability, self.decision
            ),
            images=_image_table(cohort, logit, weight),
        )


def _network(backbone: Backbone, head: HeadStack) -> nn.ModuleDict:
    """Name the tensors of a model file: backbone.<timm's key>, head.<key>."""
    return nn.ModuleDict({"backbone": backbone.model, "head": head})


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_FILE
    if not path.is_file():
        hint = "make one with `lymphfeat endtoend`"
        if find_checkpoints(folder):
            hint = "an unfinished training is there: run the same `lymphfeat endtoend` again"
        elif (folder / MEMBERS_FILE).exists():
            hint = f"it holds k-fold members: choose one of them, as {member_folders(folder)[0]}"
        raise ModelError(f"model (={folder}) must be a folder with {FACTS_FILE}; got none; {hint}.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path}: is not valid JSON ({error}); copy the model folder anew."
        ) from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ModelError(f"{path}: is JSON but no lymphfeat model.")
    version = facts.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelError(
            f"{path}: format_version (={version}) must be at most {FORMAT_VERSION}; "
            "update lymphfeat to read it."
        )
    return facts


def _build(facts: Mapping[str, Any]) -> Model:
    recipe = _parse_recipe(facts["recipe"])
    backbone = make_backbone(
        recipe.backbone, image_size=recipe.crop, output_stride=recipe.output_stride
    )
    settings = HeadSettings(**facts["head"])
    zeros = torch.zeros(1, backbone.channels)
    training = facts["training"]
    return Model(
        backbone,
        HeadStack([settings], zeros, torch.zeros(1)),
        recipe=recipe,
        facts=TrainingFacts(
            **training
            | {
                "trained_on": tuple(training["trained_on"]),
                "validated_on": keys_from_json(training["validated_on"]),
                "provenance": _read_provenance(training),
            }
        ),
        decision=Decision.from_json(facts),
        tta=bool(facts["tta"]),
    )


def _read_provenance(training: Mapping[str, Any]) -> Provenance:
    if "provenance" in training:
        return Provenance.from_json(training["provenance"])
    return Provenance.of_ids(labels=training["trained_on"])  # of models of earlier versions


def _parse_recipe(content: Mapping[str, Any]) -> ModelRecipe:
    constants = content["normalization"]
    normalization = Normalization(
        name=constants["name"], mean=tuple(constants["mean"]), std=tuple(constants["std"])
    )
    return ModelRecipe(**{**content, "normalization": normalization})


def _load_tensors(model: Model, folder: Path, sha256: str) -> None:
    path = folder / WEIGHTS_FILE
    network = _network(model.backbone, model.head)
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path}: cannot be read as this model's tensors ({str(error).splitlines()[0]}); "
            "copy the model folder anew or train it again."
        ) from None
    if weights_sha256(network) != sha256:
        raise ModelError(
            f"{path}: tensors must be those {FACTS_FILE} was written with; got others. "
            "Copy both files of the model together."
        )


# --- scoring -------------------------------------------------------------------------------------


def instances_of(maps: Tensor, unit: str) -> Tensor:
    """Lay feature maps (n, C, h, w) out as instances (n, U, C): an image's pixels, or its mean."""
    return maps.flatten(2).mT if unit == "pixel" else maps.mean((2, 3))[:, None]


class CohortScorer:
    """Scores the images of cohorts, batch after batch, with a frozen model."""

    def __init__(
        self,
        model: Model,
        views: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        unit: str | None = None,
    ) -> None:
        """Take the unit to score, None for the head's own."""
        self._backbone = model.backbone.eval().to(device).to(memory_format=torch.channels_last)
        self._head = copy.deepcopy(model.head).eval().to(device)
        self._recipe = model.recipe
        self._unit = model.head_settings.unit if unit is None else unit
        self._views, self._dtype, self._device = views, dtype, device

    def score(self, cohort: Cohort, batch_size: int, progress: Progress) -> Tensor:
        """Return the logits of all instances of all images in every view: (V, N, U) on the CPU."""
        paths = [path for images in cohort.images for path in images]
        meter = RateMeter(progress, len(paths), "predicting")
        crops = stream_crops(paths, self._recipe.crop, threads=torch.get_num_threads())
        logits = []
        for batch in _batches(crops, batch_size):
            logits.append(self._score_batch(np.stack([crop.pixels for crop in batch])))
            meter.add(len(batch))
        return _finite(torch.cat(logits, dim=1), paths)

    @torch.inference_mode()
    def _score_batch(self, pixels: NDArray[np.uint8]) -> Tensor:
        images = normalize(torch.from_numpy(pixels).to(self._device), self._recipe.normalization)
        images = images.contiguous(memory_format=torch.channels_last)  # (n, 3, H, W)
        return torch.stack([self._score_view(flip_view(images, view)) for view in self._views])

    def _score_view(self, images: Tensor) -> Tensor:
        with autocast(self._device, self._dtype):
            maps = self._backbone(images)  # (n, C, h, w)
        instances = instances_of(maps.float(), self._unit)  # (n, U, C)
        return self._head.logits(instances)[:, :, 0].cpu()  # (n, U)


def _batches(crops: Iterator[Crop], size: int) -> Iterator[list[Crop]]:
    batch: list[Crop] = []
    for crop in crops:
        batch.append(crop)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _finite(logits: Tensor, paths: Sequence[Path]) -> Tensor:
    bad = (~logits.isfinite()).any(2).any(0).nonzero()
    if len(bad):
        raise ModelError(
            f"{paths[int(bad[0])]}: the model's score must be a finite number; got none, for "
            f"{len(bad)} images. Training has diverged: train again with a smaller --lr."
        )
    return logits


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """What a head makes of instance logits."""

    probability: Tensor  # (P,) of patients
    weight: Tensor  # (N,) an image's share in its patient's decision


@torch.no_grad()
def read_out(head: HeadStack, images: Bags, logits: Tensor) -> ReadOut:
    """Aggregate the instance logits (N, U) of whole patients, with the head in eval mode."""
    head = copy.deepcopy(head).eval().to(logits.device)
    bags = images.times(logits.shape[1])
    flat = logits.reshape(-1, 1)  # (N · U, 1)
    weight = head.instance_weights(flat, bags).reshape(logits.shape).sum(1)
    return ReadOut(probability=head.probability(flat, bags)[:, 0], weight=weight)


def _patient_table(
    cohort: Cohort, seen: Sequence[str], probability: NDArray[np.float32], decision: Decision
) -> pd.DataFrame:
    labels = pd.Series(cohort.labels, dtype="Int64")
    return pd.DataFrame(
        {
            "id": cohort.ids,
            "label": labels.mask(labels < 0),
            "seen": seen,
            "n_images": cohort.n_images,
            "probability": probability,
            **_decided(probability.astype(np.float64), decision),
        }
    )


def _image_table(
    cohort: Cohort, logit: NDArray[np.float32], weight: NDArray[np.float32]
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": np.repeat(np.array(cohort.ids), cohort.n_images),
            "image": [name for paths in cohort.images for name in _image_names(paths, cohort.root)],
            "logit": logit,
            "probability": expit(logit),
            "weight": weight,
        }
    )


def _image_names(paths: Sequence[Path], root: Path) -> list[str]:
    """Name a patient's images by their files, or by their paths where file names repeat."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [path.relative_to(root).as_posix() for path in paths]
