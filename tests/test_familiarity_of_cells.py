"""Real cells, where they are at hand: who is unlike them; docs/familiarity.md shows more."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.changed_cells import LOOKS, Measured, Pool, judge, learn

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "pbc-mil-truth").is_dir(), reason="needs the real cells"),
]


def test_real_cells_that_look_otherwise_are_noticed() -> None:
    facts = pd.read_csv(DATA / "pbc-mil-truth" / "instances.csv", dtype=str)
    facts = facts.groupby("ID").head(9)
    facts = facts[facts["ID"].isin(facts["ID"].unique()[:60])]
    paths = [
        DATA / "pbc-mil" / str(row.SPLIT) / str(row.ID) / str(row.FILE)
        for row in facts.itertuples()
    ]
    pool = Pool(facts["ID"].to_numpy(str), facts["CELL_CLASS"].to_numpy(str))
    measured = Measured(cache=None)
    bags = list(pool.rows.values())
    training, others = bags[:45], bags[45:]
    found = measured.get("", paths, LOOKS["as it is"])
    model = learn(found, training)
    assert judge(model, found, others).patients["unlike"].sum() <= 3  # of 15
    rows = np.concatenate(others)
    starts = np.cumsum([0, *map(len, others)])
    held_out = [
        np.arange(start, start + len(bag)) for start, bag in zip(starts, others, strict=False)
    ]
    for name in ("hue + .06", "hue − .06", "blurred, σ 1 px"):
        changed = measured.get("", [paths[row] for row in rows], LOOKS[name])
        assert judge(model, changed, held_out).patients["unlike"].all(), name
