"""Options that say which patients `predict` predicts: a cohort, stores, or one patient's images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lymphfeat_cli.options import PATH, CohortChoice, Output, gather

if TYPE_CHECKING:
    from lymphfeat.cohort.cohort import Cohort

ATTRIBUTES = ("age", "gender", "lymph_count")  # with an option each


@dataclass(frozen=True, kw_only=True)
class PatientChoice:
    """What is predicted instead of a cohort: stores, or the images of one patient."""

    stores: tuple[Path, ...]
    images: Path | None
    attributes: Mapping[str, str]

    def check(self) -> None:
        """Refuse options that contradict each other."""
        named = click.get_current_context().get_parameter_source("cohort")
        chosen = {
            "--cohort": named is ParameterSource.COMMANDLINE,
            "--store": bool(self.stores),
            "--images": self.images is not None,
        }
        given = [name for name, is_given in chosen.items() if is_given]
        if len(given) > 1:
            raise click.UsageError(f"{' and '.join(given)}: give only one of them.")
        if self.attributes and self.images is None:
            raise click.UsageError(
                f"attributes ({', '.join(self.attributes)}) are those of one patient: give its "
                "images with --images. Those of a cohort are in its table."
            )

    def load(self, cohort: CohortChoice, output: Output) -> "Cohort":
        """Load the one patient, or else the cohort."""
        if self.images is None:
            return cohort.load(output)
        from lymphfeat.cohort.cohort import Cohort

        date = cohort.reference_date.date()
        return Cohort.of_patient(self.images, self.attributes, reference_date=date)


def _named_values(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for name, equals, _ in pairs:
        if not equals or not name.strip():
            raise click.BadParameter(f"must be NAME=VALUE; got {name!r}.")
    return {name.strip().lower(): value for name, _, value in pairs}


def _choice(values: dict[str, Any]) -> PatientChoice:
    own = {name: values[name] for name in ATTRIBUTES if values[name] is not None}
    return PatientChoice(
        stores=values["stores"], images=values["images"], attributes=own | values["attributes"]
    )


patient_options = gather(
    "choice",
    {
        "stores": click.option(
            "--store",
            "stores",
            multiple=True,
            type=PATH,
            help="Predict the patients of a feature store from its maps, instead of a cohort's "
            "images. Repeatable: one per backbone of the model, in its order.",
        ),
        "images": click.option(
            "--images",
            type=PATH,
            help="Predict one patient: the folder of its images.",
        ),
        "age": click.option("--age", help="Age in years of the patient of --images."),
        "gender": click.option("--gender", help="F or M, of the patient of --images."),
        "lymph_count": click.option(
            "--lymph-count", help="Lymphocyte count (10⁹/L) of the patient of --images."
        ),
        "attributes": click.option(
            "--attribute",
            "attributes",
            multiple=True,
            metavar="NAME=VALUE",
            callback=_named_values,
            help="Any other attribute of the patient of --images. Repeatable.",
        ),
    },
    _choice,
)
