"""How tumoral patients differ from reactive ones: the signs of the synthetic cohort (METHOD §6).

* witness: a share of their cells is atypical; all other cells are drawn alike for everybody.
* variety: no cell is foreign, but their cells resemble each other more. Where the cells of a
  patient are centred says nothing of the label.
* shift: all of their cells are moved along some traits, by as much as the patient draws.
"""

from dataclasses import astuple

import numpy as np

from lymphfeat.settings import Sign
from lymphfeat.synthetic.rendering import TRAITS, Look, Slide, draw_traits

_SAMPLE = 200  # cells that show where the traits of a patient's slide are centred
_BETWEEN = 0.4  # of patients' centres: standard deviation, in those of a patient's cells
SPREAD_DISTANCE = 1.1  # of the classes' mean log-spreads, at difficulty 0
_SPREAD_DEVIATION = 0.4  # of log-spreads within a class
# Along which traits a shift goes, in deviations of a patient's cells, at difficulty 0.
_SHIFT = {"nucleus": 1.0, "grain": -1.5, "contrast": -1.0, "density": -1.5, "basophilia": 1.5}
_DIRECTION = np.array([_SHIFT.get(trait, 0.0) for trait in TRAITS])  # (T,)
_AMOUNTS = 0.45, 1.35  # least and greatest factor of a patient's shift


def draw_look(
    rng: np.random.Generator, sign: Sign, label: int, difficulty: float, slide: Slide
) -> Look | None:
    """Draw how the cells of a patient depart from those drawn for the slide; None if not at all."""
    if sign == "witness":
        return None
    large = (rng.random(_SAMPLE) < slide.large_share).tolist()
    cells = np.array([astuple(draw_traits(rng, False, 0, slide, is_large)) for is_large in large])
    deviation = cells.std(0)
    centre = cells.mean(0) + _BETWEEN * rng.normal(0, 1, len(TRAITS)) * deviation
    spread = np.exp(_SPREAD_DEVIATION * rng.normal())
    plainness = 1 - difficulty
    if sign == "variety":
        spread *= np.exp(plainness * SPREAD_DISTANCE * (0.5 - label))
    elif label == 1:
        centre += plainness * rng.uniform(*_AMOUNTS) * _DIRECTION * deviation
    return Look(middle=cells.mean(0), centre=centre, spread=float(spread))
