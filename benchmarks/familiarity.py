"""Whether patients unlike those of training are noticed, on real cells; and how many like them.

    python benchmarks/familiarity.py [../shared/data] [--splits 20] [--cohorts 6] [--cache FOLDER]

`pbc-mil` (made-up patients of real cells, by folder) as it is, with a hue moved by .06, blurred, at
another magnification, or with its lymphocytes replaced by cells of a kind that training lacked.
The patients are drawn at random from one pool, so they are more alike than patients are: in a
second table the stain differs from patient to patient. Then synthetic cohorts, whose patients
differ in stain, focus and cells. The limits are those of the final model.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.settings import SyntheticSettings
from lymphfeat.synthetic.cohort import write_synthetic_cohort
from tests.changed_cells import LOOKS, TRAINING, Found, Measured, Pool, judge, learn

SYNTHETIC = ("as it is", "hue + .06", "hue − .06", "blurred, σ 1 px", "magnified .8 times")
Shares = dict[str, tuple[float, float, float]]  # of patients, by features only, and of images


def judge_looks(pool: Pool, found: dict[str, Found], seed: int) -> Shares:
    """Learn from some patients as they are; judge the others, made to look otherwise."""
    training, others = pool.split(seed)
    bags = [pool.rows[id] for id in training]
    models = [learn(found["as it is"], bags, only) for only in (False, True)]
    shares = {}
    for name, look in found.items():
        both, features = (judge(model, look, [pool.rows[id] for id in others]) for model in models)
        tables = (both.patients, features.patients, both.images)
        patients, by_features, images = (float(table["unlike"].mean()) for table in tables)
        shares[name] = (patients, by_features, images)
    return shares


def tell_looks(found: Sequence[Shares], held_out: int) -> None:
    print("| images | patients unlike | by features only | images unlike |\n|---|---|---|---|")
    for name in found[0]:
        mean = np.mean([shares[name] for shares in found], axis=0)
        print(f"| {name} | " + " | ".join(f"{value:.1%}" for value in mean) + " |")
    print(f"{len(found)} splits, {held_out} held-out patients")


def tell_cells(
    pool_of: Callable[[int], Pool], found: Found, kinds: Sequence[str], splits: int
) -> None:
    """Tell how many patients are unlike training whose lymphocytes are cells that are new to it."""
    held_out = 0
    print("| lymphocytes replaced by | images replaced | patients unlike | untouched | new |")
    print("|---|---|---|---|---|")
    for kind in kinds:
        rows = []
        for seed in range(splits):
            rng, pool = np.random.default_rng(seed), pool_of(seed)
            training, others = pool.split(seed)
            model = learn(found, pool.without(training, kind))
            bags = pool.without(others, kind)
            held_out += len(bags)
            there = np.flatnonzero(pool.cells == kind)
            changed = [
                np.where(pool.cells[bag] == "lymphocyte", rng.choice(there, len(bag)), bag)
                for bag in bags
            ]
            exchanged = np.concatenate(changed) != np.concatenate(bags)
            judged = judge(model, found, changed)
            rows.append(
                (
                    exchanged.mean(),
                    judged.patients["unlike"].mean(),
                    judge(model, found, bags).patients["unlike"].mean(),
                    judged.images["unlike"].to_numpy()[exchanged].mean(),
                )
            )
        print(f"| {kind} | " + " | ".join(f"{value:.1%}" for value in np.mean(rows, axis=0)) + " |")
    print(f"{splits} splits, {held_out // len(kinds)} held-out patients")


def tell_pbc_mil(data: Path, measured: Measured, splits: int) -> None:
    facts = pd.read_csv(data / "pbc-mil-truth" / "instances.csv", dtype=str)
    paths = [
        data / "pbc-mil" / str(row.SPLIT) / str(row.ID) / str(row.FILE)
        for row in facts.itertuples()
    ]
    owner = facts["ID"].to_numpy(str)
    pool = Pool(owner, facts["CELL_CLASS"].to_numpy(str))
    rng = np.random.default_rng(0)
    stains = {id: rng.normal(1, 0.08) * rng.normal(1, 0.045, 3) for id in pool.rows}
    each = np.stack([stains[id] for id in owner.tolist()])
    for title, name, factors in (
        ("pbc-mil", "plain", None),
        ("pbc-mil, every patient stained otherwise", "stained", each),
    ):
        print(f"\n{title}, {TRAINING} training patients")
        looks = {
            look: measured.get(f"{name}-{number}", paths, change, factors)
            for number, (look, change) in enumerate(LOOKS.items())
        }
        held_out = splits * (len(pool.rows) - TRAINING)
        tell_looks([judge_looks(pool, looks, seed) for seed in range(splits)], held_out)
        if factors is None:
            print()
            kinds = ("eosinophil", "basophil", "ig")
            tell_cells(lambda seed: pool, looks["as it is"], kinds, splits)


def tell_pbc_cells(data: Path, measured: Measured, splits: int) -> None:
    """Draw patients of 16 to 40 lymphocytes, monocytes and neutrophils."""
    kinds = ("lymphocyte", "monocyte", "neutrophil", "eosinophil", "basophil", "platelet")
    folders = {kind: sorted((data / "pbc-cells" / kind).glob("*.jpg")) for kind in kinds}
    folders |= {kind: folders[kind][:500] for kind in kinds[3:]}
    paths = [path for kind in kinds for path in folders[kind]]
    cells = np.repeat(kinds, [len(folders[kind]) for kind in kinds])

    def draw(seed: int) -> Pool:
        rng = np.random.default_rng(seed)
        owner = np.full(len(cells), "", dtype="<U8")
        common = rng.permutation(np.flatnonzero(np.isin(cells, kinds[:3])))
        numbers = np.repeat(np.arange(200), rng.integers(16, 41, 200))[: len(common)]
        owner[common] = [f"P{number}" for number in numbers]
        pool = Pool(owner, cells)
        del pool.rows[""]
        return pool

    print(f"\npbc-cells, patients drawn anew for each split, {TRAINING} of them training")
    tell_cells(draw, measured.get("cells", paths, LOOKS["as it is"]), kinds[3:], splits)


def tell_synthetic(measured: Measured, cohorts: int) -> None:
    """Draw cohorts whose patients differ in stain, focus and cells, each with its own pool."""
    looks = {name: LOOKS[name] for name in SYNTHETIC}
    found = []
    for seed in range(cohorts):
        settings = SyntheticSettings(patients=120, test_patients=0, images=12, seed=seed)
        with TemporaryDirectory() as folder:
            cohort = Cohort.load(write_synthetic_cohort(settings, Path(folder) / "c", workers=1))
            paths = [path for images in cohort.images for path in images]
            pool = Pool(np.repeat(cohort.ids, cohort.n_images), np.full(len(paths), "cell"))
            numbers = {
                name: measured.get(f"synthetic{seed}-{name}", paths, look)
                for name, look in looks.items()
            }
        found.append(judge_looks(pool, numbers, seed))
    print(f"\nsynthetic cohorts, {TRAINING} training patients each")
    tell_looks(found, cohorts * (120 - TRAINING))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--cohorts", type=int, default=6)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = Measured(arguments.cache)
    if arguments.data:
        tell_pbc_mil(arguments.data, measured, arguments.splits)
        tell_pbc_cells(arguments.data, measured, arguments.splits)
    tell_synthetic(measured, arguments.cohorts)
