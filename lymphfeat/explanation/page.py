"""The report as one HTML file: no network, everything in it, text of the user's tables escaped."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray

from lymphfeat.explanation.curves import Distribution, calibration_curve, roc_curve
from lymphfeat.explanation.explanation import ROLES, Explanation
from lymphfeat.explanation.scores import ranks
from lymphfeat.explanation.text import (
    DIFFERING,
    DISCLAIMER,
    FOUND,
    FOUND_BY_HEAD,
    about,
    alone,
    describe_deletion,
    describe_finding,
    describe_subgroups,
    describe_truth,
    model_facts,
    named_value,
    speaks,
    summary,
)
from lymphfeat.explanation.text import notices as told_notices
from lymphfeat.explanation.thumbnails import COLUMNS, PER_SHEET, Thumbnails

BUDGET = 15_000_000  # bytes of the file
STRIP = 10  # cells in each strip of the highest and lowest
_SHELL = 120_000  # a generous bound on the bytes of template, style and script
_FIGURES = {"auc": "AUC", "sensitivity": "Sensitivity", "specificity": "Specificity"}
_ELEMENTS = 100  # of the elements around a patient's data
_END = "mean of the members; with their calibrations"
_LARGEST_LOGIT = 327.67  # the largest that int16 hundredths can hold


def render_page(explanation: Explanation, *, budget: int = BUDGET) -> str:
    """Return the page, at most `budget` bytes as UTF-8, without the least important pictures."""
    distribution = Distribution.of(
        explanation.subject, explanation.maps, explanation.cohort.n_images
    )
    blocks = _patient_blocks(explanation, distribution)
    patients = _patients(explanation)
    written = [_json(block) for block in blocks]
    text = _SHELL + sum(len(part) + _ELEMENTS for part in (_json(patients), *written))
    thumbnails = explanation.thumbnails.within(max(0, budget - text), _worth(explanation))
    data = _page_data(explanation, distribution, thumbnails) | {"patients": patients}
    return _render(explanation, data, written, thumbnails)


def _render(
    explanation: Explanation,
    data: Mapping[str, Any],
    blocks: Sequence[Markup],
    thumbnails: Thumbnails,
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_file("page.html"))
    js = _file("page.js")
    return template.render(
        title=data["title"],
        summary=summary(explanation),
        disclaimer=DISCLAIMER,
        notices=told_notices(explanation, thumbnails),
        about=about(explanation),
        extremes=explanation.wording.extremes,
        facts=model_facts(explanation.subject),
        css=Markup(_file("page.css")),
        js=Markup(js),
        js_hash=_hash(f"\n{js}\n"),
        data=_json(data),
        blocks=zip(blocks, map(_sheets, thumbnails.sheets), strict=True),
    )


def _file(name: str) -> str:
    return resources.files("lymphfeat.explanation").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> Markup:
    """Return a script's hash for the policy of the page: no other is run, whatever is injected."""
    return Markup(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


def _json(content: Any) -> Markup:
    """Write JSON whose text cannot close the HTML element around it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII alone
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _worth(explanation: Explanation) -> NDArray[np.float64]:
    """Value a picture by how near its image is to an end of its patient's rankings."""
    sizes = explanation.cohort.n_images
    rankings = [explanation.rank]
    if explanation.distance is not None:
        rankings.append(ranks(explanation.distance, sizes))
    last = sizes[explanation.patient] - 1
    from_end = np.min([[rank, last - rank] for rank in rankings], axis=(0, 1))
    worth: NDArray[np.float64] = -from_end.astype(np.float64)
    return worth


# --- data of the page -----------------------------------------------------------------------------


def _page_data(
    explanation: Explanation, distribution: Distribution, thumbnails: Thumbnails
) -> dict[str, Any]:
    cohort = explanation.cohort
    numeric = [n for n in cohort.covariates if pd.api.types.is_numeric_dtype(cohort.table[n])]
    groups = explanation.metrics()
    return {
        "title": cohort.root.resolve().name,
        "model": _model(explanation),
        "attributes": list(cohort.covariates),
        "scatter": [name for name in numeric if cohort.table[name].notna().sum() > 1],
        "groups": list(groups.items()),
        "roc": _rocs(explanation, groups),
        "calibration": _calibration(explanation),
        "distribution": {
            "edges": _round(distribution.edges, 4),
            "weight": None if distribution.weight is None else _round(distribution.weight, 4),
            "instances": distribution.instances,
        },
        "strip": STRIP,
        "pictures": {
            "side": thumbnails.size.side,
            "columns": COLUMNS,
            "sheet": PER_SHEET,
            "missing": _missing(explanation, thumbnails),
        },
        "extremes": _extremes(explanation),
        "deletion": _deletion(explanation),
        "subgroups": _subgroups(explanation),
        "truth": describe_truth(explanation),
    }


def _missing(explanation: Explanation, thumbnails: Thumbnails) -> dict[int, list[int]]:
    """Return which images of a patient have no picture, by patient."""
    pieces = np.split(~thumbnails.shown, explanation.cohort.offsets[1:-1])
    return {
        index: np.flatnonzero(piece).tolist() for index, piece in enumerate(pieces) if piece.any()
    }


def _model(explanation: Explanation) -> dict[str, Any]:
    wording, subject = explanation.wording, explanation.subject
    return {
        "threshold": explanation.model.threshold,
        "additive": explanation.decisions.additive,
        "grid": explanation.maps.shape[1],
        "limit": colour_limit(explanation.maps),
        "unmarked": wording.unmarked,
        "marks": wording.marks,
        "contributions": wording.contributions,
        "rest": wording.rest,
        "maps": wording.mapped,
        "distances": explanation.distance is not None,
        "found": FOUND + FOUND_BY_HEAD * (subject.model_is_final or subject.members > 1),
        "differing": DIFFERING,
        "intercept": None if explanation.findings is None else explanation.findings.intercept,
        "weight": wording.weight,
        "attention": wording.attention,
        "final": subject.model_is_final,
        "uses": list(subject.attributes),
        "end": _END if subject.members > 1 and not subject.model_is_final else "",
    }


def colour_limit(maps: NDArray[np.float32]) -> float:
    """Return the logit at which the colour of every map saturates: 1, 2, 3, 4, 6 or 8."""
    middling = float(np.quantile(np.abs(maps), 0.98))
    return float(next((limit for limit in (1, 2, 3, 4, 6) if middling <= limit), 8))


def _patients(explanation: Explanation) -> list[dict[str, Any]]:
    decisions, table = explanation.decisions, explanation.cohort.table
    found = None if explanation.findings is None else explanation.findings.total
    return [
        {
            "id": row["id"],
            "label": None if pd.isna(row["label"]) else int(row["label"]),
            "role": row["role"],
            "n": int(row["n_images"]),
            "p": _number(row["probability"], 5),
            "calibrated": _number(row["calibrated"], 5),
            "called": int(row["predicted"]),
            "error": None if pd.isna(row["error"]) else bool(row["error"]),
            "p_explained": _number(decisions.probability[index], 5),
            "total": _number(row["total"], 5),
            "rest": _number(row["rest"], 5),
            "without": _number(row["without_top"], 5),
            "parts": _parts(explanation, index),
            "speaks": speaks(explanation, index),
            "alone": alone(explanation, index),
            "notes": row.get("notes", ""),
            "spread": _number(row.get("spread", math.nan), 5),
            "found": None if found is None else _number(found[index], 5),
            "attributes": {
                name: _attribute(table[name].iloc[index]) for name in explanation.cohort.covariates
            },
        }
        for index, row in enumerate(explanation.patients.to_dict("records"))
    ]


def _parts(explanation: Explanation, patient: int) -> list[tuple[str, float | None]]:
    """Return what the cells and each attribute add to a final model's logit, named."""
    if not explanation.subject.model_is_final:
        return []
    return [
        (named_value(explanation, str(name), patient), _number(value, 5))
        for name, value in explanation.shares.iloc[patient].items()
    ]


def _attribute(value: Any) -> float | str | None:
    if pd.isna(value):
        return None
    return str(value) if isinstance(value, str) else _number(value, 3)


def _patient_blocks(explanation: Explanation, distribution: Distribution) -> list[dict[str, Any]]:
    images = explanation.images
    hundredths = (explanation.maps.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT) * 100).round()
    maps = hundredths.astype("<i2")  # (N, h, w)
    offsets, distance = explanation.cohort.offsets, explanation.distance
    unlike = images.get("unlike_in")
    return [
        {
            "names": images["image"][begin:end].tolist(),
            "logit": _round(images["logit"][begin:end], 4),
            "weight": _round(images["weight"][begin:end], 6),
            "contribution": _round(images["contribution"][begin:end], 6),
            "mark": images["mark"][begin:end].tolist(),
            "rank": images["rank"][begin:end].tolist(),
            "maps": base64.b64encode(maps[begin:end].tobytes()).decode("ascii"),
            "findings": _findings(explanation, index),
            "distance": None if distance is None else _round(distance[begin:end], 3),
            "unlike": [] if unlike is None else unlike[begin:end].tolist(),
            "counts": distribution.counts[index].tolist(),
        }
        for index, (begin, end) in enumerate(pairwise(offsets))
    ]


