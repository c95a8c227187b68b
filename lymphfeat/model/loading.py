"""Any model folder as a model."""

import os
from pathlib import Path

from lymphfeat.errors import ModelError
from lymphfeat.model.ensemble import MEMBERS_FILE, Ensemble
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.model import FINAL_FILE, Model
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


def _load(folder: Path) -> AnyModel:
    recover(folder)
    if (folder / FINAL_FILE).is_file():
        return FinalModel.load(folder)
    return (Ensemble if (folder / MEMBERS_FILE).is_file() else Model).load(folder)
