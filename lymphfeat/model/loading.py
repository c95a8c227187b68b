"""Any model folder as a model."""

import os
from pathlib import Path

from lymphfeat.errors import ModelError
from lymphfeat.model.ensemble import MEMBERS_FILE, Ensemble
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.model import FINAL_FILE, Model
from lymphfeat.model.sources import refuse_imported
from lymphfeat.runtime.files import recover

AnyModel = Model | Ensemble | FinalModel


def load_model(folder: str | os.PathLike[str], *others: str | os.PathLike[str]) -> AnyModel:
    """Read a model folder: a `Model`, for k-fold members or several folders an `Ensemble`.

    The folder of `finalize`, and of `endtoend --fusion`, is a `FinalModel`. All `predict` cohorts.
    Raises ModelError, saying what to do, if a folder is incomplete, and for a final model among
    several.

    >>> model = lf.load_model("models/endtoend")
    >>> model.predict(lf.Cohort.load("cohort")).patients
    """
    if not others:
        return _load(Path(folder))
    models = []
    for each in (folder, *others):
        model = _load(Path(each))
        if isinstance(model, FinalModel):
            raise ModelError(
                f"model (={each}) must be used alone: a final model is not averaged with others. "
                "To average heads, finalize the row that averages them."
            )
        models.append(model)
    return Ensemble.of(models)


def largest_crop(model: AnyModel, um_per_px: float | None = None) -> int:
    """Return the side, in pixels, of the largest crop that a model reads of images.

    `um_per_px` is the scale of the images, of a model whose crop is in µm. Raises ModelError for a
    model of imported features, which reads none.
    """
    if isinstance(model, FinalModel):
        recipes = [source.recipe for source in refuse_imported(model.sources)]
    else:
        models = model.models if isinstance(model, Ensemble) else (model,)
        recipes = [each.recipe for each in models]
    return max(recipe.at_scale(um_per_px).crop for recipe in recipes)


def _load(folder: Path) -> AnyModel:
    recover(folder)
    if (folder / FINAL_FILE).is_file():
        return FinalModel.load(folder)
    return (Ensemble if (folder / MEMBERS_FILE).is_file() else Model).load(folder)