def _findings(explanation: Explanation, patient: int) -> list[tuple[str, float | None, str]]:
    """Return what each statistic is about, its part of the logit, and both in a sentence."""
    if explanation.findings is None:
        return []
    return [
        (each.about, _number(each.score[patient], 5), describe_finding(each, patient))
        for each in explanation.findings.statistics
    ]


def _sheets(sheets: Sequence[bytes]) -> Markup:
    """Write the sheets of a patient's pictures."""
    return _json([base64.b64encode(sheet).decode("ascii") for sheet in sheets])


def _rocs(explanation: Explanation, groups: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Return group, points and AUC of every group with both classes."""
    return [
        [role, _round(roc_curve(*_measured(explanation, role)).tolist(), 5), groups[role]["auc"]]
        for role in groups
        if groups[role]["auc"] is not None
    ]


def _calibration(explanation: Explanation) -> dict[str, Any] | None:
    """Use the most informative patients: new ones, else validation, else training patients."""
    for role in ("new", "validation", "train"):
        probability, labels = _measured(explanation, role)
        if len(labels) >= 2:
            rows = _round(calibration_curve(probability, labels).tolist(), 5)
            return {"role": ROLES[role], "patients": len(labels), "rows": rows}
    return None


def _measured(explanation: Explanation, role: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    table = explanation.patients
    known = table[(table["role"] == role) & table["label"].notna()]
    return known["probability"].to_numpy(np.float64), known["label"].to_numpy(np.int64)


def extreme_images(explanation: Explanation, label: int, n: int = STRIP) -> dict[str, list[int]]:
    """Return the rows of a class's "highest" and "lowest" images, one per patient.

    Patients whose extreme image is most extreme come first.
    """
    own = np.flatnonzero(explanation.cohort.labels == label)
    begin = explanation.cohort.offsets
    found = {}
    for end, pick, sign in (("highest", np.argmax, -1), ("lowest", np.argmin, 1)):
        rows = [int(begin[p] + pick(explanation.logit[begin[p] : begin[p + 1]])) for p in own]
        found[end] = sorted(rows, key=lambda row: sign * float(explanation.logit[row]))[:n]
    return found


def _extremes(explanation: Explanation) -> list[dict[str, Any]]:
    names, patient = explanation.images["image"], explanation.patient
    return [
        {
            "label": label,
            "ends": [
                [
                    end,
                    [
                        [
                            int(patient[row]),
                            row - int(explanation.cohort.offsets[patient[row]]),
                            names[row],
                            _number(explanation.logit[row], 4),
                        ]
                        for row in rows
                    ],
                ]
                for end, rows in extreme_images(explanation, label).items()
            ],
        }
        for label in (1, 0)
    ]


def _deletion(explanation: Explanation) -> dict[str, Any] | None:
    deletion = explanation.deletion
    if deletion is None:
        return None
    curves = ("highest", "random", "random_low", "random_high")
    return {
        "k": deletion.k.tolist(),
        **{name: _round(getattr(deletion, name), 5) for name in curves},
        "told": describe_deletion(deletion),
    }


def _subgroups(explanation: Explanation) -> dict[str, Any] | None:
    found = explanation.subgroups
    if found is None:
        return None
    names = [f"{name}{end}" for name in _FIGURES for end in ("", "_low", "_high")]
    return {
        "told": describe_subgroups(found, explanation.subject),
        "figures": _FIGURES,
        "rows": [
            {
                **{name: row[name] for name in ("by", "group", "reactive", "tumoral")},
                **{name: _number(row[name], 4) for name in names},
            }
            for row in found.rows.to_dict("records")
        ],
    }


def _number(value: Any, digits: int) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None


def _round(values: Any, digits: int) -> Any:
    return np.asarray(values, np.float64).round(digits).tolist()
