"""Backbones fine-tuned per split, for feature stores: each learns only from training patients.

A split's folder holds its weights, with the identity of their training, and its curves. Weights of
the same identity are not trained again.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split
from lymphfeat.errors import ModelError
from lymphfeat.features.backbones import FACTS_KEY, read_facts
from lymphfeat.finetuning.curves import CURVES, write_curves
from lymphfeat.finetuning.job import Job
from lymphfeat.finetuning.per_split import SplitTraining
from lymphfeat.runtime.checkpoint import CHECKPOINT_FILE
from lymphfeat.runtime.files import ResultKind, recover, result_folder, unfinished_folder
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.processes import from_first, is_first
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.strict_json import json_text, json_value
from lymphfeat.settings import EndToEndSettings

BACKBONE_FILE = "backbone.safetensors"
BACKBONE = ResultKind(
    name="fine-tuned backbone", marks=(BACKBONE_FILE,), files=(BACKBONE_FILE, *CURVES)
)


def fine_tune(
    cohort: Cohort,
    splits: Sequence[Split],
    settings: EndToEndSettings,
    folder: Path,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Train a backbone for each split and return the path of its weights, by the split's id.

    The seed is the split's. An interrupted training resumes when called again. Raises ModelError
    when the split's folder holds weights of another training and `force` is not set.
    """
    # Where patients share images, the heads on these features are refused (guards).
    settings = replace(settings, validation=0.0, allow_shared_images=True)
    training = SplitTraining(cohort, splits, settings, force=force, progress=progress)
    for split in splits:
        job, out = training.prepare(split), folder / split.id
        if not from_first(is_first() and _is_done(out, job, force=force)):
            _train(training, job, out, force=force)
    from_first(None)  # the others wait until the last weights are written
    return {split.id: folder / split.id / BACKBONE_FILE for split in splits}


def _train(training: SplitTraining, job: Job, out: Path, *, force: bool) -> None:
    resumes = (CHECKPOINT_FILE,)
    with result_folder(out, BACKBONE, force=force, resumes=resumes, writes=is_first()) as folder:
        curves = training.train(job, unfinished_folder(out) / CHECKPOINT_FILE)
        if is_first():
            write_curves(curves, folder)
            _save(job, folder / BACKBONE_FILE)


def _is_done(folder: Path, job: Job, *, force: bool) -> bool:
    """Return whether these exact weights exist; refuse others unless `force`."""
    recover(folder)
    path = folder / BACKBONE_FILE
    if not path.exists():
        return False
    differences = differing_fields(_as_read(job.identity), _read_identity(path))
    if differences and not force:
        raise ModelError(
            f"{path}: already holds weights of another training: {'; '.join(differences)}. "
            "Choose another --out, or train again with --force."
        )
    return not differences


def _as_read(identity: Any) -> dict[str, Any]:
    """Return an identity as it would be read from a file."""
    content: dict[str, Any] = json_value(identity)
    return content


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        return _as_read(read_facts(path)["identity"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: is not a fine-tuned backbone ({error}); remove it, or choose another --out."
        ) from None


def _save(job: Job, path: Path) -> None:
    model = job.model.backbone.model
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    facts = {
        "identity": job.identity,
        "provenance": job.model.facts.provenance.to_json(),
    }
    path.write_bytes(save(tensors, {FACTS_KEY: json_text(facts)}))
