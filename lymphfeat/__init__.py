"""Tell reactive from tumoral lymphocytosis by bags of blood-cell images (docs/python.md).

`import lymphfeat as lf` is cheap: a public name's module, and torch with it, is imported when the
name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lymphfeat.auditing import audit
    from lymphfeat.cohort.cohort import Cohort
    from lymphfeat.comparison import compare
    from lymphfeat.errors import (
        CohortError,
        LeakageError,
        LymphfeatError,
        ModelError,
        OutputError,
        SettingsError,
        StoreError,
        WeightsError,
    )
    from lymphfeat.explanation.explanation import explain
    from lymphfeat.exporting import export_bags
    from lymphfeat.extraction import extract
    from lymphfeat.features.store import FeatureStore
    from lymphfeat.finalization import finalize
    from lymphfeat.fitting import fit_heads
    from lymphfeat.importing import import_bags
    from lymphfeat.model.loading import load_model
    from lymphfeat.recalibration import recalibrate
    from lymphfeat.repetition.repetition import rerun
    from lymphfeat.settings import (
        BackboneSettings,
        EndToEndSettings,
        ExplainSettings,
        ExtractSettings,
        FitSettings,
        HeadGrid,
        HeadSettings,
        PredictSettings,
        PretrainSettings,
        RecalibrateSettings,
    )
    from lymphfeat.training import train

__version__ = "0.1.0"
__all__ = [
    "BackboneSettings",
    "Cohort",
    "CohortError",
    "EndToEndSettings",
    "ExplainSettings",
    "ExtractSettings",
    "FeatureStore",
    "FitSettings",
    "HeadGrid",
    "HeadSettings",
    "LeakageError",
    "LymphfeatError",
    "ModelError",
    "OutputError",
    "PredictSettings",
    "PretrainSettings",
    "RecalibrateSettings",
    "SettingsError",
    "StoreError",
    "WeightsError",
    "audit",
    "compare",
    "explain",
    "export_bags",
    "extract",
    "finalize",
    "fit_heads",
    "import_bags",
    "load_model",
    "recalibrate",
    "rerun",
    "train",
]

# The module of each name; a settings class or an error is in the module of that kind.
_MODULES = {
    "Cohort": "cohort.cohort",
    "FeatureStore": "features.store",
    "audit": "auditing",
    "compare": "comparison",
    "explain": "explanation.explanation",
    "export_bags": "exporting",
    "extract": "extraction",
    "finalize": "finalization",
    "fit_heads": "fitting",
    "import_bags": "importing",
    "load_model": "model.loading",
    "recalibrate": "recalibration",
    "rerun": "repetition.repetition",
    "train": "training",
}

if not TYPE_CHECKING:  # a type checker would take any name for known

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        kind = "errors" if name.endswith("Error") else "settings"
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, kind)}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
