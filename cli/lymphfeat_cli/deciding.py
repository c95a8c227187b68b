"""How `predict` decides: its options, and what is said of the decisions."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from lymphfeat_cli.options import gather, number, with_interval

if TYPE_CHECKING:
    import pandas as pd

    from lymphfeat.evaluation.predictive_values import PredictiveValues
    from lymphfeat.model.final_model import FinalModel
    from lymphfeat.model.loading import AnyModel


@dataclass(frozen=True, kw_only=True)
class Deciding:
    """How the model decides."""

    without_attributes: bool
    sensitivity: float | None
    prevalence: float | None
    abstain: bool
    alpha: float

    def apply(self, model: "AnyModel") -> "AnyModel":
        """Return the model that decides so; UsageError if it cannot."""
        from lymphfeat.model.final_model import FinalModel

        if self.without_attributes and isinstance(model, FinalModel):
            model = model.without_attributes()
        if self.sensitivity is not None:
            model = model.at_sensitivity(self.sensitivity)
        if self.prevalence is not None:
            model = final_only(model, "--prevalence").at_prevalence(self.prevalence)
        if self.abstain:
            model = final_only(model, "--abstain").abstaining(self.alpha)
        return model


def final_only(model: "AnyModel", option: str) -> "FinalModel":
    """Return the model; UsageError unless it is one of `finalize`, which alone has this option."""
    from lymphfeat.model.final_model import FinalModel

    if not isinstance(model, FinalModel):
        raise click.UsageError(
            f"{option} needs a final model, made by `lymphfeat finalize` or "
            "`lymphfeat endtoend --folds --fusion`."
        )
    return model


without_attributes_option = click.option(
    "--without-attributes",
    is_flag=True,
    help="Predict from the images alone, where the model also reads clinical attributes.",
)
deciding_options = gather(
    "deciding",
    {
        "without_attributes": without_attributes_option,
        "sensitivity": click.option(
            "--sensitivity",
            type=click.FloatRange(0, 1, min_open=True),
            help="Use the model's operating point for this sensitivity (0.8, 0.9, 0.95, 0.99). "
            "[default: the model's threshold]",
        ),
        "prevalence": click.option(
            "--prevalence",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Share of tumoral patients where the model is used: adds the probability at this "
            "prevalence and shows the predictive values of the decisions.",
        ),
        "abstain": click.option(
            "--abstain",
            is_flag=True,
            help="Also answer reactive, tumoral, or refer where neither class can be ruled out.",
        ),
        "alpha": click.option(
            "--alpha",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            default=0.1,
            show_default=True,
            help="With --abstain: share of each class that may be called the other.",
        ),
    },
    lambda values: Deciding(**values),
)


def describe_deciding(model: "AnyModel", patients: "pd.DataFrame") -> dict[str, object]:
    """Return what --prevalence and --abstain add to the JSON."""
    found: dict[str, object] = {}
    if values := _predictive_values(model):
        found["predictive_values"] = values.to_json()
    if "answer" in patients:
        answers = {name: int((patients["answer"] == name).sum()) for name in _answers()}
        found["abstaining"] = {
            "alpha": final_only(model, "--abstain").alpha,
            "answers": answers,
            "guarantee": final_only(model, "--abstain").guarantee,
        }
    return found


def show_deciding(model: "AnyModel", patients: "pd.DataFrame") -> None:
    """Print the same."""
    if values := _predictive_values(model):
        shown = [
            with_interval(each.value, each.low, each.high)
            for each in (values.positive, values.negative)
        ]
        click.echo(
            f"At a prevalence of {values.prevalence:g}: {shown[0]} of those called tumoral are "
            f"(PPV), {shown[1]} of those called reactive (NPV)."
        )
    if "answer" in patients:
        final = final_only(model, "--abstain")
        counts = [f"{(patients['answer'] == name).sum()} {name}" for name in _answers()]
        click.echo(f"Answers at α = {final.alpha:g}: {', '.join(counts)}.")
        click.echo(f"They are {final.guarantee}")


def show_patient(patient: "pd.Series[Any]") -> None:
    """Print what is said of one patient."""
    called = "tumoral" if patient["predicted"] else "reactive"
    probability = patient["calibrated"]
    if math.isnan(probability):
        probability = patient["probability"]
    click.echo(
        f"{patient['id']}: {called}, probability of tumoral {number(probability)} "
        f"({patient['n_images']} images)."
    )
    if "probability_at_prevalence" in patient:
        click.echo(f"At the given prevalence: {number(patient['probability_at_prevalence'])}.")
    names = [str(name) for name in patient.index if str(name).startswith("from_")]
    parts = {name.removeprefix("from_"): patient[name] for name in names}
    if parts:
        shown = ", ".join(f"{name} {value:+.2f}" for name, value in parts.items())
        click.echo(f"What speaks for tumoral (log-odds): {shown}; the rest {patient['rest']:+.2f}.")
    if "answer" in patient:
        click.echo(
            f"Answer: {patient['answer']} (p of reactive {number(patient['p_reactive'])}, of "
            f"tumoral {number(patient['p_tumoral'])})."
        )
    if patient.get("notes"):
        click.echo(f"Note: {patient['notes']}.")


def _predictive_values(model: "AnyModel") -> "PredictiveValues | None":
    return getattr(model, "predictive_values", None)


def _answers() -> tuple[str, ...]:
    from lymphfeat.model.held_out import ANSWERS

    return ANSWERS
